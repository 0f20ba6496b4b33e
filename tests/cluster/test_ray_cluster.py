"""Runs on a real Ray cluster of two nodes: the losses of one process, whatever dies."""

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Result

from tests.cluster.ray_cluster import BIN, RayCluster, ray_cluster
from tests.cluster.ray_secrets import ask, told
from tests.conftest import losses, metrics, qlora
from tests.s3 import BUCKET, S3, SECRET

RunFile = Callable[..., Path]
STEPS = 120
EVERY = "checkpoint.every_steps=4"


@pytest.fixture(scope="module")
def whole(run_of: RunFile) -> list[float]:
    """Losses of one process that nobody disturbs."""
    config = run_of("alone", max_steps=STEPS)
    done = qlora("train", config)
    assert done.returncode == 0, done.stderr
    return losses(config.with_suffix(""))


@pytest.fixture(scope="module")
def cluster(s3_server: S3) -> Iterator[RayCluster]:
    """Two nodes, which have the keys of the storage in their environment."""
    with TemporaryDirectory(prefix="q") as folder, ray_cluster(Path(folder), 2, s3_server.env) as up:
        yield up


@pytest.fixture(autouse=True)
def nothing_left(cluster: RayCluster) -> Iterator[None]:
    """No run of one test takes the workers of the next."""
    yield
    for driver in cluster.pids("train --on ray"):
        os.kill(driver, signal.SIGKILL)
    wait_for(cluster, lambda: not cluster.pids("-m job train"))


def submit(cluster: RayCluster, config: Path, *words: str) -> str:
    """Hand a run to the cluster; the job's id."""
    done = cluster.qlora("submit", "ray", config, *words)
    assert done.returncode == 0, done
    return done.stdout.split()[1]


def wait_for(cluster: RayCluster, what: Callable[[], Any], timeout_s: float = 120) -> Any:
    """Until it is true; what it gave."""
    end = time.monotonic() + timeout_s
    while not (found := what()):
        if time.monotonic() > end:
            jobs = cluster.qlora("status", "--on", "ray").stdout
            number = re.search(r"job (\S+): ", jobs)
            logs = cluster.qlora("logs", "--on", "ray", "--job", number[1]).stdout if number else ""
            raise AssertionError(f"{jobs}\n{logs[-6000:]}")
        time.sleep(0.05)
    return found


def newest_step(config: Path) -> int:
    """The step of the last row of metrics; 0 without any."""
    out = config.with_suffix("")
    return max((int(row["step"]) for row in metrics(out)), default=0) if (out / "metrics.jsonl").exists() else 0


def rank(cluster: RayCluster, number: int) -> int:
    """The process of a rank."""
    (found,) = [
        pid
        for pid in cluster.pids("-m job train")
        if f"\0RANK={number}\0" in Path(f"/proc/{pid}/environ").read_text(errors="replace")
    ]
    return found


def followed(cluster: RayCluster, config: Path, *words: str) -> tuple[int, str]:
    """Exit code and words of `logs -f`."""
    done = cluster.qlora("logs", config, *words, "--on", "ray", "-f")
    return done.returncode, done.stdout + done.stderr


