"""What the batch scripts ask on the first node of a job, each question in a process of its own."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job.config import RunConfig, load_config
from job.errors import OutputError
from job.launch.slurm.allocation import Node, Start
from job.preflight.facts import Facts
from job.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.test_slurm_allocation import UUIDS, allocated, said

RunFile = Callable[..., Path]
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The job's."""
    path = tmp_path / "qlora-17"
    path.mkdir()
    return path


def ask(verb: str, *words: str | Path, **env: str) -> Done:
    """The answer to a question of slurm/job.sh."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "CUDA_VISIBLE"))}
    return subprocess.run(
        [sys.executable, "-m", "job.launch.slurm", verb, *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={**own, "SLURM_JOB_ID": "17", **env},
    )


def refused(done: Done, code: int) -> str:
    assert done.returncode == code and not done.stdout and "Traceback" not in done.stderr, done
    return done.stderr.strip()


def record(output: Path, state: str, why: str = "", step: int = 3, ago: float = 0) -> str:
    """The run's status, as of `ago` seconds before now; when that was."""
    output.mkdir(parents=True, exist_ok=True)
    updated = (datetime.now(UTC) - timedelta(seconds=ago)).isoformat(timespec="seconds")
    status = {"state": state, "reason": why, "step": step, "updated": updated, "checkpoint": step}
    (output / "status.json").write_text(json.dumps(status))
    return updated


