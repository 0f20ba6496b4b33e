"""What the batch scripts' own functions do when SLURM is silent, knows too little or speaks early: its commands alone
are stand-ins here."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

Shell = Callable[..., "subprocess.CompletedProcess[str]"]
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_END_TIME": "1"}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs lines of bash behind job.sh, in an empty folder; `commands` are what SLURM's do."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()

    def run(lines: str, **commands: str) -> "subprocess.CompletedProcess[str]":
        for name, does in {"sleep": "true", **commands}.items():
            stand_in = tmp_path / "bin" / name
            stand_in.write_text(f"#!/bin/bash\necho {name} >>{tmp_path}/calls\n{does}\n")
            stand_in.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "QLORA"))}
        env = {**kept, **JOB, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "QLORA_PYTHON": sys.executable}
        return subprocess.run(
            ["bash", "-c", f". {REPOSITORY}/slurm/job.sh\n{lines}"],
            env=env,
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def calls(folder: Path, name: str) -> int:
    """How often a stand-in was called."""
    return (folder / "calls").read_text().splitlines().count(name)


def answers_from(asked: int, then: str) -> str:
    """A command that fails until it is asked so many times."""
    return f"(( $(grep -c squeue $(dirname $0)/../calls) >= {asked} )) && echo {then}"


@pytest.mark.parametrize(
    ("squeue", "state", "asked"),
    [
        ("echo COMPLETING", "COMPLETING", 1),
        (answers_from(3, "PREEMPTED"), "PREEMPTED", 3),
        ("true", "RUNNING", 6),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "RUNNING", 6),
    ],
    ids=["answers", "answers at last", "says nothing", "is away"],
)
def test_a_silent_controller_is_asked_again_and_then_the_job_counts_as_running(
    squeue: str, state: str, asked: int, shell: Shell, tmp_path: Path
) -> None:
    done = shell("job=17; state_now", squeue=squeue)
    assert (done.returncode, done.stdout) == (0, f"{state}\n")
    assert calls(tmp_path, "squeue") == asked and calls(tmp_path, "sleep") == (asked - 1 if state != "RUNNING" else 6)


@pytest.mark.parametrize(
    ("squeue", "code", "requeued"),
    [("false", 75, 1), (answers_from(2, "RUNNING"), 75, 1), (answers_from(2, "CANCELLED"), 75, 0)],
    ids=["silent to the end", "runs", "was cancelled"],
)
def test_a_run_that_is_to_go_on_is_requeued_unless_slurm_ended_the_job(
    squeue: str, code: int, requeued: int, shell: Shell, tmp_path: Path
) -> None:
    close = "job=17; folder=.; on_first() { echo 'again 75'; }; close_job 1"
    done = shell(close, squeue=squeue, scontrol="true")
    assert done.returncode == code, done
    assert ("start again: requeued" in done.stdout) == bool(requeued)
    assert (tmp_path / "calls").read_text().splitlines().count("scontrol") == requeued


def test_a_job_that_slurm_does_not_requeue_says_what_to_do(shell: Shell) -> None:
    refuse = "echo 'Requested operation is presently disabled for job 17' >&2; exit 1"
    done = shell(
        "job=17; folder=.; on_first() { echo 'again 75'; }; close_job 75", squeue="echo RUNNING", scontrol=refuse
    )
    assert done.returncode == 75, done
    assert done.stderr.endswith("SLURM does not requeue this job. Submit it again: it goes on where it was\n")


SETTLED = 'settle; cat "$folder/allocation"; [[ ! -e $folder/warning ]] || echo warned'
NAMES = "if [[ $2 == hostnames ]]; then printf '%s\\n' n1 n2; else"


def described(name: str, gres: str) -> str:
    """A node as scontrol describes it, on one line."""
    return f"echo 'NodeName={name} Arch=x86_64 Gres={gres} NodeAddr=10.0.0.{name[1:]} NodeHostName={name} Version=22'\n"


@pytest.mark.parametrize(
    ("show_node", "allocation"),
    [
        (described("n2", "gpu:4") + described("n1", "(null)"), ["n1 10.0.0.1 (null)", "n2 10.0.0.2 gpu:4"]),
        (described("n1", "gpu:2(S:0)"), ["n1 10.0.0.1 gpu:2(S:0)", "n2 n2 gpu:unknown"]),
        ("echo 'slurm_load_node error' >&2; exit 1", ["n1 n1 gpu:unknown", "n2 n2 gpu:unknown"]),
    ],
    ids=["all", "one", "none"],
)
def test_a_node_that_slurm_does_not_describe_goes_by_its_name_and_may_have_gpus(
    show_node: str, allocation: list[str], shell: Shell, tmp_path: Path
) -> None:
    done = shell(SETTLED, scontrol=f"{NAMES}\n{show_node}\nfi")
    assert (done.returncode, done.stdout.splitlines()) == (0, allocation), done
    assert sorted(path.name for path in (tmp_path / "work/qlora-17").iterdir()) == ["allocation"]


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_notice_that_comes_before_the_job_has_a_folder_reaches_the_ranks_all_the_same(
    name: str, shell: Shell
) -> None:
    scontrol = f"{NAMES}\n{described('n1', 'gpu:1')}\nfi"
    done = shell(f"kill -{name} $$\n{SETTLED}\nkill -{name} $$", scontrol=scontrol)
    assert done.returncode == 0, done
    assert done.stdout.count("SLURM gives notice: the run is asked to save and end") == 1
    assert done.stdout.splitlines()[-1] == "warned"
    again = shell(SETTLED, scontrol=scontrol)
    assert "warned" not in again.stdout, "the notice was for the start before"


@pytest.mark.parametrize("seconds", ["soon", "5", "1.5"])
def test_a_time_for_the_check_that_is_none_is_refused(seconds: str, shell: Shell) -> None:
    done = shell(f"QLORA_PREFLIGHT_S={seconds}; preflight run.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"QLORA_PREFLIGHT_S is {seconds}, expected whole seconds, 10 or more\n"