def test_ray_job_submit_runs_the_installed_package_and_a_killed_rank_loses_nothing(
    run_of: RunFile, whole: list[float], cluster: RayCluster, tmp_path: Path, s3: S3
) -> None:
    config = run_of("ray", max_steps=STEPS)
    (tmp_path / "run.yaml").write_text(config.read_text())
    (tmp_path / "job").mkdir()
    (tmp_path / "job/__init__.py").write_text("raise RuntimeError('this is not the image')\n")
    out = f"{BUCKET}/ray"
    there = [f"output.url=s3://{out}", EVERY, *(f"storage.{name}={value}" for name, value in s3.storage.items())]
    sent = cluster.run(
        *(BIN / "ray", "job", "submit", "--no-wait", "--submission-id", "plain", "--working-dir", tmp_path, "--"),
        *("qlora", "train", "--on", "ray", "run.yaml", *there),
    )
    assert sent.returncode == 0, sent
    wait_for(cluster, lambda: [path for path in s3.fs().find(f"{out}/checkpoints") if path.endswith("manifest.json")])
    os.kill(rank(cluster, 1), signal.SIGKILL)
    code, said = followed(cluster, config, *there)
    assert code == 0 and "going on after step" in said and "2 workers of 1 CPU on Ray" in said, said[-5000:]
    assert "job plain: SUCCEEDED" in cluster.qlora("status", config, *there, "--on", "ray").stdout
    rows = [json.loads(line) for line in s3.fs().cat_file(f"{out}/metrics.jsonl").splitlines()]
    trained = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(trained.values()) == pytest.approx(whole, rel=1e-5)
    assert s3.fs().size(f"{out}/adapter/adapter_model.safetensors") > 10_000
    (experiment,) = s3.fs().ls(f"{out}/ray", detail=False)
    result = Result.from_path(experiment, storage_filesystem=PyFileSystem(FSSpecHandler(s3.fs())))
    assert result.metrics["step"] == STEPS
    shown = [row for _, row in result.best_checkpoints if "loss" in row]  # of the last row it is only that all is saved
    assert shown and [row["loss"] for row in shown] == pytest.approx([trained[row["step"]] for row in shown], rel=1e-5)
    with result.checkpoint.as_directory() as folder:
        newest = json.loads(Path(folder, "checkpoint.json").read_text())
    assert newest == {"url": f"s3://{out}/checkpoints/step-{STEPS:08d}", "step": STEPS}
    assert s3.fs().exists(f"{newest['url']}/manifest.json")
    assert told(cluster, s3, out, SECRET) == []


def test_a_job_of_ray_job_submit_is_found_by_its_run_and_tells_no_secret_while_it_goes(
    run_of: RunFile, cluster: RayCluster, tmp_path: Path, s3: S3
) -> None:
    config = run_of("found", max_steps=100_000)
    (tmp_path / "run.yaml").write_text(config.read_text())
    out = f"{BUCKET}/found"
    there = [f"output.url=s3://{out}", EVERY, *(f"storage.{name}={value}" for name, value in s3.storage.items())]
    command = ("qlora", "train", "--on", "ray", "run.yaml", *there)
    sent = cluster.run(
        *(
            BIN / "ray",
            "job",
            "submit",
            "--no-wait",
            "--submission-id",
            "found",
            "--working-dir",
            tmp_path,
            "--",
            *command,
        )
    )
    assert sent.returncode == 0, sent
    twice = cluster.qlora("submit", "ray", config, *there)
    assert twice.returncode == 2 and re.search(rf"job found of s3://{out} is (PENDING|RUNNING) already", twice.stderr)
    wait_for(cluster, lambda: [path for path in s3.fs().find(f"{out}/checkpoints") if path.endswith("manifest.json")])
    assert told(cluster, s3, out, SECRET) == []
    assert "job found: RUNNING" in cluster.qlora("status", "--on", "ray").stdout
    assert "job found was asked to save" in cluster.qlora("cancel", config, *there, "--on", "ray").stdout
    code, said = followed(cluster, config, *there)
    assert code == 1 and "interrupted (a stop key)" in said and "job found: FAILED" in said, said[-3000:]


