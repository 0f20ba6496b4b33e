"""Rows read while training: an order that seed, epoch and block define, and going on exactly from any cursor."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.config import RunConfig
from job.data.batches import Batches, GlobalBatch
from job.data.load import Dataset, load_dataset
from job.data.shards import RangedFile
from job.data.split import read_split
from job.data.stream import Stream
from job.errors import DataError, ModelError
from job.tokenizer import Tokenizer
from tests.conftest import alpaca_rows, losses, metrics, settings, write_rows
from tests.forked import Done
from tests.forked import run as command
from tests.huge import HUGE, LINE
from tests.ranks import run_ranks
from tests.test_config import faults

Open = Callable[..., Stream]
ROWS = alpaca_rows(61)
SIZES = (20, 17, 0, 24)
"""Rows of each shard; one is empty."""
MORE = {"max_steps": 9, "global_batch_size": 4}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(str(tiny_model))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with the rows in four files."""
    folder, rows = tmp_path / "shards", iter(ROWS)
    folder.mkdir()
    for number, size in enumerate(SIZES):
        write_rows(folder / f"{number}.jsonl", islice(rows, size))
    return folder


def config_of(rows: Path | str, **sections: Mapping[str, Any]) -> RunConfig:
    return RunConfig.model_validate(settings("owner/model", rows, "runs/x", **sections))


def dataset(tokenizer: Tokenizer, rows: Path | str, streaming: bool, **sections: Mapping[str, Any]) -> Dataset:
    data = {"streaming": streaming, "shuffle_buffer": 10, **sections.get("data", {})}
    train = {**MORE, **sections.get("train", {})}
    return load_dataset(config_of(rows, **{**sections, "data": data, "train": train}), tokenizer)


