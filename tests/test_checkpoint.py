"""Checkpoints in a store: whole or not there, whatever happens to their bytes and whoever else writes."""

import json
import multiprocessing
import random
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from job.checkpoint import FORMAT, MANIFEST, Checkpoints, Manifest, Part, Unusable, part_of
from job.config.running import Storage
from job.errors import OutputError
from job.store import Store
from tests.s3 import BUCKET, S3

STEP = 120


@pytest.fixture(params=["file", "memory", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A run's folder on every kind of storage."""
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        return Store(f"s3://{BUCKET}/{uuid4().hex}", Storage(**s3.storage))
    return Store(str(tmp_path / "run") if request.param == "file" else f"memory://{uuid4().hex}")


def written(checkpoints: Checkpoints, step: int = STEP, eval_loss: float | None = None, word: bytes = b"") -> Manifest:
    """A complete checkpoint of two parts."""
    contents = {"rank00000.safetensors": random.Random(step).randbytes(3000) + word, "run.json": b'{"a": 1}' + word}
    parts = tuple(checkpoints.write(step, kind, content) for kind, content in contents.items())
    manifest = Manifest(step, "hash", eval_loss, parts)
    assert checkpoints.publish(manifest)
    return manifest


def verify(checkpoints: Checkpoints, step: int = STEP) -> None:
    """What a resume does first."""
    for part in checkpoints.manifest(step).parts:
        checkpoints.read(step, part)


def test_a_checkpoint_is_there_once_its_manifest_is(run: Store) -> None:
    checkpoints = Checkpoints(run)
    part = checkpoints.write(STEP, "run.json", b"{}")
    assert checkpoints.steps() == [STEP]
    with pytest.raises(Unusable, match=f"it has no {MANIFEST}: whoever wrote it ended before"):
        checkpoints.manifest(STEP)
    manifest = Manifest(STEP, "hash", 1.25, (part,))
    assert checkpoints.publish(manifest)
    assert checkpoints.manifest(STEP) == manifest
    assert checkpoints.read(STEP, part) == b"{}"
    assert run.exists(f"checkpoints/step-00000120/{MANIFEST}")


def test_what_a_dead_writer_left_beside_a_checkpoint_goes(run: Store) -> None:
    checkpoints = Checkpoints(run)
    checkpoints.write(STEP, "run.json", b"half")
    manifest = written(checkpoints)
    assert set(checkpoints.folder(STEP).names()) == {part.name for part in manifest.parts} | {MANIFEST}


def test_the_manifest_is_never_replaced_but_by_its_like(run: Store) -> None:
    checkpoints = Checkpoints(run)
    manifest = written(checkpoints)
    assert checkpoints.publish(manifest), "an answer that was lost is asked for again"
    other = Manifest(STEP, "other", None, manifest.parts)
    assert not checkpoints.publish(other)
    assert checkpoints.manifest(STEP) == manifest
    assert checkpoints.publish(other, replace=True), "it was found unusable"
    assert checkpoints.manifest(STEP) == other


def harmed(content: bytes, dice: random.Random) -> bytes:
    """The content with a flipped bit, or cut, or lengthened."""
    how = dice.randrange(4)
    if how == 0:
        return content[: dice.randrange(len(content))]
    if how == 1:
        return content + dice.randbytes(1 + dice.randrange(8))
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("seed", range(4))
def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path, seed: int) -> None:
    checkpoints, dice = Checkpoints(Store(str(tmp_path))), random.Random(seed)
    written(checkpoints, eval_loss=1.5)
    folder = tmp_path / f"checkpoints/step-{STEP:08d}"
    files = sorted(folder.iterdir())
    for _ in range(250):
        file = dice.choice([*files, folder / MANIFEST, folder / MANIFEST])
        content = file.read_bytes()
        file.write_bytes(harmed(content, dice))
        with pytest.raises(Unusable):
            verify(checkpoints)
        file.write_bytes(content)
    verify(checkpoints)


def test_a_manifest_of_another_step_or_of_a_later_version_is_not_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(str(tmp_path)))
    content = written(checkpoints).content()
    folder = tmp_path / f"checkpoints/step-{STEP:08d}"
    (tmp_path / "checkpoints/step-00000007").mkdir()
    (tmp_path / f"checkpoints/step-00000007/{MANIFEST}").write_bytes(content)
    with pytest.raises(Unusable, match=f"{MANIFEST} is that of step {STEP}"):
        checkpoints.manifest(7)
    values = {**json.loads(content), "format": FORMAT + 1}
    del values["sha256"]
    digest = part_of("x", json.dumps(values).encode()).sha256
    (folder / MANIFEST).write_text(json.dumps({**values, "sha256": digest}))
    with pytest.raises(OutputError, match=f"has format {FORMAT + 1}, this version reads {FORMAT}"):
        checkpoints.manifest(STEP)


