"""What the other tests of SLURM here rely on: its jobs span nodes, share their GPUs, and outlive a lost node."""

from pathlib import Path

import pytest

from tests.cluster.hosts import alive
from tests.cluster.slurm import slurm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a cluster keeps its settings and logs."""
    path = tmp_path / "slurm"
    path.mkdir()
    return path


def test_a_job_spans_two_nodes(folder: Path, tmp_path: Path) -> None:
    with slurm(folder, {"n1": 0, "n2": 0}) as cluster:
        job = cluster.sbatch("--nodes=2", "--output=out", "--wrap=srun --label hostname; exit 3", cwd=tmp_path)
        assert cluster.wait(job) == "FAILED"
        assert cluster.exit_code(job) == 3
        assert sorted((tmp_path / "out").read_text().splitlines()) == ["0: n1", "1: n2"]
        assert "time limit" in cluster.refused("--partition=short", "--time=2:00:00", "--wrap=true")
        assert "configuration" in cluster.refused("--gpus-per-node=1", "--wrap=true")


def test_a_job_that_may_not_be_requeued_is_not(folder: Path, tmp_path: Path) -> None:
    with slurm(folder, {"n1": 0}) as cluster:
        job = cluster.sbatch("--no-requeue", "--output=out", "--wrap=scontrol requeue $SLURM_JOB_ID", cwd=tmp_path)
        assert cluster.wait(job) == "FAILED" and cluster.restarts(job) == 0
        assert "disabled" in (tmp_path / "out").read_text()


def test_jobs_side_by_side_have_other_gpus_of_a_node(folder: Path, tmp_path: Path) -> None:
    with slurm(folder, {"n1": 2}) as cluster:
        script = "--wrap=srun printenv CUDA_VISIBLE_DEVICES; sleep 60"
        options = ("--gpus-per-node=1", "--cpus-per-task=2", "--output=%j.out")
        jobs = [cluster.sbatch(*options, script, cwd=tmp_path) for _ in range(2)]
        assert [cluster.wait(job, {"RUNNING"}) for job in jobs] == ["RUNNING", "RUNNING"]
        outs = [tmp_path / f"{job}.out" for job in jobs]
        cluster.until(lambda: all(out.exists() and out.read_text() for out in outs))
        assert sorted(out.read_text() for out in outs) == ["0\n", "1\n"]
        assert cluster.command("scancel", *map(str, jobs)).returncode == 0
        assert [cluster.wait(job) for job in jobs] == ["CANCELLED", "CANCELLED"]


def test_a_lost_nodes_job_starts_again_on_another(folder: Path, tmp_path: Path) -> None:
    with slurm(folder, {"n1": 0, "n2": 0}) as cluster:
        out = tmp_path / "out"
        job = cluster.sbatch("--output=out", "--open-mode=append", "--wrap=hostname; sleep 100", cwd=tmp_path)
        cluster.until(lambda: out.exists() and out.read_text() == "n1\n")  # SLURM says RUNNING before the script does
        cluster.hosts["n1"].kill()
        cluster.hurry(job)
        assert cluster.node_state("n1") == "down*"
        cluster.until(lambda: out.read_text() == "n1\nn2\n")


def test_clusters_side_by_side_leave_nothing(folder: Path, tmp_path: Path) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    with slurm(folder, {"n1": 0}) as one, slurm(other_folder, {"n1": 0}) as other:
        pids = [host.pid for cluster in (one, other) for host in (*cluster.hosts.values(), cluster.controller)]
        one.sbatch("--wrap=sleep 60", cwd=tmp_path)
        assert one.command("squeue", "--noheader").stdout
        assert not other.command("squeue", "--noheader").stdout
    assert not any(alive(pid) for pid in pids)  # the kernel ends what a host runs before its first process
