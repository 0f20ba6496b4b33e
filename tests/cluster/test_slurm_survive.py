"""What SLURM does to a job costs no work: notice before the end, a lost node, a failure that is real."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.batch import ENDLESS, SINGLE, ZERO3, Batch, crawl, is_rank, status, stuck
from tests.cluster.slurm import Cluster, slurm
from tests.conftest import losses, metrics, qlora

RunFile = Callable[..., Path]
SHORT_GRACE = "train.stop_grace_s=5"
STEPS = 60


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes, and one to spare."""
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm", {"n1": 0, "n2": 0, "n3": 0}) as running:
        yield running


@pytest.fixture(scope="module")
def whole(run_of: RunFile) -> list[float]:
    """Losses of one process that nothing happens to."""
    config = run_of("whole", max_steps=STEPS)
    done = qlora("train", config)
    assert done.returncode == 0, done.stderr
    return losses(config.with_suffix(""))


def check_whole(config: Path, whole: list[float]) -> None:
    """The run is as if nothing had happened: each step once, with its loss."""
    out = config.with_suffix("")
    assert [row["step"] for row in metrics(out)] == list(range(1, STEPS + 1))
    assert losses(out) == pytest.approx(whole, rel=1e-5)
    assert status(config)["state"] == "finished"


def ranks_on(cluster: Cluster, *names: str) -> list[int]:
    """The processes that train there."""
    return [pid for name in names for pid in cluster.hosts[name].python_processes() if is_rank(pid)]


def test_a_start_that_the_time_limit_ends_is_followed_by_one_that_finishes_even_when_nothing_could_be_saved(
    run_of: RunFile, whole: list[float], cluster: Cluster, tmp_path: Path
) -> None:
    """SLURM looks at the time every 30 s: the limits are lowered when the ranks are where they should be by then."""

    def limit(batch: Batch, minutes: int) -> None:
        assert cluster.command("scontrol", "update", f"JobId={batch.id}", f"TimeLimit={minutes}").returncode == 0

    def says(path: Path) -> str:
        return cluster.command(sys.executable, "-m", "job", "status", path, cwd=tmp_path / "work").stdout

    config, hangs = (run_of(name, max_steps=STEPS) for name in ("limited", "hangs"))
    words = ("--time=20", "--signal=B:USR1@1", "--nodelist=n3", SINGLE, hangs, "checkpoint.every_steps=2")
    late = Batch(cluster, tmp_path / "work", *words)
    late.wait_for("step 5/60")
    cluster.until(lambda: status(hangs)["checkpoint"] >= 4)
    (rank,) = ranks_on(cluster, "n3")
    with stuck(rank):
        limit(late, 1)
        warned = ("--time=20", "--signal=B:USR1@170", "--nodelist=n1,n2", ZERO3, config, SHORT_GRACE)
        limited = Batch(cluster, tmp_path / "work", *warned)
        limited.wait_for("step 5/60")
        limit(limited, 3)
        crawl(ranks_on(cluster, "n1", "n2"), lambda: "SLURM gives notice" in limited.said())
        limited.wait_for("start again: requeued")
        before = status(config)
        assert (before["state"], before["reason"]) == ("interrupted", "the scheduler's warning"), limited.said()
        assert STEPS > before["checkpoint"] == before["step"] > 4
        assert f"interrupted (the scheduler's warning), step {before['step']}" in (said := says(config)), said
        limit(limited, 20)
        cluster.hurry(limited.id)
        assert late.ended() == "TIMEOUT", late.said()
    saved = status(hangs)
    assert saved["state"] == "running" and saved["checkpoint"] >= 4
    said = says(hangs)
    assert f"job {late.id}: TIMEOUT (TimeLimit) on n3" in said and "its processes were lost" in said, said
    assert f"newest checkpoint: step {saved['checkpoint']}" in said
    again = Batch(cluster, tmp_path / "work", *words)
    for batch, path in ((limited, config), (again, hangs)):
        assert batch.ended() == "COMPLETED" and "going on after step" in batch.said(), batch.said()
        check_whole(path, whole)
        assert "finished" in (said := says(path)) and f"job {batch.id}: COMPLETED" in said, said
    assert (cluster.restarts(limited.id), cluster.restarts(late.id)) == (1, 0)


