"""What a run bears: storage that fails, steps that are not finite, a second run, a disk that is full."""

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from job.config import parse_config
from job.engine import Engine
from job.group import connect
from job.train import train
from job.world import World
from tests.checkpoints import newest, run_state, whole
from tests.conftest import losses, metrics
from tests.faults import proxied
from tests.forked import Command, run
from tests.ranks import run_ranks
from tests.s3 import BUCKET, S3

RunFile = Callable[..., Path]
ENDLESS = "train.max_steps=100000"


def status(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "status.json").read_text()))


def s3_rows(s3: S3, place: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in s3.fs().cat_file(f"{place}/metrics.jsonl").splitlines()]


def test_on_s3_a_killed_run_goes_on_and_all_rows_of_metrics_are_there(
    run_file: RunFile, tmp_path: Path, s3: S3
) -> None:
    steps = {"train": {"max_steps": 8}, "checkpoint": {"every_steps": 3}}
    assert run("train", run_file("whole", **steps)).code == 0
    place = f"{BUCKET}/killed-once"
    config = run_file("killed-once", storage=s3.storage, output={"url": f"s3://{place}"}, **steps)
    (done,) = run_ranks(1, "train", config, env={"DIE_AFTER_STEP": "7", **s3.env})
    assert done.code == -signal.SIGKILL
    done = run("train", config)
    # step 6 unless the kill came while its checkpoint was still on its way
    assert done.code == 0 and re.search("going on after step [36]", done.err), done.err
    rows = s3_rows(s3, place)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == losses(tmp_path / "out/whole")
    assert not [name for name in s3.fs().find(f"{place}/metrics-parts") if name.endswith(".jsonl")]


def test_storage_that_is_down_for_a_while_costs_no_step_and_no_checkpoint(
    run_file: RunFile, tmp_path: Path, s3: S3
) -> None:
    steps = {"train": {"max_steps": 40}, "checkpoint": {"every_steps": 4}}
    assert run("train", run_file("whole", **steps)).code == 0
    with proxied(s3) as (through, faults):
        place = f"{BUCKET}/outage"
        config = run_file("outage", storage=through.storage, output={"url": f"s3://{place}"}, **steps)
        with Command("train", config) as command:
            command.wait_for("step 6/")
            faults.down = True
            command.wait_for("trying again while training goes on")
            command.wait_for("step 12/")
            time.sleep(1)
            faults.down = False
            done = command.wait()
    assert done.code == 0, done.err
    assert [row["loss"] for row in s3_rows(s3, place)] == losses(tmp_path / "out/whole")
    assert s3.fs().exists(f"{place}/checkpoints/step-00000040/manifest.json")
    assert json.loads(s3.fs().cat_file(f"{place}/status.json"))["state"] == "finished"


@pytest.mark.parametrize(
    ("only", "named"),
    [("/checkpoints/", r"the checkpoint of step \d+"), ("", r"the (checkpoint of step \d+|status\.json)")],
    ids=["checkpoints", "all"],  # of all, whichever was due first
)
def test_storage_that_stays_down_fails_the_run_with_what_could_not_be_written(
    run_file: RunFile, s3: S3, only: str, named: str
) -> None:
    with proxied(s3) as (through, faults):
        url = {"url": f"s3://{BUCKET}/down{only.strip('/')}"}
        storage = {**through.storage, "retry_minutes": 0.05}
        config = run_file("down", storage=storage, output=url, checkpoint={"every_steps": 2})
        with Command("train", config, "train.max_steps=30") as command:
            command.wait_for("step 6/")
            faults.only, faults.down = only, True
            done = command.wait()
    assert done.code == 1 and "Traceback" not in done.err
    assert re.search(rf"JobError: {named} could not be written in \d+ s", done.err), done.err


def test_storage_that_fails_for_one_rank_alone_fails_the_run_on_all_in_a_sentence(
    run_file: RunFile, tmp_path: Path
) -> None:
    path = run_file(train={"max_steps": 4, "micro_batch_size": 1}, storage={"retry_minutes": 0.02})
    ranks = run_ranks(2, "train", path, env={"STORAGE_FAILS_ON_RANK": "1"})
    assert [one.code for one in ranks] == [1, 1]
    for one in ranks:
        assert "the checkpoint of step 4 could not be written" in one.err and "Traceback" not in one.err, one.err
    assert status(tmp_path / "out/run")["state"] == "failed"
    assert not list((tmp_path / "out/run").rglob("manifest.json")), "a checkpoint without a part is none"


