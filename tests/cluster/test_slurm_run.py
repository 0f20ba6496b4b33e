"""The batch scripts on a real SLURM: the losses of one process, in every way in which ranks are started."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.batch import ENDLESS, ENV, SINGLE, SWEEP, TWO_RANKS, ZERO3, Batch, env_of, status
from tests.cluster.reach import reachable
from tests.cluster.slurm import Cluster, slurm
from tests.conftest import REPOSITORY, losses, qlora
from tests.s3 import BUCKET, S3, SECRET

RunFile = Callable[..., Path]


@pytest.fixture(scope="module")
def expected(run_of: RunFile) -> list[float]:
    """Losses of one process."""
    config = run_of("alone")
    done = qlora("train", config)
    assert done.returncode == 0, done.stderr
    return losses(config.with_suffix(""))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes without GPUs."""
    with slurm(tmp_path_factory.mktemp("slurm"), {"n1": 0, "n2": 0}) as running:
        yield running


def test_two_nodes_of_two_ranks_have_the_losses_of_one_process_and_write_to_s3(
    run_of: RunFile, expected: list[float], cluster: Cluster, tmp_path: Path, s3: S3
) -> None:
    config = run_of("slurm")
    with reachable(s3, cluster.controller) as seen:
        there = [f"output.url=s3://{BUCKET}/slurm", *(f"storage.{key}={value}" for key, value in seen.storage.items())]
        words = ZERO3, config, TWO_RANKS, *there
        batch = Batch(cluster, tmp_path / "work", *words, QLORA_PREFLIGHT="full", **s3.env)
        assert batch.ended() == "COMPLETED", batch.said()
        again = Batch(cluster, tmp_path / "work", *words, **s3.env)
        assert again.ended() == "COMPLETED" and "finished already (4 steps)" in again.said()
    assert not (again.folder / "hostfile").exists(), "no node was asked for anything"
    rows = s3.fs().cat_file(f"{BUCKET}/slurm/metrics.jsonl").splitlines()
    found = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    assert found == pytest.approx(expected, rel=1e-5)
    assert s3.fs().size(f"{BUCKET}/slurm/adapter/adapter_model.safetensors") > 10_000
    assert (batch.folder / "hostfile").read_text() == "n1 slots=2\nn2 slots=2\n"
    first, second = ((batch.folder / f"{name}.log").read_text() for name in ("n1", "n2"))
    assert {line.partition(" ")[0] for line in second.splitlines()} <= {"[2]", "[3]"}
    assert "all-reduce" in first and "4 x 2 CPU cores, zero3" in first
    assert SECRET not in batch.said() + (batch.folder / "job.json").read_text()


