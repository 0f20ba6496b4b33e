"""The run's folder: the same run again, another run, an unfinished one, somebody else's files, and its status."""

import json
import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job.checkpoint import Checkpoints, Manifest
from job.config import RunConfig, parse_config
from job.errors import JobError, OutputError
from job.run_folder import LOST_RANK, RunFolder
from job.store import Store
from tests.conftest import settings
from tests.s3 import BUCKET, S3


def config(url: str | Path, **sections: Mapping[str, Any]) -> RunConfig:
    return parse_config(json.dumps(settings("model", "rows.jsonl", url, **sections)))


@pytest.fixture(params=["file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """An empty output URL of each kind, as sections of a run file."""
    name = secrets.token_hex(4)
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        return {"url": f"s3://{BUCKET}/{name}", "storage": s3.storage}
    return {"url": tmp_path / "out" if request.param == "file" else f"memory://{name}/out"}


def finished(asked: RunConfig) -> None:
    run = RunFolder(asked)
    assert not run.already_finished()
    run.begin()
    run.write_status("finished", "", 3)


def checkpoint(store: Store, step: int) -> None:
    """A complete checkpoint of a step, without parts."""
    assert Checkpoints(store).publish(Manifest(step, "fixed", None, ()))


def found(store: Store) -> dict[str, Any]:
    """What status.json says, but for the time."""
    status = json.loads(store.read("status.json"))
    assert datetime.fromisoformat(status.pop("updated")).tzinfo is not None
    return dict(status)


def refusal(asked: RunConfig) -> str:
    with pytest.raises(OutputError) as fault:
        RunFolder(asked).already_finished()
    assert fault.value.exit_code == 2
    return str(fault.value)


def test_looking_at_a_new_folder_creates_nothing(tmp_path: Path) -> None:
    assert not RunFolder(config(tmp_path / "out")).already_finished()
    assert list(tmp_path.iterdir()) == []


def test_begin_writes_settings_that_read_back_equal_and_a_status(place: dict[str, Any]) -> None:
    asked = config(**place, lora={"targets": ["q_proj"]}, train={"learning_rate": 1e-5}, tracking={"run_name": "第一"})
    run = RunFolder(asked)
    run.begin()
    assert parse_config(run.store.read("run.yaml").decode()) == asked
    assert "第一" in run.store.read("run.yaml").decode()
    assert found(run.store) == {"state": "running", "reason": "", "step": 0, "checkpoint": 0, "restarts": 0}


def test_signatures_of_addresses_are_not_written_and_a_freshly_signed_address_is_the_same_run(tmp_path: Path) -> None:
    def signed(signature: str, name: str = "a.jsonl") -> RunConfig:
        return config(
            tmp_path,
            data={"train": [f"https://host/{name}?X-Sig={signature}:train[:1%]", "part-?.jsonl"]},
            evaluation={"file": f"http://host/b.jsonl?a=1&token={signature}#{signature}"},
        )

    finished(signed("geheim"))
    text = (tmp_path / "run.yaml").read_text()
    assert "geheim" not in text
    assert "https://host/a.jsonl:train[:1%]" in text and "part-?.jsonl" in text and "http://host/b.jsonl" in text
    assert RunFolder(signed("tomorrow")).already_finished()
    said = refusal(signed("tomorrow", "other.jsonl"))
    assert "data.train: [" in said and "tomorrow" not in said


@pytest.mark.parametrize("text", ["12e4567", "1_000", "yes", "null", "0x10", "2026-01-01", "1e5", "007"])
def test_words_that_yaml_might_take_for_numbers_read_back_as_words(tmp_path: Path, text: str) -> None:
    asked = config(tmp_path, model={"revision": text})
    RunFolder(asked).begin()
    assert parse_config((tmp_path / "run.yaml").read_text()) == asked


def test_the_same_run_again_is_finished_already(place: dict[str, Any]) -> None:
    finished(config(**place))
    again = RunFolder(config(**place))
    assert again.already_finished()
    assert again.status and again.status.step == 3


def test_a_changed_fixed_setting_is_refused_with_old_value_new_value_and_cure(place: dict[str, Any]) -> None:
    finished(config(**place))
    said = refusal(config(**place, lora={"rank": 8}, train={"seed": 7}))
    assert said == (
        f"output.url: {place['url']} holds a run with other fixed settings\n"
        "  lora.rank: 4 there, 8 here\n"
        "  train.seed: 42 there, 7 here\n"
        "  Use another output.url, or set these back to what they were"
    )


def test_free_and_evaluation_settings_may_change_on_a_finished_run(place: dict[str, Any]) -> None:
    finished(config(**place))
    changed = config(
        **place,
        train={"micro_batch_size": 4, "recompute": "full"},
        tracking={"every_steps": 5, "sinks": []},
        generation={"max_new_tokens": 5},
        data={"workers": 2},
        model={"attention": "eager"},
    )
    assert RunFolder(changed).already_finished()


OTHERS = {"lora": {"rank": 8}}
REFUSED = "holds a run with other fixed settings\n  lora.rank: 4 there, 8 here\n  Use another output.url, or set these"


@pytest.mark.parametrize("length", [{"epochs": 5.0}, {"max_steps": 2}], ids=str)
def test_a_finished_run_that_has_taken_enough_steps_stays_finished(
    place: dict[str, Any], length: dict[str, Any]
) -> None:
    finished(config(**place))
    assert RunFolder(config(**place, train=length)).already_finished()
    assert REFUSED in refusal(config(**place, train=length, **OTHERS))


@pytest.mark.parametrize("length", [{"max_steps": 9}, {"max_steps": None}], ids=str)
def test_a_finished_run_whose_length_changed_goes_on(place: dict[str, Any], length: dict[str, Any]) -> None:
    finished(config(**place))
    assert RunFolder(config(**place)).already_finished()
    assert not RunFolder(config(**place, train=length)).already_finished()
    assert REFUSED in refusal(config(**place, train=length, **OTHERS))


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
def test_an_unfinished_run_goes_on_and_refuses_other_fixed_settings(place: dict[str, Any], state: Any) -> None:
    run = RunFolder(config(**place))
    run.begin()
    run.write_status(state, "SIGINT", 2)
    assert not RunFolder(config(**place)).already_finished()
    assert not RunFolder(config(**place, train={"max_steps": 9, "micro_batch_size": 4})).already_finished()
    assert REFUSED in refusal(config(**place, **OTHERS))


@pytest.mark.parametrize("state", ["interrupted", "failed"])
def test_a_run_that_ended_before_its_first_step_may_be_started_again_with_any_settings(
    place: dict[str, Any], state: Any
) -> None:
    run = RunFolder(config(**place))
    run.begin()
    run.write_status(state, "the GPU's memory ran out", 0)
    again = RunFolder(config(**place, **OTHERS))
    assert again.took_no_step and not again.already_finished()
    again.begin()
    assert RunFolder(config(**place)).old == config(**place, **OTHERS)


def test_a_run_with_a_checkpoint_took_steps_whatever_its_status_says(place: dict[str, Any]) -> None:
    run = RunFolder(config(**place))
    run.begin()
    checkpoint(run.store, 2)
    run.write_status("failed", "the GPU's memory ran out", 0)
    again = RunFolder(config(**place))
    assert not again.took_no_step and not again.already_finished()
    assert REFUSED in refusal(config(**place, **OTHERS))


def test_a_run_that_is_running_at_step_0_may_take_steps_any_time(place: dict[str, Any]) -> None:
    RunFolder(config(**place)).begin()
    assert not RunFolder(config(**place)).took_no_step
    assert REFUSED in refusal(config(**place, **OTHERS))


def test_a_run_without_a_status_counts_as_unfinished(tmp_path: Path) -> None:
    RunFolder(config(tmp_path)).begin()
    (tmp_path / "status.json").unlink()
    assert not RunFolder(config(tmp_path)).already_finished()
    assert REFUSED in refusal(config(tmp_path, **OTHERS))


def test_begin_writes_the_settings_of_now_and_leaves_metrics_and_checkpoints_as_they_are(place: dict[str, Any]) -> None:
    run = RunFolder(config(**place))
    run.begin()
    run.store.write("metrics.jsonl", b'{"step": 2, "loss": 1.0}\n')
    checkpoint(run.store, 2)
    run.write_status("interrupted", "SIGTERM", 2)
    RunFolder(config(**place, train={"max_steps": 9})).begin()
    assert RunFolder(config(**place)).old == config(**place, train={"max_steps": 9})
    assert run.store.read("metrics.jsonl") == b'{"step": 2, "loss": 1.0}\n'
    assert Checkpoints(run.store).manifest(2).step == 2
    assert found(run.store) == {"state": "running", "reason": "", "step": 2, "checkpoint": 2, "restarts": 0}


def test_the_newest_checkpoint_of_a_status_is_one_with_a_good_manifest(place: dict[str, Any]) -> None:
    store = RunFolder(config(**place)).store
    for step in (2, 4, 6):
        checkpoint(store, step)
    Checkpoints(store).folder(4).write("manifest.json", b"{}")
    Checkpoints(store).folder(6).remove("manifest.json")
    Checkpoints(store).write(6, "rank.safetensors", b"x")
    run = RunFolder(config(**place))
    run.begin()
    assert (run.checkpoint, found(store)["checkpoint"]) == (2, 2)


def test_a_status_from_before_there_were_checkpoints_is_read(tmp_path: Path) -> None:
    finished(config(tmp_path))
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(
        json.dumps({name: status[name] for name in ("state", "reason", "step", "updated")})
    )
    again = RunFolder(config(tmp_path))
    assert again.already_finished()
    assert again.status and (again.status.checkpoint, again.status.restarts) == (0, 0)


def test_a_run_that_is_lost_again_and_again_without_a_new_checkpoint_fails(place: dict[str, Any]) -> None:
    """Lost: nobody wrote its end, so its status is still "running"."""
    asked = config(**place, checkpoint={"max_restarts": 2})
    store = RunFolder(asked).store
    checkpoint(store, 5)
    for restarts in (0, 1, 2):
        RunFolder(asked).begin()
        assert (found(store)["state"], found(store)["restarts"]) == ("running", restarts)
    said = "lost 3 times without a new checkpoint since step 5 (checkpoint.max_restarts is 2)"
    with pytest.raises(JobError) as fault:
        RunFolder(asked).begin()
    assert str(fault.value) == f"the run was {said}. Look for the cause, then start it again"
    assert fault.value.exit_code == 1
    assert found(store) == {"state": "failed", "reason": said, "step": 5, "checkpoint": 5, "restarts": 3}
    RunFolder(asked).begin()  # somebody looked for the cause
    assert (found(store)["state"], found(store)["restarts"]) == ("running", 0)


def test_a_new_checkpoint_makes_the_losses_before_it_forgotten(place: dict[str, Any]) -> None:
    asked = config(**place, checkpoint={"max_restarts": 1})
    store = RunFolder(asked).store
    for step in (1, 2, 3):
        RunFolder(asked).begin()
        RunFolder(asked).begin()
        assert (found(store)["step"], found(store)["restarts"]) == (step - 1, 1)
        checkpoint(store, step)
    RunFolder(asked).begin()
    assert (found(store)["checkpoint"], found(store)["restarts"]) == (3, 0)


@pytest.mark.parametrize("state", ["interrupted", "failed", "finished"])
def test_a_run_that_said_its_end_was_not_lost(place: dict[str, Any], state: Any) -> None:
    asked = config(**place, checkpoint={"max_restarts": 0})
    for _ in range(3):
        run = RunFolder(asked)
        run.begin()
        run.write_status(state, "", 2)
    assert found(run.store)["restarts"] == 0


def test_without_restarts_a_run_that_was_lost_once_fails(tmp_path: Path) -> None:
    asked = config(tmp_path, checkpoint={"max_restarts": 0})
    RunFolder(asked).begin()
    with pytest.raises(JobError, match="lost 1 times without a new checkpoint since step 0"):
        RunFolder(asked).begin()


def test_an_abandoned_run_failed_at_the_last_step_of_its_metrics(place: dict[str, Any]) -> None:
    run = RunFolder(config(**place))
    checkpoint(run.store, 2)
    run.begin()
    run.store.write("metrics.jsonl", b'{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    later = datetime.now(UTC) + timedelta(minutes=1)
    RunFolder(config(**place)).abandon("worker 0 was ended by SIGKILL", later)
    assert found(run.store)["state"] == "running", "another one wrote that before"
    RunFolder(config(**place)).abandon("worker 0 was ended by SIGKILL", later - timedelta(hours=1))
    expected = {"state": "failed", "reason": "worker 0 was ended by SIGKILL", "step": 3, "checkpoint": 2, "restarts": 0}
    assert found(run.store) == expected
    RunFolder(config(**place)).abandon("a second word", later - timedelta(hours=1))
    assert found(run.store) == expected


def test_what_a_launcher_knows_replaces_that_another_rank_ended(place: dict[str, Any]) -> None:
    run = RunFolder(config(**place))
    checkpoint(run.store, 2)
    run.begin()
    begun = datetime.now(UTC) - timedelta(minutes=1)
    run.write_status("failed", f"{LOST_RANK} after step 2, or cannot be reached; what it said tells why", 2)
    RunFolder(config(**place)).abandon("2 workers of 1 CPU could not be placed", begun)
    expected = {"state": "failed", "reason": "2 workers of 1 CPU could not be placed"}
    assert {name: found(run.store)[name] for name in expected} == expected
    run.write_status("failed", "the loss of step 2 is not finite", 2)
    RunFolder(config(**place)).abandon("worker 0 ended with 1", begun)
    assert found(run.store)["reason"] == "the loss of step 2 is not finite", "it knew by itself"


def test_files_and_folders_of_others_are_refused_and_left_alone(place: dict[str, Any]) -> None:
    store = RunFolder(config(**place)).store
    store.write("thesis.txt", b"precious")
    store.child("photos").write("a.jpg", b"x")
    assert refusal(config(**place)) == (
        f"output.url: {place['url']} holds files that are no run (photos, thesis.txt). Use an empty or a new folder"
    )
    assert store.names() == ["thesis.txt"]


def test_a_folder_with_only_hidden_files_or_a_lease_is_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".gitkeep").touch()
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease/00000001.json").touch()
    assert not RunFolder(config(tmp_path)).already_finished()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    assert "holds files that are no run (out)" in refusal(config(tmp_path / "out"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.yaml", b"model: {"),
        ("run.yaml", b"\xff"),
        ("run.yaml", b"lora: {colour: red}"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    finished(config(tmp_path))
    (tmp_path / name).write_bytes(content)
    said = refusal(config(tmp_path))
    assert "holds a run that this version cannot read" in said and said.endswith("Use another output.url")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"output.url: .* cannot be written: "):
        RunFolder(config(tmp_path / "file/out")).begin()


def test_an_unknown_kind_of_url_is_refused() -> None:
    assert refusal(config("ftpx://host/out")).startswith("output.url: ftpx://host/out: ValueError: Protocol not known")


def test_a_missing_bucket_is_refused_by_name(s3: S3) -> None:
    assert refusal(config("s3://no-such-bucket/run", storage=s3.storage)) == (
        "output.url: s3://no-such-bucket/run: there is no bucket no-such-bucket. Create it or use another"
    )


def test_a_folder_that_may_not_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(OutputError, match=r"cannot be written\. Use a folder that is yours"):
        RunFolder(config(tmp_path / "a/b"))
