"""A stream's rows in blocks: so many rows of the raw stream, encoded, then shuffled and packed among themselves.

The raw stream of an epoch is the rows of its shards, whose order is a function of seed and epoch. Where a block begins
is all that must be known to make it again.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from job.config import RunConfig
from job.data.encode import Encoder, Tokens
from job.data.files import Row
from job.data.pack import epoch_order
from job.data.rows import rows_of
from job.data.shards import Shard, shard_rows
from job.errors import DataError

Check = Callable[[Tokens], None]


@dataclass(frozen=True)
class Position:
    """Where a block begins: `row` rows of the epoch's shard number `shard` (in that epoch's order) are passed."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    block: int = 0


@dataclass(frozen=True)
class Block:
    """`order` lists the sequences, as places in `tokens`; `passed` is the share of the epoch's bytes that lie in shards
    read through before this block and after it; `last` says that the epoch ends with it."""

    begin: Position
    tokens: Tokens
    order: list[list[int]]
    passed: tuple[float, float]
    last: bool


def read_blocks(
    shards: Sequence[Shard],
    config: RunConfig,
    encoder: Encoder,
    begin: Position,
    given_up: threading.Event,
    check: Check,
) -> Iterator[Block]:
    """The blocks from one on, without end, epoch after epoch.

    Args:
        given_up: once set, no further row is read.
        check: hears the tokens of every block, and refuses them by an error.

    Raises:
        DataError: a shard or row is broken, shorter than it was, or cannot be used; names shard and line.
        JobError: the storage did not answer for too long.
    """
    at = begin
    while not given_up.is_set():
        if at.shard >= len(shards):
            raise DataError(
                f"data.train: has {len(shards)} files, expected more than {at.shard} as when the run stopped. Put the "
                "files back that the run began with, or begin a new run at another output.url"
            )
        order = shard_order(len(shards), config.data.shuffle, config.train.seed, at.epoch)
        raw = _raw([shards[place] for place in order], config, at, given_up)
        last = False
        while not last:
            block, end = _block(raw, [shards[place].size for place in order], config, encoder, at)
            check(block.tokens)
            yield block
            last, at = block.last, end
        at = Position(at.epoch + 1)


def shard_order(count: int, shuffle: bool, seed: int, epoch: int) -> list[int]:
    """The places of the shards in the order in which an epoch reads them."""
    if not shuffle:
        return list(range(count))
    # 2**31 is no block, so that this is another series than any block's
    return [int(place) for place in np.random.default_rng((seed, epoch, 2**31)).permutation(count)]


def _raw(
    shards: Sequence[Shard], config: RunConfig, at: Position, given_up: threading.Event
) -> Iterator[tuple[Row, int, int]]:
    """(row, its shard's place in the epoch, rows of that shard up to and with it) of the rest of an epoch."""
    for place in range(at.shard, len(shards)):
        number = at.row if place == at.shard else 0
        with rows_of("data.train"):
            for row in shard_rows(shards[place], config.storage, number, given_up):
                if given_up.is_set():
                    return
                number += 1
                yield row, place, number


def _block(
    raw: Iterator[tuple[Row, int, int]], sizes: Sequence[int], config: RunConfig, encoder: Encoder, at: Position
) -> tuple[Block, Position]:
    """The next block, and where the one after it begins."""
    most, end, count = config.data.shuffle_buffer, at, 0
    ids, learn, rows = [np.zeros(0, np.int32)], [np.zeros(0, bool)], []
    fate = Counter[str]()
    for row, shard, number in islice(raw, most):
        with rows_of("data.train"):
            sequences, what = encoder.encode(row)
        fate[what] += 1
        for parts in sequences:
            ids.append(np.array([token for part in parts for token in part.ids], np.int32))
            learn.append(np.array([part.learn for part in parts for _ in part.ids], bool))
            rows.append(count)
        end, count = replace(end, shard=shard, row=number), count + 1
    offsets = np.cumsum([len(part) for part in ids])
    tokens = Tokens(np.concatenate(ids), np.concatenate(learn), offsets, np.array(rows, np.int64), fate)
    data, seed = config.data, config.train.seed
    order = epoch_order(tokens.lengths, data.max_length, data.packing, data.shuffle, seed, at.epoch, at.block)
    total = max(sum(sizes), 1)
    passed = (sum(sizes[: at.shard]) / total, sum(sizes[: end.shard]) / total)
    return Block(at, tokens, order, passed, count < most), replace(end, block=at.block + 1)