@pytest.fixture
def opened(tokenizer: Tokenizer, shards: Path) -> Open:
    """A stream of the shards; keyword arguments are sections."""

    def make(rows: Path | str = shards, /, **sections: Mapping[str, Any]) -> Stream:
        stream = dataset(tokenizer, rows, True, **sections).train
        assert isinstance(stream, Stream)
        return stream

    return make


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(file, start, stop) of every request."""
    found: list[tuple[str, int, int]] = []
    read = RangedFile._read

    def noted(self: RangedFile, start: int, stop: int) -> bytes:
        found.append((Path(self.path).name, start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(RangedFile, "_read", noted)
    return found


def rows_of(batch: GlobalBatch) -> list[tuple[int, ...]]:
    """The ids of each row."""
    assert batch.encoded is not None
    return [tuple(batch.encoded[row][0].tolist()) for sequence in batch.sequences for row in sequence]


def epoch(batches: Iterator[GlobalBatch], number: int = 0) -> list[GlobalBatch]:
    """All batches of an epoch."""
    found = []
    for batch in batches:
        if batch.cursor["epoch"] >= number:
            found.append(batch)
        if batch.cursor["epoch"] == number + 1:
            return found[number > 0 :]  # the first one only ends the epoch before
    raise AssertionError("no end")


def same(one: GlobalBatch, other: GlobalBatch, data: Any, other_data: Any) -> bool:
    """Whether two batches give two ranks the same arrays, at the same step."""
    shares = [
        [micro for rank in range(2) for micro in source.share(batch, rank, 2, 3)]
        for batch, source in ((one, data), (other, other_data))
    ]
    counts = [(batch.step, batch.learnt, batch.tokens, batch.rows) for batch in (one, other)]
    return counts[0] == counts[1] and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(*shares, strict=True)
        for name in ("ids", "targets", "positions", "rows")
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_the_rows_that_are_read_into_memory(
    tokenizer: Tokenizer, shards: Path, opened: Open, packing: bool, shuffle: bool
) -> None:
    how = {"packing": packing, "shuffle": shuffle}
    known = dataset(tokenizer, shards, False, data=how).train
    assert isinstance(known, Batches)
    wanted = sorted(tuple(known.tokens[place][0].tolist()) for place in range(61))
    for number in range(2):
        through = epoch(opened(data=how).from_step(0), number)
        assert sorted(row for batch in through for row in rows_of(batch)) == wanted
        assert all(len(batch.sequences) == 4 for batch in through[:-1])
        assert 1 <= len(through[-1].sequences) <= 4
        assert through[-1].epoch == number + 1
        assert all(number < one.epoch <= two.epoch < number + 1 for one, two in pairwise(through[:-1]))


def test_a_buffer_for_all_rows_of_one_file_gives_the_batches_of_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    known, stream = (
        dataset(tokenizer, file, streaming, data={"shuffle_buffer": 61}).train for streaming in (False, True)
    )
    for one, other in islice(zip(known.from_step(0), stream.from_step(0), strict=False), 40):
        assert same(one, other, known, stream)
    assert one.epoch > 2


def test_without_shuffling_rows_come_in_the_order_of_the_files_across_blocks(
    tokenizer: Tokenizer, opened: Open
) -> None:
    plain = {"shuffle": False, "packing": False}
    found = [row for batch in epoch(opened(data=plain).from_step(0)) for row in rows_of(batch)]
    encoder = opened().encoder
    assert encoder is not None
    firsts = [encoder.tokenizer.decode(row) for row in found]
    assert [f"Count to {n}." in text for n, text in enumerate(firsts)] == [True] * 61


def test_the_order_depends_on_seed_and_epoch_and_block_alone(opened: Open) -> None:
    def order(seed: int, number: int) -> str:
        return str([rows_of(batch) for batch in epoch(opened(train={"seed": seed}).from_step(0), number)])

    assert len({order(seed, number) for seed in (1, 2) for number in (0, 1)}) == 4
    assert order(2, 1) == order(2, 1)


def test_how_fast_batches_are_taken_changes_none(opened: Open) -> None:
    dice = np.random.default_rng(0)
    hasty = [batch.cursor | {"rows": rows_of(batch)} for batch in islice(opened().from_step(0), 30)]
    slow = []
    for batch in islice(opened().from_step(0), 30):
        slow.append(batch.cursor | {"rows": rows_of(batch)})
        time.sleep(float(dice.random()) / 50)
    assert hasty == slow


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [4, 25])
def test_every_cursor_goes_on_with_exactly_the_batches_that_were_left(
    opened: Open, packing: bool, shuffle: bool, size: int
) -> None:
    sections = {"data": {"packing": packing, "shuffle": shuffle}, "train": {"global_batch_size": size}}
    sections["train"]["micro_batch_size"] = 1
    stream = opened(**sections)
    batches = stream.from_step(0)
    through: list[GlobalBatch] = []
    while not through or through[-1].cursor["epoch"] < 2:
        through.append(next(batches))
    assert [batch.step for batch in through] == list(range(len(through)))
    for place, batch in enumerate(through[:-1], 1):
        cursor = json.loads(json.dumps(batch.cursor))
        assert cursor["step"] == place
        again = opened(**sections)
        for left, other in zip(through[place:], again.from_step(place, cursor), strict=False):
            assert left == other, "counts, epoch, sequences and cursor"
            assert same(left, other, stream, again)


def test_without_a_cursor_the_batches_before_a_step_are_passed_over(opened: Open) -> None:
    fifth = next(islice(opened().from_step(0), 5, None))
    assert next(opened().from_step(5)) == fifth


def test_a_cursor_is_a_few_numbers(opened: Open) -> None:
    batch = next(islice(opened().from_step(0), 7, None))
    assert set(batch.cursor) == {"step", "epoch", "shard", "row", "block", "sequences"}
    assert len(json.dumps(batch.cursor)) < 100
    assert all(type(value) is int for value in batch.cursor.values())


def test_going_on_opens_no_shard_that_was_passed(opened: Open, reads: list[Any], shards: Path) -> None:
    plain = {"data": {"shuffle": False, "packing": False, "shuffle_buffer": 4}}
    cursor = next(batch.cursor for batch in opened(**plain).from_step(0) if batch.cursor["shard"] == 3)
    stream = opened(**plain)
    reads.clear()
    batches = stream.from_step(cursor["step"], cursor)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert {name for name, _, _ in reads} == {"3.jsonl"}
    assert sum(stop - start for _, start, stop in reads) == (shards / "3.jsonl").stat().st_size


def test_other_rows_than_before_are_refused_when_going_on(opened: Open, shards: Path) -> None:
    plain = {"data": {"shuffle": False, "packing": False}}
    cursor = next(batch.cursor for batch in opened(**plain).from_step(0) if batch.cursor["sequences"] == 6)
    assert (cursor["shard"], cursor["row"]) == (0, 10)
    nothing = {"instruction": "Say nothing.", "output": ""}
    write_rows(shards / "0.jsonl", [*ROWS[:10], *[nothing] * 10])
    with pytest.raises(DataError, match=r"^data\.train: block 1 of epoch 0 has 0 sequences, expected more than the 6 "):
        next(opened(**plain).from_step(cursor["step"], cursor))
    write_rows(shards / "0.jsonl", ROWS[:9])
    with pytest.raises(DataError, match=r"^data\.train: .*0\.jsonl: has 9 rows, expected the 10 that were read before"):
        next(opened(**plain).from_step(cursor["step"], cursor))
    for number in (1, 2, 3):
        (shards / f"{number}.jsonl").unlink()
    with pytest.raises(DataError, match=r"^data\.train: has 1 files, expected more than 3 as when the run stopped\. "):
        next(opened(**plain).from_step(9, {**cursor, "shard": 3}))


def test_a_file_larger_than_any_disk_is_read_no_further_than_one_block_ahead(
    opened: Open, reads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = 1 << 14
    monkeypatch.setattr("job.data.shards.PIECE", piece)
    stream = opened(HUGE, data={"shuffle_buffer": 1000})
    assert stream.report() == "streaming 1 shard, 1,048,576.0 MiB, shuffled among 1,000 rows"
    reads.clear()
    batches = stream.from_step(0)
    next(batches)
    time.sleep(1.0)  # a reader that went further would have the time
    assert 1000 * LINE <= sum(stop - start for _, start, stop in reads) <= 2000 * LINE + piece
    batches.close()  # type: ignore[attr-defined]


def test_what_people_look_at_of_a_stream_are_its_first_rows(reads: list[Any]) -> None:
    rows, held_out = read_split(config_of(HUGE, data={"streaming": True}))
    assert [row.where for row in rows[:2]] == [f"{HUGE} line 1", f"{HUGE} line 2"]
    assert (len(rows), held_out) == (1000, [])
    assert sum(stop - start for _, start, stop in reads) < 1 << 19


def test_the_thread_that_reads_ends_with_the_batches(opened: Open) -> None:
    batches = opened().from_step(0)
    next(batches)
    assert "stream" in {thread.name for thread in threading.enumerate()}
    batches.close()  # type: ignore[attr-defined]
    assert "stream" not in {thread.name for thread in threading.enumerate()}


def test_only_a_rank_that_reads_has_an_encoder_and_all_get_its_batches(tokenizer: Tokenizer, shards: Path) -> None:
    given: list[Any] = []

    def give(act: Callable[[], Any]) -> Any:
        given.append(act())
        return given[-1]

    config = config_of(shards, data={"streaming": True}, train=MORE)
    first = load_dataset(config, tokenizer, give)
    taken = iter(list(given))
    second = load_dataset(config, tokenizer, lambda act: next(taken))
    assert isinstance(second.train, Stream)
    assert second.train.encoder is None
    wanted = list(islice(first.train.from_step(0), 5))
    taken = iter(given[1:])
    assert list(islice(second.train.from_step(0), 5)) == wanted
    assert first.report() == second.report()


def test_rows_are_counted_by_what_happened_to_them(opened: Open, tmp_path: Path) -> None:
    nothing = {"instruction": "Say nothing.", "output": ""}
    file = write_rows(tmp_path / "rows.jsonl", [*ROWS[:5], *[nothing] * 30, *ROWS[5:7]])
    stream = opened(file)
    epoch(stream.from_step(0))
    assert dict(stream.fate) == {"kept": 7, "dropped: nothing to learn": 30}


def test_a_stream_that_teaches_nothing_ends_after_an_epoch(opened: Open, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Say nothing.", "output": ""}] * 25)
    with pytest.raises(DataError) as refused:
        next(opened(file).from_step(0))
    message = "data.train: none of the 25 rows has anything to learn: 25 dropped: nothing to learn"
    assert str(refused.value) == message


def test_rows_that_the_model_cannot_take_are_refused_in_their_block(opened: Open) -> None:
    def fits(largest: int, longest: int, rows: str) -> None:
        if largest > 300 or longest > 200:
            raise ModelError(f"{rows} {longest} tokens")

    stream = opened()
    stream.check(fits)
    with pytest.raises(ModelError, match=r"^a row has \d+ tokens$"):
        next(stream.from_step(0))
    with pytest.raises(ModelError, match=r"^streamed rows may have 201 tokens$"):
        opened(data={"max_length": 201}).check(fits)


def test_other_rows_have_another_fingerprint(tokenizer: Tokenizer, shards: Path, opened: Open) -> None:
    def fingerprints() -> list[str]:
        return [dataset(tokenizer, shards, streaming).train.fingerprint for streaming in (False, True)]

    before = fingerprints()
    assert fingerprints() == before
    assert {len(text) for text in before} == {64}
    write_rows(shards / "0.jsonl", [*ROWS[:19], {"instruction": "Count.", "output": "one"}])
    assert all(one != other for one, other in zip(before, fingerprints(), strict=True))


def test_an_epoch_of_a_stream_has_no_known_number_of_steps(opened: Open) -> None:
    with pytest.raises(DataError, match=r"^data\.streaming: nobody knows how many steps 2 epochs are\. Set train\.max"):
        opened().steps(2)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            (),
            "data.streaming: nobody knows how many steps an epoch has before it was read. Set train.max_steps",
        ),
        (
            ("train.max_steps=3", "evaluation.share=0.1"),
            "evaluation.share: takes rows from all of data.train, which data.streaming never holds. Put them into a "
            "file of their own and set evaluation.file",
        ),
        (
            ("train.max_steps=3", "data.workers=2"),
            "data.workers: 2 processes, but a stream becomes tokens in a thread of the first rank. Use 1, or set "
            "data.streaming: false",
        ),
    ],
)
def test_settings_that_a_stream_cannot_have_are_refused(overrides: tuple[str, ...], fault: str) -> None:
    assert faults("data.streaming=true", *overrides) == (fault,)


STREAMED = {"streaming": True, "shuffle_buffer": 10}


@pytest.fixture
def trained(run_file: Callable[..., Path], shards: Path) -> Callable[..., tuple[Path, list[Done]]]:
    """A finished `qlora train` over the shards; keyword arguments are sections."""

    def train(name: str, ranks: int = 1, **sections: Mapping[str, Any]) -> tuple[Path, list[Done]]:
        data = {"train": str(shards), **sections.pop("data", {})}
        config = run_file(name, data=data, **sections)
        done = run_ranks(ranks, "train", config)
        assert [one.code for one in done] == [0] * ranks, "\n".join(one.err[-3000:] for one in done)
        return config.parent / "out" / name, done

    return train


def test_two_ranks_have_the_losses_of_one(trained: Callable[..., Any], tmp_path: Path) -> None:
    held_out = {"file": str(write_rows(tmp_path / "held.jsonl", ROWS[:6]))}
    batches = {"micro_batch_size": 1, "max_steps": 12}
    alone, done = trained("alone", data=STREAMED, evaluation=held_out, train=batches)
    both, _ = trained("both", 2, data=STREAMED, evaluation=held_out, train=batches)
    assert "train: streaming 4 shards, 0.0 MiB, shuffled among 10 rows" in done[0].err + done[0].out
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(alone)) == 12
    assert [row["eval_loss"] for row in metrics(both) if "eval_loss" in row] == pytest.approx(
        [row["eval_loss"] for row in metrics(alone) if "eval_loss" in row], rel=1e-5
    )


def test_a_run_goes_on_within_a_block_on_other_ranks(
    trained: Callable[..., Any], run_file: Callable[..., Path]
) -> None:
    sections = {"data": STREAMED, "train": {"micro_batch_size": 1, "schedule": "constant", "warmup_steps": 0}}
    whole, _ = trained("whole", **sections | {"train": sections["train"] | {"max_steps": 11}})
    broken, _ = trained("broken", 2, **sections | {"train": sections["train"] | {"max_steps": 5}})
    done = run_ranks(1, "train", whole.parent.parent / "broken.yaml", "train.max_steps=11")
    assert done[0].code == 0, done[0].err
    assert "going on after step 5" in done[0].err
    assert len(losses(broken)) == 11
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_an_unshuffled_stream_trains_as_the_rows_in_memory_do(trained: Callable[..., Any], packing: bool) -> None:
    how = {"shuffle": False, "packing": packing}
    memory, _ = trained("memory", data=how)
    # a buffer that holds all rows: packing fills sequences from one block alone
    stream, _ = trained("stream", data={**how, "streaming": True, "shuffle_buffer": 61})
    assert losses(stream) == pytest.approx(losses(memory), rel=1e-6)
    assert all(map(math.isfinite, losses(stream)))
    assert losses(stream)[-1] < losses(stream)[0]


def test_a_broken_shard_ends_a_run_of_two_ranks_with_its_name(run_file: Callable[..., Path], shards: Path) -> None:
    with (shards / "3.jsonl").open("a") as file:
        file.write("{broken\n")
    config = run_file("run", data={"train": str(shards), **STREAMED}, train={"max_steps": 50})
    done = run_ranks(2, "train", config)
    assert [one.code for one in done] == [2, 2]
    assert f"data.train: {shards}/3.jsonl line 25: broken JSON" in done[0].err


def test_plan_and_data_read_no_stream_to_its_end(run_file: Callable[..., Path], shards: Path) -> None:
    (shards / "3.jsonl").write_text("{broken\n" * 2000)
    config = run_file("run", data={"train": f"{shards}/*.jsonl", **STREAMED, "shuffle_buffer": 10})
    planned = command("plan", config)
    assert (planned.code, "3 (train.max_steps)" in planned.out) == (0, True)
    write_rows(shards / "2.jsonl", alpaca_rows(1000))
    shown = command("data", config, "--rows", "1")
    assert shown.code == 0, shown.err
    assert f"{shards}/0.jsonl line 1: " in shown.out
    assert "train, first rows of the stream: 1000 rows (1000 kept)" in shown.out
