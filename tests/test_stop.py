"""Stopped or failing: what a run leaves behind, what it says, and its exit code."""

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch

from job.config import load_config
from job.run_folder import RunFolder
from job.stop import StopRequest
from tests.conftest import REPOSITORY, alpaca_rows, losses, metrics, write_rows
from tests.forked import Command, run
from tests.s3 import BUCKET, S3

RunFile = Callable[..., Path]
ENDLESS = "train.max_steps=100000"


def status(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "status.json").read_text()))


def check_interrupted(out: Path, why: str, said: str) -> None:
    """Status, message, metrics and adapter agree on where the run stopped."""
    found = status(out)
    assert (found["state"], found["reason"]) == ("interrupted", why)
    assert f"Interrupted: {why} after step {found['step']}. The adapter of this step is in {out}/adapter;" in said
    assert "this version cannot continue the run, start it with another output.url" in said
    assert "Traceback" not in said
    assert len(losses(out)) == found["step"] > 0
    check_adapter((out / "adapter/adapter_model.safetensors").read_bytes())
    assert json.loads((out / "adapter/adapter_config.json").read_text())["r"] == 4
    assert not list(out.rglob("*.part"))


def check_adapter(content: bytes) -> None:
    tensors = safetensors.torch.load(content)
    assert len(tensors) == 2 * 7 * 2 and all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_ctrl_c_leaves_a_usable_adapter_and_says_so(run_file: RunFile, tmp_path: Path) -> None:
    config = run_file()
    with (
        open(tmp_path / "err", "w") as err,
        subprocess.Popen(
            [sys.executable, "-m", "job", "train", config, ENDLESS],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=err,
            cwd=REPOSITORY,
        ) as process,
    ):
        end = time.monotonic() + 200
        while "step 3/" not in (tmp_path / "err").read_text() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert status(tmp_path / "out/run")["state"] == "running"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=100)
    said = (tmp_path / "err").read_text()
    assert (process.returncode, out) == (75, b""), said
    assert "\nStopping after this step, the adapter will be written.\n" in said, "no word of Ctrl-C without a terminal"
    check_interrupted(tmp_path / "out/run", "SIGINT", said)
    again = run("train", config, ENDLESS)
    assert again.code == 2 and "holds an unfinished run (interrupted at step " in again.err


def test_sigterm_may_come_twice(run_file: RunFile, tmp_path: Path) -> None:
    with Command("train", run_file(evaluation={"share": 0.25}), ENDLESS) as command:
        command.wait_for("step 2/")
        command.send(signal.SIGTERM)
        command.wait_for("Stopping after this step")
        command.send(signal.SIGTERM)
        done = command.wait()
    assert done.code == 75, done.err
    assert done.err.count("Stopping after this step") == 1
    check_interrupted(tmp_path / "out/run", "SIGTERM", done.err)


def test_an_interrupted_run_on_s3_has_all_its_metrics_in_one_file(run_file: RunFile, s3: S3) -> None:
    place, fs = f"{BUCKET}/stopped", s3.fs()
    with Command("train", run_file(storage=s3.storage, output={"url": f"s3://{place}"}), ENDLESS) as command:
        command.wait_for("step 4/")
        command.send(signal.SIGTERM)
        done = command.wait()
    assert done.code == 75, done.err
    found = json.loads(fs.cat_file(f"{place}/status.json"))
    assert (found["state"], found["reason"]) == ("interrupted", "SIGTERM")
    assert len(fs.cat_file(f"{place}/metrics.jsonl").splitlines()) == found["step"] >= 4
    check_adapter(fs.cat_file(f"{place}/adapter/adapter_model.safetensors"))


@pytest.fixture
def terminal() -> Iterator[str]:
    """The name of a terminal."""
    ours, theirs = pty.openpty()
    yield os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


