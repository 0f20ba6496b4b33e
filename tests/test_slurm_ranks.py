"""What runs on each node of a job: a launcher that signals do not end, ranks whose every word is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from job.errors import JobError
from job.launch.slurm.allocation import HOSTFILE, Node, Start
from job.launch.slurm.node import BLOCKED, node_rank
from tests.conftest import REPOSITORY

HOSTS = "n2 slots=1\nn10 slots=1\nn1 slots=1\n"
NUMBERED = (
    "import os, sys, signal, subprocess; from pathlib import Path; from job.launch.slurm.rank import number_lines\n"
)


def rank(log: Path, number: str, code: str) -> "subprocess.Popen[bytes]":
    """A process whose lines are numbered. Its own stdout ends when the last line is written."""
    begin = f"{NUMBERED}number_lines(Path(sys.argv[1]), sys.argv[2])\n{code}"
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", begin, log, number]
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, cwd=REPOSITORY)


def lines_of(log: Path, code: str, expected: int = 0) -> list[str]:
    """What is in the log when a rank has done this and ended with this code, having said nothing elsewhere."""
    process = rank(log, "3", code)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (expected, b"")
    return log.read_text().splitlines()


def until(true: Callable[[], object], timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_line_of_a_rank_and_its_children_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "n1.log").write_text("--- start 0\n")
    child = "import os; os.write(1, b'child\\n'); os.write(2, 'Straße\\n'.encode())"
    code = f"""
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
subprocess.run([sys.executable, "-c", {child!r}])
os.execv("/bin/sh", ["sh", "-c", "echo; echo ' indented  '; echo became >&2; printf unfinished"])
"""
    said = ["out", "err", "child", "Straße", "", " indented  ", "became", "unfinished"]
    assert lines_of(tmp_path / "n1.log", code) == ["--- start 0", *(f"[3] {line}" for line in said)]
    assert (tmp_path / "n1.log").read_text().endswith("[3] unfinished\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_rank_that_is_killed_right_after_its_last_words_loses_none(number: signal.Signals, tmp_path: Path) -> None:
    code = f"os.write(2, b'line\\n' * 2000 + b'last words'); os.kill(os.getpid(), {number.value})"
    assert lines_of(tmp_path / "n1.log", code, -number) == ["[3] line"] * 2000 + ["[3] last words"]


def test_a_traceback_is_numbered_to_its_end(tmp_path: Path) -> None:
    lines = lines_of(tmp_path / "n1.log", "raise ValueError('first\\nsecond')", 1)
    assert lines[0] == "[3] Traceback (most recent call last):" and lines[-2:] == [
        "[3] ValueError: first",
        "[3] second",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, *BLOCKED])
def test_a_signal_to_all_processes_of_a_job_does_not_end_the_copier(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "n1.log"
    process = rank(log, "3", "print('first', flush=True); sys.stdin.read(); print('stopping')")
    until(lambda: log.exists() and log.read_text())
    (copier,) = psutil.Process(process.pid).children()
    copier.send_signal(number)
    time.sleep(0.2)
    assert copier.is_running() and copier.status() != psutil.STATUS_ZOMBIE
    process.communicate(timeout=60)
    assert process.returncode == 0 and log.read_text() == "[3] first\n[3] stopping\n"


def test_ranks_of_a_node_share_a_log_without_torn_lines(tmp_path: Path) -> None:
    log = tmp_path / "n1.log"
    code = "for n in range(400): os.write(1, (f'{n} ' + sys.argv[2] * (n * 37 % 9000) + '\\n').encode())"
    ranks = [rank(log, str(number), code) for number in range(4)]
    for process in ranks:
        process.communicate(timeout=120)
    lines = log.read_text().splitlines()
    for number in range(4):
        own = [line for line in lines if line.startswith(f"[{number}] ")]
        assert own == [f"[{number}] {n} " + str(number) * (n * 37 % 9000) for n in range(400)]
    assert len(lines) == 1600


def test_a_full_disk_costs_lines_and_not_the_rank(tmp_path: Path) -> None:
    (tmp_path / "n1.log").symlink_to("/dev/full")
    process = rank(tmp_path / "n1.log", "3", "for n in range(9): print(n, flush=True); import time; time.sleep(0.05)")
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize(("here", "rank"), [("n2", 0), ("n10", 1), ("n1", 2)])
def test_a_node_knows_its_number_by_the_hostfile(here: str, rank: int) -> None:
    assert node_rank(HOSTS, {"SLURMD_NODENAME": here, "SLURM_NODEID": "0", "SLURM_PROCID": "0"}) == rank


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SLURMD_NODENAME": "n3"}, "node n3 is not in the hostfile (n2, n10, n1)"),
        ({}, "node without a name is not in the hostfile (n2, n10, n1)"),
    ],
)
def test_a_node_that_is_not_there_is_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(JobError) as refused:
        node_rank(HOSTS, env)
    assert str(refused.value) == message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder; of its nodes n10 alone has a GPU."""
    names = [line.split()[0] for line in HOSTS.splitlines()]
    nodes = tuple(Node(name, name, ("0",) if name == "n10" else ()) for name in names)
    Start("17", ("run.yaml",), "out", "", 0, nodes).save(tmp_path)
    (tmp_path / HOSTFILE).write_text(HOSTS)
    return tmp_path