def test_two_jobs_at_once_share_nodes_but_neither_gpus_nor_ports(run_of: RunFile, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm", {"n1": 4, "n2": 4}, kill_wait_s=60) as cluster:
        configs = [run_of(name) for name in ("one", "other")]
        env = {"QLORA_PREFLIGHT": "off"}  # these GPUs are no GPUs
        jobs = [
            Batch(cluster, tmp_path / "work", "--gpus-per-node=1", ZERO3, config, ENDLESS, **env) for config in configs
        ]
        for job in jobs:
            job.wait_for("step 2/")
        ranks = [env_of(pid) for host in cluster.hosts.values() for pid in host.python_processes()]
        by_job = {job.id: [found for found in ranks if found.get("SLURM_JOB_ID") == str(job.id)] for job in jobs}
        assert [len(found) for found in by_job.values()] == [2, 2]
        seen = [{(found["CUDA_VISIBLE_DEVICES"], found["MASTER_PORT"]) for found in own} for own in by_job.values()]
        assert [len(pairs) for pairs in seen] == [1, 1], "each job has the same GPU on both nodes"
        (one, one_port), (other, other_port) = (next(iter(pairs)) for pairs in seen)
        assert {one, other} == {"0", "1"} and one_port != other_port
        assert [(job.folder / "hostfile").read_text() for job in jobs] == ["n1 slots=1\nn2 slots=1\n"] * 2
        assert all("torch sees 0 of the 1 GPUs" in job.said() for job in jobs)
        for job in jobs:
            cluster.command("scancel", str(job.id))
        assert [job.ended() for job in jobs] == ["CANCELLED"] * 2
        # SLURM's own TERM to every process of the job: what the ranks saved is whole
        assert [(status(config)["state"], status(config)["reason"]) for config in configs] == [
            ("interrupted", "SIGTERM")
        ] * 2
        assert all(status(config)["checkpoint"] == status(config)["step"] > 0 for config in configs)


def test_over_ssh_the_losses_are_the_same_and_secrets_stay_off_command_lines(
    run_of: RunFile, expected: list[float], cluster: Cluster, tmp_path: Path
) -> None:
    config = run_of("pdsh")
    # deepspeed itself would write the second and what is in this file into command lines
    env = {"QLORA_LAUNCHER": "pdsh", "QLORA_PREFLIGHT": "full"}
    env |= {"HF_TOKEN": "hf_a-secret-word", "MLFLOW_TRACKING_TOKEN": "ml_a-secret-word"}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/.deepspeed_env").write_text("WANDB_API_KEY=wb_a-secret-word\n")
    batch = Batch(cluster, tmp_path / "work", ZERO3, config, "train.max_steps=4", **env)
    lines, seen = set[str](), set[str | None]()
    while cluster.state(batch.id) in ("PENDING", "RUNNING"):
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                lines.add(" ".join(process.cmdline()))
        ranks = [env_of(pid) for host in cluster.hosts.values() for pid in host.python_processes()]
        seen |= {
            found.get(name) for found in ranks if "RANK" in found for name in ("HF_TOKEN", "MLFLOW_TRACKING_TOKEN")
        }
    assert batch.ended() == "COMPLETED", batch.said()
    assert losses(config.with_suffix("")) == pytest.approx(expected, rel=1e-5)
    assert any("pdsh -S" in line for line in lines) and not any("a-secret-word" in line for line in lines)
    assert {"hf_a-secret-word", "ml_a-secret-word"} <= seen, "the ranks have them in their environment"
    assert not (batch.folder / "environment.json").exists()
    assert {line[:3] for line in (batch.folder / "n2.log").read_text().splitlines()} == {"[1]"}
    assert "a-secret-word" not in batch.said()


def test_a_sweep_leaves_an_adapter_a_line(run_of: RunFile, cluster: Cluster, tmp_path: Path) -> None:
    config = run_of("sweep")
    work = tmp_path / "work"
    work.mkdir()
    (work / "sweep").write_text("# rank\nlora.rank=2 lora.alpha=4\n\nlora.rank=8\n")
    batch = Batch(cluster, work, "--array=1-3", SWEEP, config, "sweep", "train.max_steps=2")
    cluster.until(lambda: cluster.command("squeue", "--noheader").stdout == "", 120)
    states = {task: cluster.field(f"{batch.id}_{task}", "JobState") for task in (1, 2, 3)}  # type: ignore[arg-type]
    assert states == {1: "COMPLETED", 2: "COMPLETED", 3: "FAILED"}, batch.said()
    adapters = [config.with_suffix("") / str(task) / "adapter/adapter_config.json" for task in (1, 2)]
    assert [json.loads(path.read_text())["r"] for path in adapters] == [2, 8]
    refused = (work / f"qlora-{batch.id}_3.log").read_text()
    assert "sweep has 2 lines of settings, and this is task 3: sbatch --array=1-2" in refused


def test_an_image_wraps_every_command_of_ours(run_of: RunFile, cluster: Cluster, tmp_path: Path) -> None:
    """No image can be pulled here: a stand-in for Apptainer notes how it is called, and runs the command outside."""
    stand_in = tmp_path / "bin/apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nwhile [ "$1" != image.sif ]; do shift; done\nshift\nexec "$@"\n'
    )
    stand_in.chmod(0o755)
    config = run_of("image")
    env = {"QLORA_CONTAINER": "image.sif", "QLORA_CONTAINER_OPTIONS": "--bind /data", "QLORA_PYTHON": sys.executable}
    path = f"{stand_in.parent}:{ENV['PATH']}"
    batch = Batch(cluster, tmp_path / "work", ZERO3, config, **env, PATH=path)
    assert batch.ended() == "COMPLETED", batch.said()
    calls = (tmp_path / "calls").read_text().splitlines()
    bound = f"{tmp_path}/work,{REPOSITORY}"
    assert all(
        call.startswith(f"exec --nv --bind {bound} --bind /data image.sif {sys.executable} -m job") for call in calls
    )
    modules = [call.split(" -m ")[1].split()[0] for call in calls]
    assert modules.count("job") == 2 and modules.count("job.launch.slurm.node") == 2, "on each node"


