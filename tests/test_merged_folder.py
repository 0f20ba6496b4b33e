"""A finished merge that lost something is written again, no more of it than that; one that is whole is left alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from job.merged_folder import MARKER, MergedFolder
from tests.conftest import make_tokenizer
from tests.test_merge import base, merged
from tests.tuned import base_logits, tuned


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """The folder of a finished merge in several files."""
    tuned(base("tied", tmp_path / "base"), tmp_path / "adapter")
    make_tokenizer(tmp_path / "base")
    merged(tmp_path / "adapter", tmp_path / "out")
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, halve])
@pytest.mark.parametrize(
    "name", ["model-00001-of-", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.j"]
)
def test_what_is_missing_or_cut_off_is_written_again(done: Path, damage: Callable[[Path], None], name: str) -> None:
    before, (lost,) = contents(done), [file for file in done.iterdir() if file.name.startswith(name)]
    damage(lost)
    said = merged(done.parent / "adapter", done)
    assert said[0] == f"the merge was finished, but {lost.name} is not whole any more: written again"
    assert contents(done) == before
    others = [file for file in before if file.endswith(".safetensors") and file != lost.name]
    assert {f"{file} is there already" for file in others} <= set(said)
    assert merged(done.parent / "adapter", done) == [f"model: {done}"]


def test_all_that_is_lost_is_named_and_what_is_left_works(done: Path) -> None:
    expected = base_logits(done)
    lost = [file for file in sorted(done.iterdir()) if file.name.endswith(".safetensors")]
    for file in lost:
        file.unlink()
    said = merged(done.parent / "adapter", done)
    names = ", ".join(file.name for file in lost)
    assert said[0] == f"the merge was finished, but {names} is not whole any more: written again"
    assert bool((base_logits(done) == expected).all())


def test_until_it_is_whole_again_it_is_no_model(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = next(done.glob("model-00001-of-*"))
    lost.unlink()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MergedFolder, "write_weights", killed)
        merged(done.parent / "adapter", done)
    assert not (done / "config.json").exists()
    assert json.loads((done / MARKER).read_bytes())["state"] == "running"
    merged(done.parent / "adapter", done)
    assert lost.exists() and (done / "config.json").exists()


def test_a_small_file_that_somebody_changed_stays_as_it_is(done: Path) -> None:
    (done / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert merged(done.parent / "adapter", done) == [f"model: {done}"]
    assert (done / "generation_config.json").read_text() == '{"eos_token_id": 7}'