def test_each_fault_of_a_part_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(str(tmp_path)))
    part = written(checkpoints).parts[0]
    file = tmp_path / f"checkpoints/step-{STEP:08d}/{part.name}"
    content = file.read_bytes()
    for changed, why in (
        (content[:-1], f"{part.name} has 2999 bytes, expected 3000"),
        (content[:-1] + b"x", f"{part.name} is damaged (its SHA-256 differs)"),
        (None, f"{part.name} is missing"),
    ):
        file.write_bytes(changed) if changed is not None else file.unlink()
        with pytest.raises(Unusable) as raised:
            checkpoints.read(STEP, part)
        assert str(raised.value) == why


def test_the_newest_are_kept_and_the_best_and_nothing_newer_than_the_newest_goes(run: Store) -> None:
    checkpoints = Checkpoints(run)
    for step, eval_loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 2.5)):
        written(checkpoints, step, eval_loss)
    checkpoints.write(45, "run.json", b"partial, and behind the newest")
    checkpoints.write(60, "run.json", b"under way")
    checkpoints.retain(keep=2, best=True)
    assert checkpoints.steps() == [60, 50, 40, 20]
    checkpoints.retain(keep=1, best=False)
    assert checkpoints.steps() == [60, 50]
    checkpoints.folder(50).write(MANIFEST, b"damaged")
    checkpoints.retain(keep=1, best=False)
    assert checkpoints.steps() == [60, 50], "without a complete one nothing goes"


def publish_one(url: str, storage: dict[str, Any], number: int, start: Any, won: Any) -> None:
    """One of several writers of the same step."""
    checkpoints = Checkpoints(Store(url, Storage(**storage)))
    part = checkpoints.write(STEP, "run.json", str(number).encode())
    start.wait()
    won.put((number, checkpoints.publish(Manifest(STEP, "hash", None, (part,)))))


@pytest.mark.parametrize("place", ["file", "s3"])
def test_of_eight_racing_writers_one_wins_and_its_checkpoint_is_whole(place: str, tmp_path: Path, s3: S3) -> None:
    url = str(tmp_path / "run") if place == "file" else f"s3://{BUCKET}/{uuid4().hex}"
    spawned = multiprocessing.get_context("spawn")
    start, won = spawned.Barrier(8), spawned.Queue()
    storage = s3.storage if place == "s3" else {}
    writers = [spawned.Process(target=publish_one, args=(url, storage, n, start, won)) for n in range(8)]
    for writer in writers:
        writer.start()
    answers = dict(won.get(timeout=120) for _ in writers)
    for writer in writers:
        writer.join()
    assert sum(answers.values()) == 1
    (winner,) = (number for number, first in answers.items() if first)
    checkpoints = Checkpoints(Store(url, Storage(**storage)))
    (part,) = checkpoints.manifest(STEP).parts
    assert checkpoints.read(STEP, part) == str(winner).encode()


def test_parts_are_named_by_their_content() -> None:
    one, other = part_of("rank00001.safetensors", b"a"), part_of("rank00001.safetensors", b"b")
    assert one.name != other.name and one == part_of("rank00001.safetensors", b"a")
    assert one.name.startswith("rank00001-") and one.name.endswith(".safetensors")
    assert isinstance(one, Part) and one.size == 1