def test_pyxis_gets_the_image_in_every_step(run_of: RunFile, cluster: Cluster, tmp_path: Path) -> None:
    """It is a plugin that is not here: a stand-in for srun notes its options, and leaves them out."""
    real = shutil.which("srun")
    stand_in = tmp_path / "bin/srun"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\nwords=()\n'
        f'for word; do [[ $word == --container-* ]] || words+=("$word"); done\nexec {real} "${{words[@]}}"\n'
    )
    stand_in.chmod(0o755)
    env = {"QLORA_CONTAINER": "team/image", "QLORA_CONTAINER_RUNTIME": "pyxis", "QLORA_PYTHON": sys.executable}
    path = f"{stand_in.parent}:{ENV['PATH']}"
    batch = Batch(cluster, tmp_path / "work", "--cpus-per-task=1", ZERO3, run_of("pyxis"), **env, PATH=path)
    assert batch.ended() == "COMPLETED", batch.said()
    work = tmp_path / "work"
    options = f"--container-image=team/image --container-mounts={work}:{work},{REPOSITORY}:{REPOSITORY}"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 5, "open, the nodes' reports, their judgement, the run, its close"
    assert all(f"{options} --container-workdir={work} " in call for call in calls), calls
    assert all("--cpus-per-task=1 " in call for call in calls), "srun takes it over from no job by itself"