def test_a_folder_goes_without_its_env_files_and_is_sent_by_whoever_has_no_keys(
    run_of: RunFile, cluster: RayCluster, tmp_path: Path, s3: S3
) -> None:
    (tmp_path / "run.yaml").write_text(run_of("folder").read_text())
    (tmp_path / "more").mkdir()
    for name in (".env", ".env.local", "more/.env", "more/rows.txt"):
        (tmp_path / name).write_text("HF_TOKEN=planted-in-a-file\n" if "env" in name else "rows\n")
    out = f"{BUCKET}/folder"
    there = [f"output.url=s3://{out}", *(f"storage.{name}={value}" for name, value in s3.storage.items())]
    no_keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": "/none"}
    words = ("submit", "ray", tmp_path / "run.yaml", *there, "--working-dir", tmp_path)
    sent = cluster.qlora(*words, **no_keys)
    assert sent.returncode == 0, sent
    assert f"Warning: output.url: s3://{out}: no keys" in sent.stderr
    assert "It was not looked into: the cluster does that, with keys of its own" in sent.stderr
    verbs = [shlex.split(line) for line in sent.stdout.splitlines()[1:]]
    assert [verb[:2] for verb in verbs] == [["qlora", "status"], ["qlora", "logs"], ["qlora", "cancel"]]
    done = cluster.qlora(*verbs[1][1:])
    assert done.returncode == 0, done
    unpacked = [path.name for path in cluster.folder.rglob("working_dir_files/*/*") if "metrics" not in path.name]
    assert "run.yaml" in unpacked and "more" in unpacked
    assert told(cluster, s3, out, SECRET, "planted-in-a-file") == []


def test_after_the_death_of_a_worker_a_node_and_the_driver_the_losses_are_the_same(
    run_of: RunFile, whole: list[float], cluster: RayCluster
) -> None:
    config = run_of("deaths", max_steps=STEPS)
    first = submit(cluster, config, EVERY)
    wait_for(cluster, lambda: newest_step(config) >= 6)
    os.kill(cluster.pids("ray::", "RayTrainWorker")[0], signal.SIGKILL)
    reached = newest_step(config) + 6
    wait_for(cluster, lambda: newest_step(config) >= reached)
    cluster.kill(len(cluster.nodes) - 1)
    reached = newest_step(config) + 6
    cluster.add_node()
    wait_for(cluster, lambda: newest_step(config) >= reached)
    for driver in cluster.pids("qlora train --on ray"):
        os.kill(driver, signal.SIGKILL)
    wait_for(cluster, lambda: not cluster.pids("-m job train"))
    assert f"job {first}: FAILED" in cluster.qlora("status", config, "--on", "ray").stdout
    assert newest_step(config) < STEPS, "it did not end by itself"
    submit(cluster, config, EVERY)
    code, said = followed(cluster, config, EVERY)
    assert code == 0 and "going on after step" in said, said[-5000:]
    assert losses(config.with_suffix("")) == pytest.approx(whole, rel=1e-5)
    again = cluster.qlora("train", "--on", "ray", config, EVERY)
    assert again.returncode == 0 and f"finished already ({STEPS} steps)" in again.stderr


def test_a_run_is_watched_and_asked_to_stop(run_of: RunFile, cluster: RayCluster) -> None:
    config = run_of("stopped", max_steps=100_000)
    job = submit(cluster, config)
    assert "is PENDING already" in (refused := cluster.qlora("submit", "ray", config)).stderr or (
        "is RUNNING already" in refused.stderr
    ), refused
    wait_for(cluster, lambda: newest_step(config) >= 3)
    said = cluster.qlora("status", config, "--on", "ray").stdout
    assert re.search(r"running, step \d+ of 100000, loss", said) and f"job {job}: RUNNING" in said
    (row,) = json.loads(cluster.qlora("status", config, "--on", "ray", "--json").stdout)
    assert row["run"]["status"]["state"] == "running" and row["job"]["submission_id"] == job
    shown = json.loads(ask(cluster, "train/v2/runs/v1"))["train_runs"]
    assert any(run["name"].startswith("stopped-") and run["status"] == "RUNNING" for run in shown), shown
    wait_for(cluster, lambda: cluster.charted("step", str(config.with_suffix(""))) >= 3)
    assert cluster.charted("loss", str(config.with_suffix(""))) > 0
    assert "was asked to save and stop" in cluster.qlora("cancel", config, "--on", "ray").stdout
    code, said = followed(cluster, config)
    assert code == 1 and "interrupted (a stop key)" in said, said[-3000:]
    assert "nothing to cancel" in (done := cluster.qlora("cancel", config, "--on", "ray")).stderr or (
        "waits or runs" in done.stderr
    )
    submit(cluster, config)
    wait_for(cluster, lambda: "RUNNING" in cluster.qlora("status", config, "--on", "ray").stdout)
    assert "is ended" in cluster.qlora("cancel", config, "--on", "ray", "--now").stdout
    wait_for(cluster, lambda: not cluster.pids("-m job train"))