def test_a_second_ctrl_c_at_a_terminal_exits_at_once(run_file: RunFile, tmp_path: Path, terminal: str) -> None:
    write_rows(tmp_path / "rows.jsonl", alpaca_rows(2000))
    long_steps = ("train.global_batch_size=400", "train.micro_batch_size=1")  # time enough between the two
    with Command("train", run_file(), *long_steps, stdin=terminal) as command:
        command.wait_for("steps in fp32")
        wait_for_status(tmp_path / "out/run")
        time.sleep(1)
        command.send(signal.SIGINT)
        command.wait_for(
            "Stopping after this step, the adapter will be written. Ctrl-C again exits at once, without it."
        )
        command.send(signal.SIGINT)
        done = command.wait()
    assert done.code == 130 and "Traceback" not in done.err, done.err
    found = status(tmp_path / "out/run")
    assert (found["state"], found["reason"]) == ("interrupted", "a second Ctrl-C")
    assert not (tmp_path / "out/run/adapter").exists()


def wait_for_status(out: Path) -> None:
    end = time.monotonic() + 100
    while not (out / "status.json").exists() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_loss_that_is_not_finite_fails_the_run_with_the_reason(run_file: RunFile, tmp_path: Path) -> None:
    done = run("train", run_file(), "train.learning_rate=1e30")
    assert done.code == 1 and "Traceback" not in done.err
    found = status(tmp_path / "out/run")
    assert found["state"] == "failed"
    assert found["reason"].startswith("the loss of step ") and "Lower train.learning_rate" in found["reason"]
    assert f"JobError: {found['reason']}\n" in done.err


def test_the_status_of_a_failed_run_says_after_which_step(run_file: RunFile, tmp_path: Path) -> None:
    run("train", run_file(), "train.learning_rate=1e30")
    assert status(tmp_path / "out/run")["step"] == len(losses(tmp_path / "out/run")) > 0


def test_a_fault_of_the_storage_on_the_way_is_one_sentence_and_fails_the_run(run_file: RunFile, tmp_path: Path) -> None:
    file = tmp_path / "out/run/metrics.jsonl"
    with Command("train", run_file(), ENDLESS) as command:
        command.wait_for("step 2/")
        command.send(signal.SIGSTOP)
        file.unlink()
        file.mkdir()
        command.send(signal.SIGCONT)
        done = command.wait()
    assert done.code == 1
    found = status(tmp_path / "out/run")
    assert found["state"] == "failed" and found["reason"].startswith("storage failed after step ")
    assert f"JobError: {found['reason']}" in done.err and "IsADirectoryError" in done.err


def test_the_first_signal_asks_and_the_old_handlers_come_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.asked is None
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.asked == "SIGUSR1", "launchers repeat signals; the first one is the reason"
    assert signal.getsignal(signal.SIGUSR1) is before
    assert capsys.readouterr().err.count("Stopping after this step") == 1


def test_an_evaluation_before_the_first_step_is_in_the_metrics_of_a_stopped_run(
    run_file: RunFile, tmp_path: Path
) -> None:
    with Command("train", run_file(evaluation={"share": 0.25}), ENDLESS) as command:
        command.wait_for("step 1/")
        command.send(signal.SIGUSR1)
        assert command.wait().code == 75
    assert metrics(tmp_path / "out/run")[0]["step"] == 0


def test_a_closed_terminal_stops_the_run_like_a_signal_that_asks(run_file: RunFile, tmp_path: Path) -> None:
    with Command("train", run_file(), ENDLESS) as command:
        command.wait_for("step 2/")
        command.send(signal.SIGHUP)
        done = command.wait()
    assert done.code == 75
    assert status(tmp_path / "out/run")["state"] == "interrupted"


def test_a_full_disk_leaves_a_true_status(run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(load_config(str(run_file())))
    folder.begin()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.store, "write", full)
    folder.write_status("failed", "storage failed after step 7", 7)
    found = status(tmp_path / "out/run")
    assert (found["state"], found["step"]) == ("failed", 7)
