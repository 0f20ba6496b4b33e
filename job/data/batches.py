"""Global batches, defined by seed and step alone, and each rank's share of them as arrays.

A padded tail is one more document that nothing is learnt from, so no attention mask is ever needed: transformers
isolates documents by restarting positions, exactly, when it gets positions and no mask.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np

from job.data.encode import Tokens
from job.data.pack import epoch_order

Fits = Callable[[int, int, str], None]
"""Refuses (largest id, longest row in tokens, what the rows are called) that the model cannot take."""
IGNORED = -100
"""A target that is not learnt (torch's cross entropy skips it)."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward sees; all arrays are [B, T].

    `targets` holds the next token where it is learnt, else IGNORED. `positions` restart at each row. `rows` is the
    place of each token's row in the global batch, -1 for padding.
    """

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences of one optimizer step, over all ranks; `learnt` and `tokens` are global counts.

    `cursor` says in JSON's types where the data go on after it. `encoded` holds the rows of a batch that was streamed,
    by their places in `sequences`; other batches' rows stay where they are.
    """

    step: int
    epoch: float
    sequences: Sequence[Sequence[int]]
    learnt: int
    tokens: int
    rows: int
    cursor: Mapping[str, Any] = field(default_factory=dict)
    encoded: Tokens | None = field(default=None, compare=False)


class Batches:
    """Random access to the global batches of a run.

    Args:
        tokens: the encoded rows.
        max_length, packing, shuffle, seed: see `data` and `train` settings.
        global_batch_size: sequences a step; an epoch's last batch may hold fewer.
    """

    def __init__(
        self, tokens: Tokens, max_length: int, packing: bool, shuffle: bool, seed: int, global_batch_size: int
    ):
        self.tokens, self.size = tokens, global_batch_size
        self.how = (max_length, packing, shuffle, seed)
        self._learnt = np.array([learnable(tokens[place][1]) for place in range(len(tokens))])
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[list[int]]:
        max_length, packing, shuffle, seed = self.how
        return epoch_order(self.tokens.lengths, max_length, packing, shuffle, seed, epoch)

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(len(self.epoch(epoch)) / self.size)

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many epochs; a part of an epoch is rounded up to whole steps."""
        whole = sum(self.steps_in(epoch) for epoch in range(int(epochs)))
        return whole + math.ceil((epochs % 1) * self.steps_in(int(epochs)))

    def from_step(self, step: int, cursor: Mapping[str, Any] | None = None) -> Iterator[GlobalBatch]:
        """The batches from `step` on (the first is 0), without end, epoch after epoch.

        Args:
            cursor: the one of the batch before; here it says nothing that `step` does not.
        """
        epoch, passed = 0, 0
        while True:
            steps = self.steps_in(epoch)
            for place in range(max(step - passed, 0), steps):
                sequences = self.epoch(epoch)[place * self.size : (place + 1) * self.size]
                yield self._batch(passed + place, epoch + (place + 1) / steps, sequences)
            epoch, passed = epoch + 1, passed + steps

    def _batch(self, step: int, epoch: float, sequences: Sequence[Sequence[int]]) -> GlobalBatch:
        rows = [row for sequence in sequences for row in sequence]
        return GlobalBatch(
            step,
            epoch,
            sequences,
            int(self._learnt[rows].sum()),
            int(self.tokens.lengths[rows].sum()),
            len(rows),
            {"step": step + 1},
        )

    def in_order(self) -> GlobalBatch:
        """All sequences as one batch, packed but not shuffled: what an evaluation sees."""
        max_length, packing, _, seed = self.how
        return self._batch(0, 0.0, epoch_order(self.tokens.lengths, max_length, packing, False, seed, 0))

    def share(self, batch: GlobalBatch, rank: int, world_size: int, size: int) -> list[MicroBatch]:
        """This rank's micro-batches; see `micro_batches`."""
        return micro_batches(self.tokens, batch.sequences, rank, world_size, size)

    def check(self, fits: Fits) -> None:
        """Have the rows judged, all of them now."""
        fits(int(self.tokens.ids.max()), int(self.tokens.lengths.max()), "a row has")

    def report(self) -> str:
        """What was read and lost, in a sentence."""
        tokens = self.tokens
        fates = ", ".join(f"{number} {fate}" for fate, number in sorted(tokens.fate.items()))
        return (
            f"{sum(tokens.fate.values())} rows ({fates}), {int(tokens.lengths.sum()):,} tokens, "
            f"longest {int(tokens.lengths.max())}, {len(self.epoch(0))} sequences"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids, learn marks and offsets: other rows have another."""
        tokens = self.tokens
        parts = (tokens.ids.astype("<i4"), tokens.learn.astype(bool), tokens.offsets.astype("<i8"))
        return sha256(b"".join(sha256(part.tobytes()).digest() for part in parts)).hexdigest()


def micro_batches(
    tokens: Tokens, sequences: Sequence[Sequence[int]], rank: int, world_size: int, size: int
) -> list[MicroBatch]:
    """A rank's micro-batches: sequence i goes to micro-batch i // size, those in turn to the ranks.

    Every rank gets equally many, so that all take part in every reduction; where the sequences run out, a
    micro-batch is one token that nothing is learnt from.

    Args:
        tokens: the encoded rows, of which `sequences` has the places.
        size: sequences a micro-batch.
    """
    places = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    numbered = [(sequence, int(first)) for sequence, first in zip(sequences, places, strict=False)]
    groups = [numbered[start : start + size] for start in range(0, len(numbered), size)]
    groups += [[]] * (-len(groups) % world_size)
    return [_micro_batch(tokens, group) for group in groups[rank::world_size]]


def _micro_batch(tokens: Tokens, sequences: Sequence[tuple[Sequence[int], int]]) -> MicroBatch:
    columns = [_sequence(tokens, rows, first) for rows, first in sequences] or [_NOTHING]
    longest = max(len(column[0]) for column in columns)
    padded = [_pad(column, longest) for column in columns]
    return MicroBatch(*(np.stack([row[i] for row in padded]) for i in range(4)))


def _sequence(tokens: Tokens, rows: Sequence[int], first: int) -> tuple[np.ndarray, ...]:
    ids, targets, positions, places = [], [], [], []
    for place, row in enumerate(rows, first):
        row_ids, learn = tokens[row]
        ids.append(row_ids)
        targets.append(np.append(np.where(learn[1:], row_ids[1:], IGNORED), IGNORED))
        positions.append(np.arange(len(row_ids)))
        places.append(np.full(len(row_ids), place))
    return tuple(np.concatenate(column) for column in (ids, targets, positions, places))


_NOTHING = (np.zeros(1, np.int64), np.full(1, IGNORED), np.zeros(1, np.int64), np.full(1, -1))


def _pad(column: tuple[np.ndarray, ...], length: int) -> tuple[np.ndarray, ...]:
    ids, targets, positions, places = column
    missing = length - len(ids)
    return (
        np.concatenate([ids, np.zeros(missing, np.int64)]),
        np.concatenate([targets, np.full(missing, IGNORED)]),
        np.concatenate([positions, np.arange(missing)]),
        np.concatenate([places, np.full(missing, -1)]),
    )


def learnable(learn: np.ndarray) -> int:
    """Learnt tokens that have a token before them to be predicted from."""
    return int(learn[1:].sum())
