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
from hashlib import sha256
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
STOPPING = "Stopping after this step; a checkpoint and the adapter will be written."


def status(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "status.json").read_text()))


def check_interrupted(out: Path, why: str, said: str) -> None:
    """Status, message, metrics and adapter agree on where the run stopped."""
    found = status(out)
    assert (found["state"], found["reason"]) == ("interrupted", why)
    assert (
        f"Interrupted: {why} after step {found['step']}. A checkpoint of it and the adapter of this step are in {out}; "
        "the same command goes on from there\n" in said
    )
    assert "Traceback" not in said
    assert len(losses(out)) == found["step"] == found["checkpoint"] > 0
    check_checkpoint(out, found["step"])
    check_adapter((out / "adapter/adapter_model.safetensors").read_bytes())
    assert json.loads((out / "adapter/adapter_config.json").read_text())["r"] == 4
    assert not list(out.rglob("*.part"))


def check_checkpoint(out: Path, step: int) -> None:
    """It is there, and complete."""
    folder = out / f"checkpoints/step-{step:08d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == step
    for name, part in manifest["parts"].items():
        content = (folder / name).read_bytes()
        assert (len(content), sha256(content).hexdigest()) == (part["bytes"], part["sha256"]), name
    assert sorted(file.name for file in folder.iterdir()) == sorted(["manifest.json", *manifest["parts"]])


def check_adapter(content: bytes) -> None:
    tensors = safetensors.torch.load(content)
    assert len(tensors) == 2 * 7 * 2 and all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_ctrl_c_leaves_a_usable_adapter_and_says_so(run_file: RunFile, tmp_path: Path) -> None:
    with (
        open(tmp_path / "err", "w") as err,
        subprocess.Popen(
            [sys.executable, "-m", "job", "train", run_file(), ENDLESS],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=err,
            cwd=REPOSITORY,
        ) as process,
    ):
        try:
            end = time.monotonic() + 200
            while "step 3/" not in (tmp_path / "err").read_text() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            assert status(tmp_path / "out/run")["state"] == "running"
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=100)
        finally:
            process.kill()  # one that heard nothing would be waited for without end
    said = (tmp_path / "err").read_text()
    assert (process.returncode, out) == (75, b""), said
    assert f"\n{STOPPING}\n" in said, "no word of Ctrl-C without a terminal"
    check_interrupted(tmp_path / "out/run", "SIGINT", said)


def test_the_same_command_goes_on_after_an_interruption_and_ends_like_a_run_that_had_none(
    run_file: RunFile, tmp_path: Path
) -> None:
    shared = {
        "lora": {"dropout": 0.5},
        "evaluation": {"share": 0.25},
        "train": {"max_steps": 40, "schedule": "constant", "warmup_steps": 0},
    }
    config, out, whole = run_file(**shared), tmp_path / "out/run", tmp_path / "out/whole"
    assert run("train", run_file("whole", **shared)).code == 0
    with Command("train", config) as command:
        command.wait_for("step 4/")
        command.send(signal.SIGINT)
        done = command.wait()
    assert done.code == 75, done.err
    check_interrupted(out, "SIGINT", done.err)
    stopped = status(out)["step"]
    assert 4 <= stopped < 40
    other = run("train", config, "lora.rank=8", "train.seed=7")
    assert other.code == 2
    assert (
        f"OutputError: output.url: {out} holds a run with other fixed settings\n"
        "  lora.rank: 4 there, 8 here\n"
        "  train.seed: 42 there, 7 here\n"
        "  Use another output.url, or set these back to what they were\n" in other.err
    )
    assert (status(out)["state"], len(losses(out))) == ("interrupted", stopped), "a refusal leaves all as it was"
    again = run("train", config)
    assert again.code == 0, again.err
    assert f"going on after step {stopped}\n" in again.err
    assert (status(out)["state"], status(out)["step"], status(out)["checkpoint"]) == ("finished", 40, 40)
    told = [[(row["step"], row.get("loss"), row.get("eval_loss")) for row in metrics(place)] for place in (out, whole)]
    assert told[0] == told[1] and [step for step, loss, _ in told[0] if loss] == list(range(1, 41))
    adapters = [(place / "adapter/adapter_model.safetensors").read_bytes() for place in (out, whole)]
    assert adapters[0] == adapters[1]


def test_sigterm_may_come_twice(run_file: RunFile, tmp_path: Path) -> None:
    with Command("train", run_file(evaluation={"share": 0.25}), ENDLESS) as command:
        command.wait_for("step 2/")
        command.send(signal.SIGTERM)
        command.wait_for(STOPPING)
        command.send(signal.SIGTERM)
        done = command.wait()
    assert done.code == 75, done.err
    assert done.err.count("Stopping") == 1
    check_interrupted(tmp_path / "out/run", "SIGTERM", done.err)


def test_an_interrupted_run_on_s3_has_all_its_metrics_in_one_file_and_so_when_it_went_on(
    run_file: RunFile, s3: S3
) -> None:
    place, fs = f"{BUCKET}/stopped", s3.fs()
    config = run_file(storage=s3.storage, output={"url": f"s3://{place}"}, train={"max_steps": 60})
    with Command("train", config) as command:
        command.wait_for("step 4/")
        command.send(signal.SIGTERM)
        done = command.wait()
    assert done.code == 75, done.err
    found = json.loads(fs.cat_file(f"{place}/status.json"))
    assert (found["state"], found["reason"]) == ("interrupted", "SIGTERM")
    assert len(fs.cat_file(f"{place}/metrics.jsonl").splitlines()) == found["step"] == found["checkpoint"] >= 4
    check_adapter(fs.cat_file(f"{place}/adapter/adapter_model.safetensors"))
    again = run("train", config)
    assert again.code == 0 and f"going on after step {found['step']}\n" in again.err, again.err
    rows = [json.loads(line) for line in fs.cat_file(f"{place}/metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert json.loads(fs.cat_file(f"{place}/status.json"))["state"] == "finished"


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
        command.wait_for(f"{STOPPING} Ctrl-C again exits at once, without them.")
        command.send(signal.SIGINT)
        done = command.wait()
    assert done.code == 130 and "Traceback" not in done.err, done.err
    found = status(tmp_path / "out/run")
    assert (found["state"], found["reason"]) == ("interrupted", "a second Ctrl-C")
    assert not (tmp_path / "out/run/adapter").exists()
    assert not list((tmp_path / "out/run").rglob("manifest.json"))


def wait_for_status(out: Path) -> None:
    end = time.monotonic() + 100
    while not (out / "status.json").exists() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_loss_that_is_not_finite_fails_the_run_with_the_reason(run_file: RunFile, tmp_path: Path) -> None:
    done = run("train", run_file(), "train.learning_rate=1e30")
    assert done.code == 1 and "Traceback" not in done.err
    found = status(tmp_path / "out/run")
    assert found["state"] == "failed"
    assert found["reason"].startswith("loss or gradients of ") and "Lower train.learning_rate" in found["reason"]
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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_disk_leaves_a_true_status(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = RunFolder(load_config(str(run_file())))
    folder.begin()

    def full(*arguments: Any) -> None:
        raise OSError(code, "No space left on device")

    monkeypatch.setattr(folder.store, "write", full)
    folder.write_status("failed", "storage failed after step 7", 7)
    found = status(tmp_path / "out/run")
    assert (found["state"], found["step"]) == ("failed", 7)