@pytest.mark.parametrize(("lost", "others"), [("n2", ("n1", "n3")), ("n1", ("n2", "n3"))], ids=["other", "first"])
def test_a_lost_node_costs_what_came_after_the_last_checkpoint(
    run_of: RunFile, whole: list[float], cluster: Cluster, tmp_path: Path, lost: str, others: tuple[str, str]
) -> None:
    config = run_of(f"lost-{lost}", max_steps=STEPS)
    batch = Batch(cluster, tmp_path / "work", ZERO3, config, "checkpoint.every_steps=2")
    batch.wait_for("step 10/60")
    cluster.hosts[lost].kill()
    cluster.hurry(batch.id)
    assert batch.ended() == "COMPLETED", batch.said()
    assert cluster.restarts(batch.id) == 1 and "going on after step" in batch.said()
    assert (batch.folder / "hostfile").read_text() == "".join(f"{name} slots=1\n" for name in others)
    check_whole(config, whole)


def test_a_run_that_fails_is_not_requeued_and_one_that_was_preempted_is(
    run_of: RunFile, whole: list[float], cluster: Cluster, tmp_path: Path
) -> None:
    wild = Batch(cluster, tmp_path / "wild", SINGLE, run_of("wild"), "train.learning_rate=1e30", ENDLESS)
    config = run_of("asked", max_steps=STEPS)
    asked = Batch(cluster, tmp_path / "asked", SINGLE, config, SHORT_GRACE)
    asked.wait_for("step 5/60")
    cluster.command("scancel", "--batch", "--signal=USR1", str(asked.id))
    asked.wait_for("start again: requeued")
    assert wild.ended() == "FAILED" and cluster.restarts(wild.id) == 0
    said = (wild.place / f"qlora-{wild.id}.log").read_text()
    assert cluster.exit_code(wild.id) == 1 and "what failed first, on n" in said, said
    assert "[0] JobError: loss or gradients of 10 steps" in said
    cluster.hurry(asked.id)
    assert asked.ended() == "COMPLETED", asked.said()
    check_whole(config, whole)


def test_a_killed_rank_is_lost_work_of_one_start_and_a_stop_key_is_the_users_wish(
    run_of: RunFile, cluster: Cluster, tmp_path: Path
) -> None:
    config = run_of("stopped")
    batch = Batch(cluster, tmp_path / "work", SINGLE, config, ENDLESS)
    batch.wait_for("step 5/")
    (config.with_suffix("") / "stop").touch()
    assert batch.ended() == "FAILED" and cluster.exit_code(batch.id) == 75, batch.said()
    assert cluster.restarts(batch.id) == 0 and status(config)["reason"] == "a stop key"
    batch = Batch(cluster, tmp_path / "work", "--nodelist=n1", SINGLE, config, ENDLESS)
    batch.wait_for("going on after step")
    (rank,) = [pid for pid in cluster.hosts["n1"].python_processes() if is_rank(pid)]
    os.kill(rank, signal.SIGKILL)
    batch.wait_for("start again: requeued")
    assert "its processes were lost" in batch.said() and status(config)["state"] == "running"
    cluster.hurry(batch.id)
    cluster.until(lambda: batch.said().count("going on after step") == 2)
    cluster.command("scancel", str(batch.id))
    assert batch.ended() == "CANCELLED"


def test_a_second_job_of_the_same_output_is_refused_and_the_first_one_goes_on(
    run_of: RunFile, cluster: Cluster, tmp_path: Path
) -> None:
    config = run_of("held")
    first = Batch(cluster, tmp_path / "work", "--nodelist=n1", SINGLE, config, ENDLESS, "checkpoint.every_steps=5")
    first.wait_for("step 5/")
    second = Batch(cluster, tmp_path / "work", "--nodelist=n2", SINGLE, config, ENDLESS, QLORA_PREFLIGHT="off")
    assert second.code() == 2 and cluster.restarts(second.id) == 0, second.said()[-3000:]
    assert "is in use by another run that is alive (host n1" in second.said()
    assert cluster.state(first.id) == "RUNNING" and status(config)["state"] == "running"
    cluster.command("scancel", str(first.id))
    assert first.ended() == "CANCELLED"


