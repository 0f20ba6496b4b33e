"""The check at the start of a job on a real SLURM: it ends in its time whatever hangs, and says which node it was."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.batch import ZERO3, Batch, status
from tests.cluster.slurm import Cluster, slurm

RunFile = Callable[..., Path]
HANGS_ON_N2 = """
import os, sys, time
words = sys.orig_argv
if os.environ.get("SLURMD_NODENAME") == "n2" and "preflight" in words and "job" in words:
    if {first!r} in words:
        time.sleep(1000)
    if {second!r} in words:
        import torch.distributed as dist
        dist.all_reduce = lambda *given, **named: time.sleep(1000)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that have much to say: each has two hundred addresses."""
    with slurm(tmp_path_factory.mktemp("slurm"), {"n1": 0, "n2": 0}) as running:
        for number, host in enumerate(running.hosts.values()):
            lines = "".join(f"address add 10.{1 + number}.0.{last}/32 dev eth0\n" for last in range(1, 201))
            subprocess.run(host.command("ip", "-batch", "-"), input=lines, text=True, check=True)
        yield running


def hanging(folder: Path, report: bool) -> str:
    """A path for Python on which n2 hangs: in its report, or in every all-reduce of the check."""
    folder.mkdir()
    both = {"first": "--report", "second": "--none"} if report else {"first": "--none", "second": "--until"}
    (folder / "sitecustomize.py").write_text(HANGS_ON_N2.format(**both))
    return str(folder)


def test_a_node_whose_report_hangs_is_named_in_time(run_of: RunFile, cluster: Cluster, tmp_path: Path) -> None:
    config = run_of("silent")
    path = hanging(tmp_path / "path", report=True)
    batch = Batch(
        cluster, tmp_path / "work", ZERO3, config, QLORA_PREFLIGHT="full", QLORA_PREFLIGHT_S="24", PYTHONPATH=path
    )
    batch.wait_for("job ")
    begun = time.monotonic()
    assert batch.code() == 1 and time.monotonic() - begun < 60, batch.said()
    said = batch.said()
    assert "The check took more than 12 s, its part of QLORA_PREFLIGHT_S" in said, said
    assert "n2: did not report" in said and "JobError: n2: see above. Exclude with sbatch --exclude=n2" in said, said
    assert cluster.restarts(batch.id) == 0 and not (config.with_suffix("") / "status.json").exists()


def test_a_node_that_hangs_among_others_is_left_out_in_time_and_long_reports_stay_whole(
    run_of: RunFile, cluster: Cluster, tmp_path: Path
) -> None:
    config = run_of("lame")
    path = hanging(tmp_path / "path", report=False)
    env = {"QLORA_PREFLIGHT": "full", "QLORA_PREFLIGHT_S": "80", "QLORA_LEAVE_OUT": "1", "PYTHONPATH": path}
    batch = Batch(cluster, tmp_path / "work", ZERO3, config, **env)
    batch.wait_for("job ")
    begun = time.monotonic()
    batch.wait_for("starts on n1")
    assert time.monotonic() - begun < 90, "80 s, and a few to end what hangs"
    said = batch.said()
    assert "n2: the all-reduce of node n2 alone failed: no end within " in said and "left out: n2" in said, said
    reports = [(batch.folder / f"facts.{number}").read_text() for number in (0, 1)]
    assert all(len(report) > 4096 and report.count("\n") == 1 for report in reports), "one line each, however long"
    assert batch.ended() == "COMPLETED" and status(config)["state"] == "finished", batch.said()
    assert (batch.folder / "hostfile").read_text() == "n1 slots=1\n"