def test_nodes_with_unequal_gpus_get_as_many_ranks(run_of: RunFile, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm", {"n1": 1, "n2": 3}) as cluster:
        config = run_of("unequal")
        words = ("--gpus=3", ZERO3, config, "train.global_batch_size=6")
        batch = Batch(cluster, tmp_path / "work", *words, QLORA_PREFLIGHT="off")  # these GPUs are no GPUs
        assert batch.ended() == "COMPLETED", batch.said()
    assert (batch.folder / "hostfile").read_text() == "n1 slots=1\nn2 slots=2\n"
    assert {line[:3] for line in (batch.folder / "n2.log").read_text().splitlines()} == {"[1]", "[2]"}
    alone = run_of("unequal-alone")
    done = qlora("train", alone, "train.global_batch_size=6")
    assert done.returncode == 0, done.stderr
    assert losses(config.with_suffix("")) == pytest.approx(losses(alone.with_suffix("")), rel=1e-5)


def test_what_is_wrong_is_said_before_a_node_does_anything(run_of: RunFile, cluster: Cluster, tmp_path: Path) -> None:
    config = run_of("wrong")
    work = tmp_path / "work"
    storage = ("output.url=s3://bucket/x", "storage.endpoint=http://10.0.0.77:9", "storage.retry_minutes=0")
    wrong = {
        "cannot be read: No such file": Batch(cluster, work, SINGLE, "missing.yaml"),
        "lora.rnak": Batch(cluster, work, SINGLE, config, "lora.rnak=3"),
        "s3://bucket/x": Batch(cluster, work, SINGLE, config, *storage),
        "QLORA_LAUNCHER is mpi": Batch(cluster, work, SINGLE, config, QLORA_LAUNCHER="mpi"),
        "QLORA_SITE: there is no file": Batch(cluster, work, SINGLE, config, QLORA_SITE="/nowhere/site.sh"),
        "There is no /nowhere/bin/python. Set QLORA_VENV": Batch(cluster, work, SINGLE, config, QLORA_VENV="/nowhere"),
    }
    for sentence, batch in wrong.items():
        assert batch.code() == 2, batch.said()
        assert sentence in batch.said() and "Traceback" not in batch.said(), batch.said()
        assert cluster.restarts(batch.id) == 0 and not list(batch.folder.glob("facts.*"))
    assert not config.with_suffix("").exists(), "nothing half-written"
    odd = Batch(cluster, tmp_path / "a b", SINGLE, config, QLORA_LAUNCHER="pdsh")
    assert odd.code() == 2 and "QLORA_LAUNCHER=pdsh cannot start in" in odd.said()
    assert "invalid partition" in cluster.refused("--partition=nowhere", SINGLE, config)


def test_the_site_says_partition_and_environment_once(run_of: RunFile, cluster: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    # as sbatch sets it after SBATCH_CPUS_PER_GPU, and as files of modules look at what may not be set
    site.write_text(
        "export SBATCH_PARTITION=short QLORA_PREFLIGHT=off SLURM_CPUS_PER_GPU=2\n"
        "export LD_LIBRARY_PATH=/nowhere:$NOT_SET_ANYWHERE\n"
    )
    done = cluster.command("bash", "-c", f'. {site}; echo "$SBATCH_PARTITION"')
    env = {"QLORA_SITE": str(site), "SBATCH_PARTITION": done.stdout.strip()}
    batch = Batch(cluster, tmp_path / "work", SINGLE, run_of("site"), "train.max_steps=1", **env)
    assert batch.ended() == "COMPLETED", batch.said()
    assert cluster.field(batch.id, "Partition") == "short"


def test_a_bad_node_is_named_or_left_out(run_of: RunFile, cluster: Cluster, tmp_path: Path) -> None:
    config = run_of("bad-node")
    rows = config.parent / "rows-of-n1"
    rows.mkdir()
    (rows / "rows.jsonl").write_bytes((config.parent / "rows.jsonl").read_bytes())
    hidden = subprocess.run(cluster.hosts["n2"].command("mount", "-t", "tmpfs", "tmpfs", rows))
    assert hidden.returncode == 0
    words = (ZERO3, config, f"data.train={rows}/rows.jsonl", "train.max_steps=2")
    stopped = Batch(cluster, tmp_path / "work", *words)
    assert stopped.code() == 1 and "JobError: n2: see above" in stopped.said(), stopped.said()
    assert f"n2: data.train: {rows}" in stopped.said() and not (config.with_suffix("") / "status.json").exists()
    smaller = Batch(cluster, tmp_path / "work", *words, QLORA_LEAVE_OUT="1")
    assert smaller.ended() == "COMPLETED" and "left out: n2" in smaller.said(), smaller.said()
    assert (smaller.folder / "hostfile").read_text() == "n1 slots=1\n"


def test_over_ssh_the_first_node_can_be_left_out_too(run_of: RunFile, cluster: Cluster, tmp_path: Path) -> None:
    """The batch script and deepspeed's runner stay on it; the rank is on the other."""
    config = run_of("bad-first")
    rows = config.parent / "rows-of-n2"
    rows.mkdir()
    (rows / "rows.jsonl").write_bytes((config.parent / "rows.jsonl").read_bytes())
    assert subprocess.run(cluster.hosts["n1"].command("mount", "-t", "tmpfs", "tmpfs", rows)).returncode == 0
    words = (ZERO3, config, f"data.train={rows}/rows.jsonl", "train.max_steps=2")
    batch = Batch(cluster, tmp_path / "work", *words, QLORA_LAUNCHER="pdsh", QLORA_LEAVE_OUT="1")
    assert batch.ended() == "COMPLETED" and "left out: n1" in batch.said(), batch.said()
    assert (batch.folder / "hostfile").read_text() == "n2 slots=1\n"
    assert "step 2" in (batch.folder / "n2.log").read_text() and not (batch.folder / "n1.log").exists()
