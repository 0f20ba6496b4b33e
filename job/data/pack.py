"""Which rows share a sequence, and in which order sequences come: pure functions of lengths, seed and epoch."""

import bisect
from collections.abc import Sequence

import numpy as np

WINDOW = 1024
"""Rows among which partners are looked for: enough to fill over 99% of the slots with short rows, few enough to stay
shuffled."""


def epoch_order(
    lengths: Sequence[int] | np.ndarray,
    max_length: int,
    packing: bool,
    shuffle: bool,
    seed: int,
    epoch: int,
    block: int = 0,
) -> list[list[int]]:
    """The sequences of one epoch, or of one block of a streamed one, each a list of row places.

    Args:
        lengths: tokens of every row.
        max_length: slots of a sequence.
        packing: several rows a sequence, or one.
        shuffle, seed, epoch, block: rows are permuted by a generator seeded with (seed, epoch, block) alone.
    """
    generator = np.random.default_rng((seed, epoch, block))  # block 0 is the series of (seed, epoch)
    order = generator.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if not packing:
        return [[int(row)] for row in order]
    sequences = []
    carried: list[int] = []
    for start in range(0, len(order), WINDOW):
        rows = carried + [int(row) for row in order[start : start + WINDOW]]
        packed = (_best_fit if shuffle else _next_fit)(rows, lengths, max_length)
        if start + WINDOW < len(order):  # the one that is filled least finds partners in the next window
            used = [sum(int(lengths[row]) for row in part) for part in packed]
            carried = packed.pop(used.index(min(used)) if shuffle else -1)
        turn = generator.permutation(len(packed)) if shuffle else range(len(packed))
        sequences += [packed[int(place)] for place in turn]
    return sequences


def _next_fit(rows: list[int], lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """In order: a row that does not fit the sequence begins the next one."""
    sequences: list[list[int]] = []
    room = 0
    for row in rows:
        if lengths[row] > room:
            sequences.append([])
            room = max_length
        sequences[-1].append(row)
        room -= int(lengths[row])
    return sequences


def _best_fit(rows: list[int], lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Best-fit decreasing: the longest row first, each into the fullest sequence that still has room."""
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free slots, sequence), sorted
    for row in sorted(rows, key=lambda row: -lengths[row]):
        length = int(lengths[row])
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            free, sequence = max_length, len(sequences)
            sequences.append([])
        else:
            free, sequence = room.pop(place)
        sequences[sequence].append(row)
        bisect.insort(room, (free - length, sequence))
    return sequences
