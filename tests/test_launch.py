"""However the workers are started, the run is the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, losses, qlora
from tests.ranks import free_port

RunFile = Callable[..., Path]
SHARED = {"train": {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"}}
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def expected(run_file: RunFile, tmp_path: Path) -> list[float]:
    """Losses of one process."""
    done = qlora("train", run_file("alone", **SHARED))
    assert done.returncode == 0, done.stderr
    return losses(tmp_path / "out/alone")


def launched(*words: str | Path, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**ENV, **env}, cwd=REPOSITORY, timeout=timeout_s
    )


def launchers(config: Path) -> dict[str, list[str | Path]]:
    """The same run through each launcher, with two workers."""
    bin = Path(sys.executable).parent
    port = str(free_port())
    return {
        "qlora": [sys.executable, "-m", "job", "train", config, "parallel.processes=2"],
        "torchrun": [bin / "torchrun", "--nproc-per-node=2", f"--master-port={port}", "-m", "job", "train", config],
        "deepspeed": [bin / "deepspeed", "--num_gpus=2", f"--master_port={port}", "--module", "job", "train", config],
        "accelerate": [
            *(bin / "accelerate", "launch", "--multi_gpu", "--num_processes=2", f"--main_process_port={port}"),
            *("-m", "job", "train", config),
        ],
    }


@pytest.mark.parametrize("how", ["qlora", "torchrun", "deepspeed", "accelerate"])
def test_every_launcher_gives_the_losses_of_one_process(
    run_file: RunFile, tmp_path: Path, expected: list[float], how: str
) -> None:
    config = run_file("two", **SHARED, parallel={"strategy": "zero3"})
    done = launched(*launchers(config)[how])
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "out/two") == pytest.approx(expected, rel=1e-5)


def test_a_run_of_one_process_goes_on_under_two_workers_and_back(run_file: RunFile, tmp_path: Path) -> None:
    def shared(steps: int) -> dict[str, dict[str, object]]:
        return {"train": {**SHARED["train"], "max_steps": steps, "schedule": "constant", "warmup_steps": 0}}

    whole = qlora("train", run_file("whole", **shared(6)))
    assert whole.returncode == 0, whole.stderr
    for steps, words in ((2, ()), (4, ("parallel.processes=2",)), (6, ("parallel.processes=1",))):
        done = qlora("train", run_file("parts", **shared(steps)), *words)
        assert done.returncode == 0, done.stderr
    assert "the optimizer's state is spread anew, from 2 ranks under " in done.stderr
    assert losses(tmp_path / "out/parts") == pytest.approx(losses(tmp_path / "out/whole"), rel=1e-5)


def test_qlora_says_how_it_starts_its_workers_and_prints_each_line_once(run_file: RunFile) -> None:
    done = launched(*launchers(run_file("two", **SHARED))["qlora"])
    assert "2 workers on this CPU, " in done.stderr
    assert done.stderr.count("step 3/3") == 1


def test_wrong_input_is_said_once_and_ends_all_workers_with_2(run_file: RunFile) -> None:
    config = run_file("two", **SHARED, lora={"targets": ["nowhere"]})
    done = launched(*launchers(config)["qlora"])
    assert done.returncode == 2
    assert done.stderr.count("ConfigError") == 1


def test_what_another_worker_failed_of_is_said_although_the_first_ended_too(run_file: RunFile, tmp_path: Path) -> None:
    limits = (
        "import os, resource\nif os.environ.get('RANK') == '1': resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(limits)
    done = launched(*launchers(run_file("two", **SHARED))["qlora"], PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 1
    assert "worker 1 ended with exit code 1" in done.stderr and "Too many open files" in done.stderr, done.stderr


def workers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in children.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], object], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def endless(run_file: RunFile, tmp_path: Path) -> Callable[[], subprocess.Popen[str]]:
    """Starts a run of two workers that has taken its first step, and noted it."""

    def start() -> subprocess.Popen[str]:
        config = run_file("endless", train={**SHARED["train"], "max_steps": 100_000})
        words = [str(word) for word in launchers(config)["qlora"]]
        log = open(tmp_path / "log", "w")  # noqa: SIM115 - the process's own
        process = subprocess.Popen(words, stdout=log, stderr=log, env=ENV, cwd=REPOSITORY, text=True)
        wait_for(lambda: "step 2/" in (tmp_path / "log").read_text())
        return process

    return start


def test_when_a_worker_dies_the_others_end_too_and_the_run_says_which(
    endless: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = endless()
    first, second = workers_of(process.pid)
    os.kill(second, signal.SIGKILL)
    assert process.wait(60) == 1
    assert not alive(first)
    assert "worker 1 was ended by SIGKILL" in (tmp_path / "log").read_text()
    assert '"failed"' in (tmp_path / "out/endless/status.json").read_text()


def test_a_signal_stops_all_workers_at_the_same_step(
    endless: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = endless()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    out = tmp_path / "out/endless"
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM")
    assert len(losses(out)) == status["step"] == status["checkpoint"] > 0
    manifest = json.loads((out / f"checkpoints/step-{status['step']:08d}/manifest.json").read_text())
    assert sorted(name.partition("-")[0] for name in manifest["parts"]) == ["rank00000", "rank00001", "run"]
    assert (out / "adapter/adapter_model.safetensors").exists()
    words = [*launchers(tmp_path / "endless.yaml")["qlora"], f"train.max_steps={status['step'] + 2}"]
    again = launched(*words)
    assert again.returncode == 0 and f"going on after step {status['step']}\n" in again.stderr, again.stderr
    assert len(losses(out)) == status["step"] + 2
    assert '"finished"' in (out / "status.json").read_text()


def test_workers_do_not_outlive_who_started_them(endless: Callable[[], subprocess.Popen[str]]) -> None:
    process = endless()
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, workers)), 20)


def test_a_worker_that_dies_alone_ends_those_that_wait_for_it(
    endless: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = endless()
    first, second = workers_of(process.pid)
    os.kill(first, signal.SIGSTOP)  # as one that is stuck in a collective
    os.kill(second, signal.SIGKILL)
    assert process.wait(40) == 1
    assert not alive(first)
    assert '"failed"' in (tmp_path / "out/endless/status.json").read_text()


def test_when_the_first_worker_is_killed_its_launcher_says_so_and_writes_the_status(
    endless: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = endless()
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    assert process.wait(60) == 1
    assert "worker 0 was ended by SIGKILL" in (tmp_path / "log").read_text()
    status = json.loads((tmp_path / "out/endless/status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "worker 0 was ended by SIGKILL")
    assert status["step"] >= 1 and status["checkpoint"] == 0
    again = launched(*launchers(tmp_path / "endless.yaml")["qlora"], "train.max_steps=3")
    assert again.returncode == 0, again.stderr
    assert f"no usable checkpoint in {tmp_path}/out/endless: starting from the beginning\n" in again.stderr
    rows = (tmp_path / "out/endless/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3], "nothing of the run that was lost"


def test_no_worker_goes_before_the_first_has_written_what_the_run_leaves(run_file: RunFile, tmp_path: Path) -> None:
    slow = tmp_path / "slow/sitecustomize.py"
    slow.parent.mkdir()
    slow.write_text(
        "import sys, threading, time\n"
        "def delay():\n"
        "    while not hasattr(sys.modules.get('job.adapter'), 'load'): time.sleep(0.01)\n"
        "    adapter = sys.modules['job.adapter']; write = adapter.write\n"
        "    adapter.write = lambda *a, **k: (time.sleep(14), write(*a, **k))\n"
        "threading.Thread(target=delay, daemon=True).start()\n"
    )
    config = run_file("endless", train={**SHARED["train"], "max_steps": 100_000})
    words = [str(word) for word in launchers(config)["qlora"]]
    with open(tmp_path / "log", "w") as log:
        env = {**ENV, "PYTHONPATH": str(slow.parent)}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=env, cwd=REPOSITORY, text=True)
    wait_for(lambda: "step 2/" in (tmp_path / "log").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, (tmp_path / "log").read_text()
    assert '"interrupted"' in (tmp_path / "out/endless/status.json").read_text()
    assert (tmp_path / "out/endless/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("started", [1, 2])
def test_a_signal_before_the_run_began_is_said_and_ends_with_75(
    run_file: RunFile, tmp_path: Path, started: int
) -> None:
    words = [str(word) for word in launchers(run_file("early", **SHARED))["qlora"]]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=ENV, cwd=REPOSITORY, text=True)
    wait_for(lambda: len(workers_of(process.pid)) >= started)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGTERM came before the run began. Start it again when you like" in said
    assert not (tmp_path / "out/early").exists()
