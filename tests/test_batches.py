"""Packing and batches: pure functions of seed and epoch, the same union whatever the ranks."""

from itertools import islice

import numpy as np
import pytest

from job.data.batches import IGNORED, Batches, MicroBatch
from job.data.encode import Tokens
from job.data.pack import epoch_order

MAX_LENGTH = 64


def tokens(count: int = 90, seed: int = 0) -> Tokens:
    """Rows of 2 to 40 tokens, of which the later ones are learnt; no id is used twice."""
    dice = np.random.default_rng(seed)
    lengths = dice.integers(2, 40, count)
    offsets = np.cumsum([0, *lengths])
    learn = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    return Tokens(np.arange(1, offsets[-1] + 1, dtype=np.int32), learn, offsets, np.arange(count))


def batches(packing: bool = True, shuffle: bool = True, seed: int = 7, global_batch_size: int = 6) -> Batches:
    return Batches(tokens(), MAX_LENGTH, packing, shuffle, seed, global_batch_size)


def spread(micro_batch: MicroBatch) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Ids, targets and positions of each row, by its place in the global batch."""
    return {
        int(place): tuple(
            part[micro_batch.rows == place].tolist()
            for part in (micro_batch.ids, micro_batch.targets, micro_batch.positions)
        )  # type: ignore[misc]
        for place in np.unique(micro_batch.rows)
        if place >= 0
    }


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once_in_sequences_that_fit(packing: bool, shuffle: bool) -> None:
    lengths = np.random.default_rng(1).integers(1, MAX_LENGTH + 1, 2500)
    for epoch in range(2):
        order = epoch_order(lengths, MAX_LENGTH, packing, shuffle, 5, epoch)
        assert sorted(row for sequence in order for row in sequence) == list(range(2500))
        assert max(lengths[sequence].sum() for sequence in order) <= MAX_LENGTH
        assert packing or all(len(sequence) == 1 for sequence in order)


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(packing: bool) -> None:
    lengths = tokens().lengths
    orders = {
        (seed, epoch): str(epoch_order(lengths, MAX_LENGTH, packing, True, seed, epoch))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert str(epoch_order(lengths, MAX_LENGTH, packing, True, 2, 1)) == orders[2, 1]


def test_without_shuffling_every_epoch_keeps_the_order_of_the_file() -> None:
    lengths = tokens().lengths
    assert epoch_order(lengths, MAX_LENGTH, False, False, 1, 3) == [[row] for row in range(len(lengths))]
    assert epoch_order(lengths, MAX_LENGTH, True, False, 1, 3) == epoch_order(lengths, MAX_LENGTH, True, False, 2, 0)


@pytest.mark.parametrize(("rows", "max_length"), [(1500, 2048), (5000, 512), (5000, 2048), (20_000, 8192)])
def test_short_rows_fill_almost_every_slot(rows: int, max_length: int) -> None:
    lengths = np.random.default_rng(0).lognormal(4.8, 0.5, rows).astype(int).clip(16, 512)
    order = epoch_order(lengths, max_length, True, True, 0, 0)
    assert lengths.sum() / (len(order) * max_length) > 0.99


def test_rows_that_find_no_partners_in_a_window_keep_their_place_without_shuffling() -> None:
    order = epoch_order(np.full(2500, 5), MAX_LENGTH, True, False, 0, 0)
    assert [row for sequence in order for row in sequence] == list(range(2500))
    assert {len(sequence) for sequence in order[:-1]} == {MAX_LENGTH // 5}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_micro_batches_together_are_the_global_batch(packing: bool, world_size: int, size: int) -> None:
    data = batches(packing)
    for batch in islice(data.from_step(0), data.steps_in(0) + 1):
        shares = [data.share(batch, rank, world_size, size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1, "every rank takes part in every reduction"
        rows: dict[int, tuple[list[int], list[int], list[int]]] = {}
        for micro_batch in (micro_batch for share in shares for micro_batch in share):
            assert len(micro_batch.ids) <= size
            assert not rows.keys() & spread(micro_batch).keys()
            rows |= spread(micro_batch)
        wanted = [row for sequence in batch.sequences for row in sequence]
        assert sorted(rows) == list(range(len(wanted)))
        for place, row in enumerate(wanted):
            ids, learn = data.tokens[row]
            targets = [int(token) if learnt else IGNORED for token, learnt in zip(ids[1:], learn[1:], strict=True)]
            assert rows[place] == (ids.tolist(), [*targets, IGNORED], list(range(len(ids))))
        learnt = sum(int((m.targets != IGNORED).sum()) for share in shares for m in share)
        assert (batch.learnt, batch.rows) == (learnt, len(wanted))
        assert batch.tokens == sum(len(data.tokens[row][0]) for row in wanted)


@pytest.mark.parametrize("packing", [True, False])
def test_padding_is_a_document_of_its_own_from_which_nothing_is_learnt(packing: bool) -> None:
    data = batches(packing)
    padded = 0
    for batch in islice(data.from_step(0), 4):
        for micro_batch in data.share(batch, 0, 1, 3):
            padding = micro_batch.rows == -1
            padded += int(padding.sum())
            assert (micro_batch.targets[padding] == IGNORED).all()
            starts = (micro_batch.rows[:, 1:] != micro_batch.rows[:, :-1]).nonzero()
            assert (micro_batch.positions[:, 0] == 0).all()
            assert (micro_batch.positions[:, 1:][starts] == 0).all(), "positions restart at each row and at the padding"
            assert (micro_batch.rows != -1).any(axis=0).all(), "no longer than the longest of the micro-batch"
    assert padded


def test_a_rank_without_rows_gets_a_token_that_teaches_nothing() -> None:
    data = batches(global_batch_size=1)
    (nothing,) = data.share(next(data.from_step(0)), 1, 2, 1)
    assert nothing.ids.shape == (1, 1)
    assert nothing.targets.tolist() == [[IGNORED]]
    assert nothing.rows.tolist() == [[-1]]


def test_any_step_can_be_the_first() -> None:
    data = batches()
    through = list(islice(data.from_step(0), 2 * data.steps_in(0) + 3))
    assert [batch.step for batch in through] == list(range(len(through)))
    for step in (1, data.steps_in(0), data.steps_in(0) + 2):
        assert next(data.from_step(step)) == through[step]


def test_every_epoch_gives_all_rows_and_counts_up_to_its_whole_number() -> None:
    data = batches()
    steps = [data.steps_in(0), data.steps_in(1)]
    through = list(islice(data.from_step(0), sum(steps)))
    for epoch, part in ((1, through[: steps[0]]), (2, through[steps[0] :])):
        assert sorted(row for batch in part for sequence in batch.sequences for row in sequence) == list(range(90))
        assert part[-1].epoch == epoch
    assert all(len(batch.sequences) <= 6 for batch in through)


def test_steps_of_a_part_of_an_epoch_are_rounded_up() -> None:
    data = batches(packing=False, global_batch_size=9)
    assert [data.steps(epochs) for epochs in (1, 3, 0.5, 0.01, 1.25)] == [10, 30, 5, 1, 13]


def test_an_evaluation_sees_all_rows_in_one_batch_whatever_the_seed() -> None:
    batch = batches(seed=1).in_order()
    assert batch == batches(seed=2).in_order()
    assert sorted(row for sequence in batch.sequences for row in sequence) == list(range(90))
    assert batch.learnt == sum(int(tokens()[row][1][1:].sum()) for row in range(90))
