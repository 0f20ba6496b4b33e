"""Ray Train with GPUs: a rank each, over NCCL, with the losses of plain `qlora train`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import REPOSITORY, alpaca_rows, losses, metrics, qlora, write_rows
from tests.ranks import free_port

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
RunFile = Callable[..., Path]
STEPS = 60
RAY = (sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of this machine alone, with all its GPUs and without a dashboard."""
    port = free_port()
    words = ("--head", f"--port={port}", "--include-dashboard=false", "--disable-usage-stats", "--block")
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with (
        TemporaryDirectory(prefix="q") as folder,
        subprocess.Popen([*RAY, *words, f"--temp-dir={folder}"], env=env, stdout=subprocess.PIPE, text=True) as head,
    ):
        assert head.stdout and any("Ray runtime started" in line for line in head.stdout)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def make_run(run_file: RunFile, name: str, **parallel: Any) -> Path:
    """The run's file, the same but for its output folder."""
    train = {"max_steps": STEPS, "global_batch_size": 12, "micro_batch_size": 2, "learning_rate": 1e-3}
    path = run_file(name, data={"max_length": 64}, lora={"dropout": 0.1}, train=train, parallel=parallel)
    write_rows(path.parent / "rows.jsonl", alpaca_rows(96))
    return path


def out(path: Path) -> Path:
    return path.parent / "out" / path.stem


def on_ray(path: Path, gpus: int) -> list[str | Path]:
    return ["train", "--on", "ray", path, "checkpoint.every_steps=5", "--nodes", "1", "--gpus-per-node", str(gpus)]


def check(address: str, run_file: RunFile, gpus: int, **parallel: Any) -> None:
    """Losses on so many GPUs of Ray are those of one process, though a rank is killed on the way."""
    alone = make_run(run_file, "alone", processes=1)
    done = qlora("train", alone)
    assert done.returncode == 0, done.stderr
    path = make_run(run_file, "ray", **parallel)
    env = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "job", *map(str, on_ray(path, gpus))]
    with subprocess.Popen(
        command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        end = time.monotonic() + 240
        while not list((out(path) / "checkpoints").glob("*/manifest.json")):
            assert driver.poll() is None and time.monotonic() < end, driver.stdout and driver.stdout.read()
            time.sleep(0.05)
        os.kill(ranks(path)[-1], signal.SIGKILL)
        said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "going on after step" in said, said
    assert [row["step"] for row in metrics(out(path))] == list(range(1, STEPS + 1))
    assert losses(out(path)) == pytest.approx(losses(out(alone)), rel=1e-4)


def ranks(path: Path) -> list[int]:
    """The processes of this run's ranks."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "RANK" in process.environ() and "train" in words and "--on" not in words and "job" in words:
                found.append(process.pid)
    assert found, path
    return sorted(found)


def test_one_gpu_has_the_losses_of_one_process_though_its_rank_is_killed(address: str, run_file: RunFile) -> None:
    check(address, run_file, 1)


@two
@pytest.mark.parametrize("strategy", ["replicate", "zero3"])
def test_two_gpus_have_the_losses_of_one_process_though_a_rank_is_killed(
    address: str, run_file: RunFile, strategy: str
) -> None:
    check(address, run_file, 2, strategy=strategy)


@two
def test_more_gpus_than_there_are_end_the_run_with_a_sentence(address: str, run_file: RunFile) -> None:
    path = make_run(run_file, "many")
    env = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    done = qlora(*on_ray(path, 16), "--wait-minutes", "0.2", env=env)
    assert done.returncode == 1 and "GPU" in done.stderr + done.stdout, done
    assert not (out(path) / "adapter").exists()