def on_node(folder: Path, here: str, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    return subprocess.run(
        [sys.executable, "-m", "job.launch.slurm.node", folder, *command],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={**env, "SLURMD_NODENAME": here, **more},
    )


CHILD = (
    "import json, os, subprocess, sys\n"
    "read = ['cat', '/proc/self/status']\n"
    "said = [line for line in subprocess.check_output(read, text=True).splitlines() if line.startswith('SigBlk')]\n"
    "print(json.dumps([sys.argv[1:], sys.executable, os.environ.get('DS_ACCELERATOR'), int(said[0].split()[1], 16)]))"
)


@pytest.mark.parametrize(
    ("here", "number", "accelerator"), [("n2", "0", "cpu"), ("n10", "1", None), ("n1", "2", "cpu")]
)
def test_a_node_becomes_the_launcher(
    here: str, number: str, accelerator: str | None, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "bin"
    other.mkdir()
    (other / "python").symlink_to("/bin/false")  # the same environment's wins over what is on PATH
    words = ("--node_rank={node_rank}", "{node_rank}", "a b")
    path = f"{other}:{os.environ['PATH']}"
    done = on_node(folder, here, Path(sys.executable).name, "-c", CHILD, *words, PATH=path)
    assert done.returncode == 0, done.stderr
    arguments, program, found, blocked = json.loads(done.stdout)
    assert arguments == [f"--node_rank={number}", number, "a b"] and program == sys.executable
    assert found == accelerator
    assert blocked == sum(1 << (each - 1) for each in BLOCKED), "SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2, also in children"


@pytest.mark.parametrize("here", ["n1", "n3"])
def test_a_node_that_starts_ranks_elsewhere_need_not_have_any(here: str, folder: Path) -> None:
    done = on_node(folder, here, Path(sys.executable).name, "-c", CHILD, "--force_multi")
    assert done.returncode == 0, done.stderr
    arguments, _, accelerator, _ = json.loads(done.stdout)
    assert arguments == ["--force_multi"] and accelerator is None, "n10 has a GPU"


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    return done.stderr.strip()


def test_what_a_node_cannot_do_is_said_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    assert (
        refused(on_node(folder, "n3", "true", "{node_rank}"))
        == "JobError: node n3 is not in the hostfile (n2, n10, n1)"
    )
    missing = refused(on_node(folder, "n2", "no-such-command", "--node_rank={node_rank}"))
    cure = "Install the package there as on the others"
    assert missing == f"JobError: there is no command no-such-command on this node. {cure}"
    elsewhere = refused(on_node(tmp_path / "not-shared", "n2", "true"))
    assert elsewhere.startswith(f"JobError: {tmp_path}/not-shared/job.json cannot be read (")
    assert elsewhere.endswith("). Is this folder on all nodes?")


def as_rank(folder: Path, words: Sequence[str], **env: str) -> Path:
    """The log of a rank of n10 that is started as DeepSpeed does."""
    variables = {**os.environ, "COLUMNS": "200", "CROSS_RANK": "1", "RANK": "5", "CUDA_VISIBLE_DEVICES": "0,1", **env}
    command = [sys.executable, "-u", "-m", "job.launch.slurm.rank", "--local_rank=1", folder, *words]
    subprocess.run(command, capture_output=True, timeout=120, env=variables, cwd=REPOSITORY)
    return folder / "n10.log"


def test_a_rank_becomes_the_command_with_the_words_of_the_job_and_logs_under_its_nodes_name(folder: Path) -> None:
    log = as_rank(folder, ["train"]).read_text()
    assert log.startswith("[5] ") and "run.yaml: " not in log.splitlines()[0][:3]
    assert "problem in run.yaml" in log and not (folder / "n2.log").exists()
    assert "No such option" in as_rank(folder, ["train", "--no-such-option"]).read_text()


def test_a_rank_over_ssh_gets_the_kept_environment_and_its_own_gpus(folder: Path, tmp_path: Path) -> None:
    job = tmp_path / "place/job"
    job.mkdir(parents=True)
    (job / "__init__.py").touch()
    (job / "__main__.py").write_text(
        "import os; print([os.environ.get(n) for n in ('SECRET', 'CUDA_VISIBLE_DEVICES')])"
    )
    (folder / "environment.json").write_text(json.dumps({"SECRET": "word", "PYTHONPATH": str(job.parent)}))
    (folder / "environment.json").chmod(0o600)
    program = "import os, sys; os.chdir(sys.argv.pop(1)); from job.launch.slurm import rank; rank.main(sys.argv[1:])"
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CROSS_RANK": "1", "RANK": "5"}
    command = [sys.executable, "-c", program, job.parent, "--local_rank=0", folder, "train"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)
    assert done.returncode == 0 and (folder / "n10.log").read_text() == "[5] ['word', '0']\n", done