def test_a_rank_whose_peer_dies_before_the_run_begins_says_so(run_file: RunFile, tmp_path: Path) -> None:
    first, second = run_ranks(2, "train", run_file(train={"micro_batch_size": 1}), env={"DIES_EARLY": "1"})
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    assert "JobError: another rank ended before the run began, or cannot be reached" in first.err
    assert "Traceback" not in first.err and not (tmp_path / "out/run").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if made.returncode:
        pytest.skip("only root mounts disks")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_full_for_a_while_costs_no_step(run_file: RunFile, tmp_path: Path, small_disk: Path) -> None:
    steps = {"train": {"max_steps": 60}, "checkpoint": {"every_steps": 5, "keep": 1}}
    assert run("train", run_file("whole", **steps)).code == 0
    out = small_disk / "run"
    with Command("train", run_file("full", output={"url": str(out)}, **steps)) as command:
        command.wait_for("step 6/")
        with open(small_disk / "filler", "wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        command.wait_for("trying again while training goes on")
        (small_disk / "filler").unlink()
        done = command.wait()
    assert done.code == 0, done.err
    assert losses(out) == losses(tmp_path / "out/whole")
    assert newest(out) == 60 and status(out)["state"] == "finished"


def test_a_second_run_on_one_output_url_is_refused_while_the_first_lives(run_file: RunFile, tmp_path: Path) -> None:
    config = run_file()
    with Command("train", config, ENDLESS) as first:
        first.wait_for("step 2/")
        second = run("train", config, ENDLESS)
        assert second.code == 2 and "Traceback" not in second.err
        assert f"host {__import__('socket').gethostname()}, pid {first.process.pid}" in second.err
        before = len(losses(tmp_path / "out/run"))
        first.send(signal.SIGTERM)
        assert first.wait().code == 75
    assert len(losses(tmp_path / "out/run")) >= before
    assert run("train", config, "train.max_steps=100000", f"train.stop_file={config}").code == 75, "it is free now"


def test_a_run_whose_folder_was_taken_over_stops_and_publishes_nothing_more(run_file: RunFile, tmp_path: Path) -> None:
    out = tmp_path / "out/run"
    with Command("train", run_file(checkpoint={"every_steps": 2}), ENDLESS) as command:
        command.wait_for("step 4/")
        (held,) = (out / "lease").glob("*.json")  # beside what is being written
        theirs = {**json.loads(held.read_text()), "id": "another", "host": "elsewhere"}
        (out / "lease/00000009.json").write_text(json.dumps(theirs))
        done = command.wait()
    assert done.code == 1 and "is no longer this run's: another run holds it (host elsewhere" in done.err
    assert status(out)["state"] == "running" and not (out / "adapter").exists()
    assert [file.name for file in (out / "lease").glob("*.json") if file.name > "00000001.json"] == ["00000009.json"]


def test_without_hard_links_a_run_needs_to_give_up_its_lease_and_then_keeps_checkpoints(
    run_file: RunFile, tmp_path: Path
) -> None:
    path, bare = run_file(train={"max_steps": 6}, checkpoint={"every_steps": 2}), {"NO_HARD_LINKS": "1"}
    refused = run("train", path, env=bare)
    assert refused.code == 2 and "storage.lease: false" in refused.err
    (killed,) = run_ranks(1, "train", path, "storage.lease=false", env={**bare, "DIE_AFTER_STEP": "5"})
    assert killed.code == -signal.SIGKILL and newest(tmp_path / "out/run") == 4
    done = run("train", path, "storage.lease=false", env=bare)
    assert done.code == 0 and "going on after step 4" in done.err
    assert newest(tmp_path / "out/run") == 6


def test_what_a_kill_leaves_of_run_yaml_or_status_json_stands_in_no_later_run_s_way(
    run_file: RunFile, tmp_path: Path
) -> None:
    path, out = run_file(), tmp_path / "out/run"
    out.mkdir(parents=True)
    (out / "run.yaml.123.part").write_text("model: ")
    assert run("train", path).code == 0
    assert not list(out.glob("*.part"))
    (out / "status.json").write_text("")
    longer = run("train", path, "train.max_steps=5")
    assert longer.code == 0 and "going on after step 3" in longer.err
    assert status(out)["state"] == "finished"


def test_the_best_checkpoint_is_kept_also_where_storage_is_slow(run_file: RunFile, s3: S3) -> None:
    with proxied(s3) as (through, faults):
        faults.delay_s = 0.05
        place = f"{BUCKET}/slow"
        config = run_file(
            "slow",
            storage=through.storage,
            output={"url": f"s3://{place}"},
            evaluation={"share": 0.25, "every_steps": 1},
            checkpoint={"keep": 1, "keep_best": True},
            train={"max_steps": 9, "learning_rate": 0.06, "schedule": "constant", "warmup_steps": 6},
        )
        done = run("train", config)
    assert done.code == 0, done.err
    judged = {row["step"]: row["eval_loss"] for row in s3_rows(s3, place) if "eval_loss" in row and row["step"]}
    best = min(judged, key=lambda step: judged[step])
    assert 1 < best < 9, judged
    assert s3.fs().exists(f"{place}/checkpoints/step-{best:08d}/manifest.json")


def test_a_file_named_stop_in_the_output_folder_stops_the_run(run_file: RunFile, tmp_path: Path) -> None:
    out = tmp_path / "out/run"
    with Command("train", run_file(), ENDLESS) as command:
        command.wait_for("step 2/")
        (out / "stop").touch()
        done = command.wait()
    assert done.code == 75 and "a stop key after step" in done.err
    assert (status(out)["state"], status(out)["reason"]) == ("interrupted", "a stop key")
    assert newest(out) == status(out)["step"] == status(out)["checkpoint"] == len(losses(out))


def test_a_time_limit_ends_the_run_ahead_of_it_on_all_ranks(run_file: RunFile, tmp_path: Path) -> None:
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 45)}
    ranks = run_ranks(2, "train", run_file(train={"micro_batch_size": 1}), ENDLESS, "train.stop_grace_s=10", env=end)
    assert {one.code for one in ranks} == {75}, ranks[0].err
    out = tmp_path / "out/run"
    assert status(out)["reason"] == "the time limit" and newest(out) == len(losses(out)) > 0