def test_what_fails_for_a_reason_is_not_tried_again_and_wrong_input_starts_nothing(
    run_of: RunFile, cluster: RayCluster
) -> None:
    wild = cluster.qlora("train", "--on", "ray", run_of("wild"), "train.learning_rate=1e30", "train.max_steps=1000")
    said = wild.stdout + wild.stderr
    assert wild.returncode == 1 and "JobError" in said and "loss or gradients of" in said, said[-3000:]
    assert "what failed first, on " in said and said.count("[State Transition] RESTARTING") == 0
    config = run_of("foreign")
    config.with_suffix("").mkdir()
    (config.with_suffix("") / "thesis.tex").touch()
    wrong = cluster.qlora("train", "--on", "ray", config)
    assert wrong.returncode == 2 and "holds files that are no run (thesis.tex)" in wrong.stderr
    assert "Ray" not in wrong.stderr, "nothing was asked of the cluster"


def test_workers_that_never_come_end_in_a_sentence(run_of: RunFile, cluster: RayCluster) -> None:
    config = run_of("too-many")
    done = cluster.qlora("train", "--on", "ray", config, "--nodes", "3", "--wait-minutes", "0.1")
    assert done.returncode == 1, done
    assert "3 workers of 1 CPU could not be placed within 0.1 min. The cluster has " in done.stderr
    assert "Ask for fewer (--nodes, --gpus-per-node), end other jobs, or wait longer" in done.stderr
    assert not (config.with_suffix("") / "status.json").exists()


def test_a_lost_node_in_whose_place_none_comes_ends_in_a_sentence_after_one_wait(
    run_of: RunFile, cluster: RayCluster
) -> None:
    config = run_of("no-other", max_steps=100_000)
    job = submit(cluster, config, EVERY, "--wait-minutes", "0.4")
    wait_for(cluster, lambda: newest_step(config) >= 6)
    cluster.kill(len(cluster.nodes) - 1)
    try:
        code, said = followed(cluster, config, EVERY)
    finally:
        cluster.add_node()
    assert code == 1 and f"job {job}: FAILED" in said, said[-5000:]
    assert "JobError" in said and "2 workers of 1 CPU could not be placed within 0.4 min. The cluster has " in said
    assert "the workers are started again" not in said and "what failed first" not in said, said[-5000:]
    (row,) = json.loads(cluster.qlora("status", config, "--on", "ray", "--json").stdout)
    assert row["run"]["status"]["state"] == "failed" and "could not be placed" in row["run"]["status"]["reason"]


def test_a_server_that_is_not_there_or_refuses_is_said(run_of: RunFile, cluster: RayCluster) -> None:
    config = run_of("nowhere")
    done = cluster.qlora("submit", "ray", config, "--address", "http://127.0.0.1:9")
    assert done.returncode == 2 and "no Ray job server answers at http://127.0.0.1:9" in done.stderr, done
    done = cluster.qlora("submit", "ray", config, RAY_AUTH_TOKEN="f" * 64)
    assert done.returncode == 2 and "refuses you. Set RAY_AUTH_MODE=token" in done.stderr, done
    assert "f" * 64 not in done.stderr
    missing = cluster.qlora("train", "--on", "ray", config, RAY_ADDRESS="127.0.0.1:9")
    assert missing.returncode == 2 and "no Ray cluster can be joined from here" in missing.stderr, missing
    bare = cluster.qlora("train", "--on", "ray", config, RAY_ADDRESS=":20034")
    assert bare.returncode == 2 and "no Ray cluster can be joined from here (Malformed host: )" in bare.stderr, bare
    open_door = cluster.qlora("train", "--on", "ray", config, RAY_AUTH_TOKEN="", HOME="/none")
    assert open_door.returncode == 2 and "joined from here (Token authentication is enabled" in open_door.stderr
    assert "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in open_door.stderr, open_door
