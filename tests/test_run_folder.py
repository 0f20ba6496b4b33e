"""The run's folder: the same run again, another run, an unfinished one, somebody else's files, and its status."""

import json
import os
import secrets
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from job.config import RunConfig, parse_config
from job.errors import OutputError
from job.run_folder import RunFolder
from job.sinks import JsonlSink, read_metrics
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
    status = json.loads(run.store.read("status.json"))
    assert {**status, "updated": ""} == {"state": "running", "reason": "", "step": 0, "updated": ""}
    assert datetime.fromisoformat(status["updated"]).tzinfo is not None


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


def test_a_finished_run_that_should_grow_is_refused(tmp_path: Path) -> None:
    finished(config(tmp_path))
    assert refusal(config(tmp_path, train={"max_steps": 9})) == (
        f"output.url: {tmp_path} holds a finished run\n  train.max_steps: 3 there, 9 here\n"
        "  This version cannot continue it. Use another output.url"
    )


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
def test_an_unfinished_run_cannot_be_resumed_and_says_so(place: dict[str, Any], state: Any) -> None:
    run = RunFolder(config(**place))
    run.begin()
    run.write_status(state, "SIGINT", 2)
    assert refusal(config(**place)) == (
        f"output.url: {place['url']} holds an unfinished run ({state} at step 2), and this version cannot resume one. "
        "Use another output.url, or delete the folder"
    )


@pytest.mark.parametrize("state", ["interrupted", "failed"])
def test_a_run_that_ended_before_its_first_step_may_be_started_again_with_any_settings(
    place: dict[str, Any], state: Any
) -> None:
    run = RunFolder(config(**place))
    run.begin()
    sink = JsonlSink(run.store)
    sink.row({"step": 0, "eval_loss": 4.0})
    sink.close()
    run.write_status(state, "the GPU's memory ran out", 0)
    again = RunFolder(config(**place, lora={"rank": 8}))
    assert not again.already_finished()
    again.begin()
    assert read_metrics(again.store) == []
    assert RunFolder(config(**place)).old == config(**place, lora={"rank": 8})


def test_a_run_without_a_status_counts_as_unfinished(tmp_path: Path) -> None:
    RunFolder(config(tmp_path)).begin()
    (tmp_path / "status.json").unlink()
    assert "an unfinished run (without a status)" in refusal(config(tmp_path))


def test_files_and_folders_of_others_are_refused_and_left_alone(place: dict[str, Any]) -> None:
    store = RunFolder(config(**place)).store
    store.write("thesis.txt", b"precious")
    store.child("photos").write("a.jpg", b"x")
    assert refusal(config(**place)) == (
        f"output.url: {place['url']} holds files that are no run (photos, thesis.txt). Use an empty or a new folder"
    )
    assert store.names() == ["thesis.txt"]


def test_a_folder_with_only_hidden_files_is_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".gitkeep").touch()
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
        ("status.json", b"{"),
        ("status.json", b"[]"),
    ],
)
def test_a_run_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
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