@pytest.mark.parametrize(
    ("strategy", "precision"), [("replicate", "fp32"), ("zero2", "fp32"), ("zero3", "fp32"), ("replicate", "bf16")]
)
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    run_file: RunFile, tmp_path: Path, strategy: str, precision: str
) -> None:
    steps = {"max_steps": 6, "micro_batch_size": 1, "precision": precision}
    path = run_file(train=steps, parallel={"strategy": strategy}, checkpoint={"every_steps": 1, "keep": 9})
    ranks = run_ranks(2, "train", path, env={"NAN_AT_STEPS": "3"})
    assert [one.code for one in ranks] == [0, 0], ranks[0].err
    out = tmp_path / "out/run"
    rows = metrics(out)
    assert [row.get("left_out", 0) for row in rows] == [0, 0, 1, 0, 0, 0]
    assert rows[2]["loss"] is None and all(row["loss"] for row in rows if row is not rows[2])
    assert run_state(out).counters["skipped_in_all"] == 1
    assert all(tensor.isfinite().all() for tensor in whole(out).values())


def test_many_steps_that_are_not_finite_end_the_run_with_a_checkpoint_from_before_them(
    run_file: RunFile, tmp_path: Path
) -> None:
    path = run_file(train={"max_steps": 20, "max_skipped_steps": 3}, checkpoint={"every_steps": 2})
    (done,) = run_ranks(1, "train", path, env={"NAN_AT_STEPS": "6,7,8,9"})
    out = tmp_path / "out/run"
    assert done.code == 1 and "of 3 steps in a row were not finite, the last of them step 8" in done.err
    assert status(out)["state"] == "failed" and newest(out) == 5 == run_state(out).counters["step"]
    (again,) = run_ranks(1, "train", path)
    assert again.code == 0 and "going on after step 5" in again.err, "the fault was somewhere else, and is gone"
    assert [row["step"] for row in metrics(out)] == list(range(1, 21))
    assert run_state(out).counters["skipped_in_all"] == 0


def test_fp16_s_loss_scaling_goes_on_where_it_was() -> None:
    connect(World(), "cpu")  # the scaler asks for its rank

    def engine(scaler: Any) -> Engine:
        inner = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
        return cast(Engine, SimpleNamespace(inner=inner))

    def fresh() -> DynamicLossScaler:
        return DynamicLossScaler(2.0**16, scale_window=4, min_scale=1, delayed_shift=2, consecutive_hysteresis=False)

    whole, first = fresh(), fresh()
    fate = [False, True, False, True, True, False, False, True, False, False, False]
    for overflow in fate:
        whole.update_scale(overflow)
    for overflow in fate[:7]:
        first.update_scale(overflow)
    values = json.loads(json.dumps(Engine.scaler(engine(first))))
    resumed = fresh()
    Engine.restore_scaler(engine(resumed), values)
    for overflow in fate[7:]:
        resumed.update_scale(overflow)
    assert vars(resumed) == vars(whole) and whole.cur_scale != fresh().cur_scale
    for name in values:
        with pytest.raises(KeyError, match=name):
            Engine.restore_scaler(engine(fresh()), {other: value for other, value in values.items() if other != name})
    assert Engine.scaler(engine(LossScaler(1.0))) == {}


def test_in_memory_storage_serves_a_run_of_this_process(run_file: RunFile) -> None:
    config = parse_config(run_file(output={"url": "memory://survive/run"}).read_text())
    said: list[str] = []
    assert train(config, World(), said.append).state == "finished"
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 5})})
    assert train(longer, World(), said.append).step == 5
    assert any("going on after step 3" in line for line in said)
    assert threading.active_count() < 20, "no threads are left behind"