def test_a_job_of_higher_rank_takes_the_nodes_and_gives_them_back(
    run_of: RunFile, whole: list[float], tmp_path: Path
) -> None:
    partitions = "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=40\nPartitionName=high Nodes=ALL PriorityTier=9"
    preempting = f"PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n{partitions}"
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm", {"n1": 0}, cpus=2, more=preempting) as cluster:
        config = run_of("preempted", max_steps=STEPS)
        low = Batch(cluster, tmp_path / "work", "--partition=low", "--exclusive", SINGLE, config, SHORT_GRACE)
        low.wait_for("step 5/60")
        high = cluster.sbatch("--partition=high", "--exclusive", "--wrap=sleep 1", cwd=tmp_path)
        assert cluster.wait(high, timeout_s=90) == "COMPLETED"
        assert cluster.restarts(low.id) == 1, low.said()
        assert status(config)["state"] == "interrupted" and status(config)["checkpoint"] >= 5, low.said()
        cluster.hurry(low.id)
        assert low.ended() == "COMPLETED", low.said()
    check_whole(config, whole)


def test_a_rank_that_is_gone_on_another_node_is_started_again_unless_it_said_why(
    run_of: RunFile, cluster: Cluster, tmp_path: Path
) -> None:
    config = run_of("gone")
    batch = Batch(cluster, tmp_path / "work", ZERO3, config, ENDLESS, "checkpoint.every_steps=2")
    batch.wait_for("step 5/")
    cluster.until(lambda: status(config)["checkpoint"] >= 2)
    (rank,) = [pid for pid in cluster.hosts["n2"].python_processes() if is_rank(pid)]
    os.kill(rank, signal.SIGKILL)
    batch.wait_for("start again: requeued")
    cluster.hurry(batch.id)
    batch.wait_for("going on after step")
    cluster.command("scancel", str(batch.id))
    assert batch.ended() == "CANCELLED"
    faulty = run_of("faulty")
    wrapper = tmp_path / "fails_on_rank_1/sitecustomize.py"
    wrapper.parent.mkdir()
    wrapper.write_text(FAIL_ON_RANK_1)
    failing = Batch(cluster, tmp_path / "work", ZERO3, faulty, ENDLESS, PYTHONPATH=str(wrapper.parent))
    assert failing.code() == 1 and cluster.restarts(failing.id) == 0, failing.said()
    batch_log = (failing.place / f"qlora-{failing.id}.log").read_text()
    assert "what failed first, on n2:" in batch_log
    assert batch_log.endswith("[1] RuntimeError: the GPU has fallen off the bus\n")
    assert status(faulty)["state"] == "failed"


FAIL_ON_RANK_1 = """
import os, threading, time
if os.environ.get("RANK") == "1":
    def fail():
        import sys
        time.sleep(12)
        import job.engine
        def train_step(*given): raise RuntimeError("the GPU has fallen off the bus")
        job.engine.Engine.train_step = train_step
    threading.Thread(target=fail, daemon=True).start()
"""


def test_ranks_that_ssh_started_are_gone_before_their_job_starts_again(
    run_of: RunFile, cluster: Cluster, tmp_path: Path
) -> None:
    """Stuck ones, as in a collective, do not end when the connection does; and the folder is no pattern."""
    config = run_of("stuck")
    place = tmp_path / "c++"
    batch = Batch(cluster, place, ZERO3, config, ENDLESS, "checkpoint.every_steps=2", QLORA_LAUNCHER="pdsh")
    batch.wait_for("step 5/")
    hosts = [cluster.hosts[line.split()[0]] for line in (batch.folder / "hostfile").read_text().splitlines()]
    ranks = [pid for host in hosts for pid in host.python_processes() if is_rank(pid)]
    assert len(ranks) == 2
    (ssh,) = [
        process.pid
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"].startswith("pdsh") and str(batch.folder) in " ".join(process.info["cmdline"])
    ]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    os.kill(ssh, signal.SIGKILL)
    batch.wait_for("start again: requeued")
    assert not any(psutil.pid_exists(rank) and is_rank(rank) for rank in ranks)
    assert "unbound variable" not in batch.said()
    cluster.command("scancel", str(batch.id))
    assert batch.ended() == "CANCELLED"