def test_a_new_run_opens(run_file: RunFile, folder: Path, tmp_path: Path) -> None:
    config = run_file()
    done = ask("open", folder, config, "lora.rank=8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "go\n", "")
    start = Start.read(folder)
    assert start == Start("17", (str(config), "lora.rank=8"), str(tmp_path / "out/run"), "", 0)
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_opens_with_its_step_and_one_that_is_finished_does_not(
    run_file: RunFile, folder: Path, tmp_path: Path
) -> None:
    config, output = run_file(), tmp_path / "out/run"
    record(output, "interrupted", "SIGTERM", step=2)
    (output / "run.yaml").write_text(config.read_text())
    assert ask("open", folder, config).stdout == "go\n" and Start.read(folder).step == 2
    assert Start.read(folder).before == json.loads((output / "status.json").read_text())["updated"]
    (folder / "job.json").unlink()
    record(output, "finished")
    done = ask("open", folder, config)
    assert (done.returncode, done.stdout) == (0, "done\n") and list(folder.iterdir()) == []
    assert done.stderr == f"This run is finished already (3 steps): {output}\n"
    assert ask("open", folder, config, "train.max_steps=9").stdout == "go\n", "it shall go further"


def foreign(tmp_path: Path) -> None:
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/thesis.tex").touch()


def nothing(tmp_path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("words", "prepare", "message"),
    [
        (
            ["lora.rnak=8"],
            nothing,
            "ConfigError: 1 problem in {config} and the settings behind it\n  lora.rnak: unknown name",
        ),
        (
            ["lora.rank=0", "train.max_steps=x"],
            nothing,
            "ConfigError: 2 problems in {config} and the settings behind it\n",
        ),
        ([], foreign, "OutputError: output.url: {output} holds files that are no run (thesis.tex)"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    words: list[str],
    prepare: Callable[[Path], None],
    message: str,
    run_file: RunFile,
    folder: Path,
    tmp_path: Path,
) -> None:
    config = run_file()
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = refused(ask("open", folder, config, *words), 2)
    assert message.format(config=config, output=tmp_path / "out/run") in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_run_file_is_wrong_too(folder: Path) -> None:
    said = refused(ask("open", folder, "nowhere.yaml"), 2)
    cure = "Give the path of a run file, see configs/"
    assert said == f"ConfigError: 1 problem in nowhere.yaml\n  cannot be read: No such file or directory. {cure}"
    assert refused(ask("shut", folder), 2) == (
        "InputError: shut: expected one of open, nodes, close, faults, sweep, keep"
    )


def opened(
    folder: Path, config: Path, facts: Sequence[Facts], allocation: str, *words: str, before: str = "", step: int = 0
) -> None:
    """As `open` and the preflight on the nodes leave the folder; srun says things between the lines."""
    Start("17", (str(config), *words), "x", before, step).save(folder)
    (folder / "allocation").write_text(allocation)
    for old in folder.glob("facts.*"):
        old.unlink()
    lines = [line for one in facts for line in ("slurmstepd: something", one.to_json())]
    for number, line in enumerate(lines):
        (folder / f"facts.{number}").write_text(f"{line}\n")


GOOD = [replace(said("n1", ("2", "3")), port=12018), replace(said("n2", UUIDS), port=12019), said("n3", ("0", "1"))]
BAD = [*GOOD[:2], replace(GOOD[2], storage="data.train: rows.jsonl: there is no such file")]
THREE = allocated("gpu:4", "n1", "n2", "n3")


def test_nodes_are_answered_with_address_port_and_names(run_file: RunFile, folder: Path) -> None:
    opened(folder, run_file(), GOOD[::-1], THREE)
    done = ask("nodes", folder, "12017", SLURMD_NODENAME="n2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "10.0.0.1 12018 n1,n2,n3\n", "")
    assert (folder / "hostfile").read_text() == "n1 slots=2\nn2 slots=2\nn3 slots=2\n"
    start = Start.read(folder)
    assert start.nodes[:2] == (Node("n1", "10.0.0.1", ("2", "3"), 2), Node("n2", "10.0.0.2", UUIDS, 2))
    assert (start.job, start.output) == ("17", "x"), "the rest stays"


def test_a_bad_node_is_named_and_nothing_starts(run_file: RunFile, folder: Path) -> None:
    opened(folder, run_file(), BAD[1:], THREE)
    assert refused(ask("nodes", folder, "12017"), 1).splitlines() == [
        "n1: did not report",
        "n3: data.train: rows.jsonl: there is no such file",
        "JobError: n1, n3: see above. Exclude with sbatch --exclude=n1,n3, or set QLORA_LEAVE_OUT=1",
    ]
    assert not (folder / "hostfile").exists() and Start.read(folder).nodes == ()


def test_bad_nodes_are_left_out_or_only_warned_of(run_file: RunFile, folder: Path) -> None:
    opened(folder, run_file(), BAD, THREE)
    done = ask("nodes", folder, "12017", "--leave-out")
    assert (done.returncode, done.stdout) == (0, "10.0.0.1 12018 n1,n2\n")
    assert done.stderr.splitlines() == ["n3: data.train: rows.jsonl: there is no such file", "left out: n3"]
    done = ask("nodes", folder, "12017", "--only-warn")
    assert (done.returncode, done.stdout) == (0, "10.0.0.1 12018 n1,n2,n3\n")
    assert done.stderr.splitlines() == ["n3: data.train: rows.jsonl: there is no such file"]


def test_a_first_node_that_said_nothing_gets_the_port_of_the_job_and_one_without_a_port_is_named(
    run_file: RunFile, folder: Path
) -> None:
    opened(folder, run_file(), [said("n2")], allocated("(null)", "n1", "n2"))
    assert ask("nodes", folder, "12017", "--only-warn").stdout == "10.0.0.1 12017 n1,n2\n"
    opened(folder, run_file(), [replace(said("n1"), port=0), said("n2")], allocated("(null)", "n1", "n2"))
    wrong = refused(ask("nodes", folder, "12017", "--only-warn"), 1).splitlines()[-1]
    assert wrong == "JobError: n1 has no free port from 12017 on. Leave it out, or end what holds them"


def test_nodes_that_the_others_could_not_speak_to_are_left_out_too(run_file: RunFile, folder: Path) -> None:
    opened(folder, run_file(), GOOD, THREE)
    verdict: dict[str, Any] = {"faults": {"n1": ["cannot be reached"]}, "warnings": {"n2": ["slow"]}, "general": []}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    done = ask("nodes", folder, "12017", "--leave-out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "10.0.0.2 12019 n2,n3\n", "left out: n1\n")
    assert (folder / "hostfile").read_text() == "n2 slots=2\nn3 slots=2\n"
    opened(folder, run_file(), GOOD[1:], THREE)
    assert ask("nodes", folder, "12017", "--leave-out").stderr.splitlines()[-1] == "left out: n1", "once"
    (folder / "verdict.json").write_text(json.dumps({"faults": {name: ["bad"] for name in ("n1", "n2", "n3")}}))
    cure = "Repair those that were named, or ask for others"
    said = refused(ask("nodes", folder, "12017", "--leave-out"), 2).splitlines()[-1]
    assert said == f"InputError: no node is left to run on. {cure}"


def test_processes_a_node_come_from_the_words_of_the_job(run_file: RunFile, folder: Path) -> None:
    opened(folder, run_file(), GOOD[:1], allocated("gpu:4", "n1"), "parallel.processes=1")
    assert ask("nodes", folder, "12017").stdout == "127.0.0.1 12018 n1\n"
    assert (folder / "hostfile").read_text() == "n1 slots=1\n"
    opened(folder, run_file(), GOOD[:1], allocated("gpu:4", "n1"), "parallel.processes=4")
    assert "in the settings for n1\n  parallel.processes: 4, and here are 2 GPUs" in refused(
        ask("nodes", folder, "12017"), 2
    )


@pytest.mark.parametrize(
    ("state", "why", "old", "warned", "code", "answer", "said"),
    [
        ("finished", "", False, False, 1, "done 0", "finished after step 3"),
        ("failed", "loss is nan", False, False, 1, "failed 1", "loss is nan"),
        ("running", "", False, False, 137, "again 1", "its processes were lost after step 3"),
        ("interrupted", "SIGTERM", False, False, 75, "again 75", "interrupted by SIGTERM after step 3"),
        ("interrupted", "SIGINT", False, False, 75, "stopped 75", "interrupted by SIGINT after step 3"),
        ("running", "", True, False, 2, "failed 2", "the run did not begin; what the ranks said tells why"),
        ("finished", "", True, True, 1, "again 75", "the scheduler wanted the nodes back before the run began"),
    ],
)
def test_what_comes_next(
    state: str,
    why: str,
    old: bool,
    warned: bool,
    code: int,
    answer: str,
    said: str,
    run_file: RunFile,
    folder: Path,
    tmp_path: Path,
) -> None:
    updated = record(tmp_path / "out/run", state, why, ago=3600)  # the clock of the first rank's node is behind
    opened(folder, run_file(), GOOD, THREE, before=updated if old else "2026-11-21T10:00:00+00:00", step=1)
    if warned:
        (folder / "warning").touch()
    done = ask("close", folder, str(code))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{answer}\n", f"{tmp_path}/out/run: {said}\n")


def test_starts_that_come_no_further_are_counted_and_the_last_one_fails(
    run_file: RunFile, folder: Path, tmp_path: Path
) -> None:
    config, words = run_file(), ("checkpoint.max_restarts=1",)
    (folder / "warning").touch()
    for fruitless, answer in ((0, "again 75\n"), (1, "failed 1\n")):
        assert ask("open", folder, config, *words).stdout == "go\n"
        assert Start.read(folder).fruitless == fruitless
        done = ask("close", folder, "1")
        assert done.stdout == answer
    assert "so did the starts before it, no step further. Raise the time between" in done.stderr
    record(tmp_path / "out/run", "interrupted", "the scheduler's warning", step=2)
    (tmp_path / "out/run/run.yaml").write_text(config.read_text())
    assert ask("open", folder, config, *words).stdout == "go\n" and Start.read(folder).fruitless == 0


def test_a_limit_that_leaves_no_time_for_a_step_is_told_by_the_step_before(
    run_file: RunFile, folder: Path, tmp_path: Path
) -> None:
    record(tmp_path / "out/run", "interrupted", "the time limit")
    for before, answer in ((2, "again 75\n"), (3, "failed 1\n")):
        opened(folder, run_file(), GOOD, THREE, step=before)
        assert ask("close", folder, "75").stdout == answer


@pytest.mark.parametrize(
    ("log", "answer", "state", "why"),
    [
        ("[4] step 3\n[4] ValueError: x\n", "failed 1", "failed", "ValueError: x"),
        ("[0] JobError: another rank ended after step 3\n", "again 1", "running", ""),
        ("[4] ValueError: x\n--- start 1, 2026-11-21T15:00:00+00:00\n[4] step 3\n", "again 1", "running", ""),
    ],
    ids=["said why", "names another", "of a former start"],
)
def test_a_lost_run_has_failed_when_a_rank_said_why(
    log: str, answer: str, state: str, why: str, run_file: RunFile, folder: Path, tmp_path: Path
) -> None:
    config = run_file()
    opened(folder, config, GOOD, THREE)
    assert ask("nodes", folder, "12017").returncode == 0
    record(tmp_path / "out/run", "running")
    (tmp_path / "out/run/run.yaml").write_text(config.read_text())
    (folder / "n3.log").write_text(log)
    assert ask("close", folder, "1").stdout == f"{answer}\n"
    status = json.loads((tmp_path / "out/run/status.json").read_text())
    assert (status["state"], status["reason"]) == (state, why)


def test_what_failed_first_is_found_in_the_nodes_logs(run_file: RunFile, folder: Path) -> None:
    opened(folder, run_file(), GOOD, THREE)
    assert ask("nodes", folder, "12017").returncode == 0
    assert ask("faults", folder).stdout == f"no rank said why; see {folder}/*.log\n"
    (folder / "n1.log").write_bytes(b"[0] step 3: loss \xff1.0\n[0] JobError: another rank ended after step 3\n")
    (folder / "n3.log").write_text("[4] step 3: loss 1.0\n[4] ValueError: first\n[4] bye\n")
    assert ask("faults", folder).stdout == "what failed first, on n3:\n[4] ValueError: first\n"


ELSEWHERE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "CROSS_RANK": "0",
    "MASTER_ADDR": "n1",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "n1",
    "SSH_CONNECTION": "10.0.0.9 1 10.0.0.1 22",
    "HOSTNAME": "n1",
    "TMPDIR": "/tmp",
}
"""What is true of this node or process alone."""


def test_the_environment_is_kept_for_its_owner_alone(folder: Path) -> None:
    kept = {"HF_TOKEN": "hf_secret ü\n$x", "SLURM_JOB_END_TIME": "1", "QLORA_WARNING_FILE": "/w", "NCCL_DEBUG": "INFO"}
    (folder / "environment.json").write_text("a former start's, that everybody may read")
    (folder / "environment.json").chmod(0o644)
    done = ask("keep", folder, **ELSEWHERE, **kept)
    assert (done.returncode, done.stdout) == (0, f"{folder}/environment.json\n"), done
    found = json.loads((folder / "environment.json").read_text())
    assert found.items() >= {**kept, "SLURM_JOB_ID": "17", "PATH": os.environ["PATH"]}.items()
    assert not found.keys() & ELSEWHERE.keys()
    assert (folder / "environment.json").stat().st_mode & 0o777 == 0o600


def test_a_task_of_a_sweep_has_its_own_settings_and_output(run_file: RunFile, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.write_text("# rank\nlora.rank=8\n\n  # seed\nlora.rank=16 'tracking.run_name=a b'\n")
    output = f"output.url={tmp_path}/out/run"
    done = ask("sweep", run_file(), sweep, "1", "train.max_steps=2", "lora.rank=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["train.max_steps=2", "lora.rank=2", "lora.rank=8", f"{output}/1"]
    assert ask("sweep", run_file(), sweep, "2").stdout.splitlines() == [
        "lora.rank=16",
        "tracking.run_name=a b",
        f"{output}/2",
    ]
    elsewhere = ask("sweep", run_file(), sweep, "2", "output.url=s3://bucket/x/")
    assert elsewhere.stdout.splitlines()[-1] == "output.url=s3://bucket/x/2"


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        (
            "lora.rank=8\n#\n",
            "2",
            "InputError: {sweep} has 1 lines of settings, and this is task 2: sbatch --array=1-1",
        ),
        ("lora.rank=8\n", "0", "InputError: {sweep} has 1 lines of settings, and this is task 0: sbatch --array=1-1"),
        ("lora.rank=8\n", "x", "InputError: {sweep} has 1 lines of settings, and this is task x: sbatch --array=1-1"),
        ("lora.rank='8\n", "1", "InputError: {sweep}, line of task 1: No closing quotation. Quote as in a shell"),
        (
            "output.url=x\n",
            "1",
            "InputError: {sweep}: line 1 sets output.url. Leave it out: each run gets the run file's with /1",
        ),
        (
            None,
            "1",
            "InputError: {sweep}: there is no such file. Expected a line of settings for each task of the array",
        ),
    ],
)
def test_a_wrong_sweep_is_refused(text: str | None, task: str, message: str, run_file: RunFile, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    if text is not None:
        sweep.write_text(text)
    assert refused(ask("sweep", run_file(), sweep, task), 2) == message.format(sweep=sweep)


def test_a_wrong_setting_of_a_sweep_is_refused(run_file: RunFile, tmp_path: Path) -> None:
    (tmp_path / "sweep").write_text("lora.rnak=8\n")
    assert "lora.rnak: unknown name" in refused(ask("sweep", run_file(), tmp_path / "sweep", "1"), 2)


@pytest.mark.parametrize(("cause", "tries"), [(ConnectionError("reset"), 3), (PermissionError(errno.EACCES, "no"), 1)])
def test_storage_that_falters_as_a_job_begins_or_ends_is_asked_again_and_one_that_refuses_is_not(
    cause: OSError, tries: int, run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.launch.slurm import __main__ as steps

    asked: list[RunConfig] = []

    def folder(config: RunConfig) -> RunFolder:
        asked.append(config)
        if len(asked) < 3:
            raise OutputError("output.url: cannot be reached") from cause
        return RunFolder(config)

    monkeypatch.setattr(steps, "RunFolder", folder)
    monkeypatch.setattr(steps, "PAUSE_S", 0.0)
    config = load_config(str(run_file()))
    if tries == 3:
        assert steps._folder_of(config).config == config
    else:
        with pytest.raises(OutputError, match="cannot be reached"):
            steps._folder_of(config)
    assert len(asked) == tries
