"""The rows of a run: those that are trained on and those that are held out."""

import threading
from collections.abc import Sequence
from itertools import islice

import numpy as np

from job.config import RunConfig
from job.data.rows import Row, read_rows, rows_of
from job.data.shards import Shard, list_shards, shard_rows
from job.errors import DataError

FIRST = 1000
"""Rows of a stream that stand for all of it where people look at them."""
FIRST_PIECE = 1 << 18
"""Bytes of a request for them."""


def read_split(config: RunConfig) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows); the latter are empty without evaluation. Of a stream only the first are read.

    Raises:
        DataError: a source is missing, broken or empty, or the share holds out none or all.
    """
    if config.data.streaming:
        return first_rows(config, stream_shards(config), FIRST), read_held_out(config)
    with rows_of("data.train"):
        rows = read_rows(config.data.train, config.storage)
    if config.evaluation.share:
        return split_rows(rows, config.evaluation.share, config.train.seed)
    return rows, read_held_out(config)


def read_held_out(config: RunConfig) -> list[Row]:
    """The rows of evaluation.file; none without it.

    Raises:
        DataError: a source is missing, broken or empty.
    """
    if config.evaluation.file is None:
        return []
    with rows_of("evaluation.file"):
        return read_rows(config.evaluation.file, config.storage)


def stream_shards(config: RunConfig) -> tuple[Shard, ...]:
    """The files of data.train.

    Raises:
        DataError: one is missing or cannot be streamed.
    """
    with rows_of("data.train"):
        return list_shards(config.data.train, config.storage)


def first_rows(config: RunConfig, shards: Sequence[Shard], count: int) -> list[Row]:
    """The first rows of a stream, before any shuffling.

    Raises:
        DataError: a file is broken, or there is no row at all.
    """
    rows: list[Row] = []
    with rows_of("data.train"):
        for shard in shards:
            found = shard_rows(shard, config.storage, 0, threading.Event(), FIRST_PIECE)
            rows += islice(found, count - len(rows))
            if len(rows) == count:
                break
        if not rows:
            raise DataError(f"no rows in {len(shards)} files. Expected at least one")
    return rows


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): a random share, a function of `seed` alone; both keep the file's order.

    Raises:
        DataError: one of the two would be empty.
    """
    count = round(len(rows) * share)
    if not 0 < count < len(rows):
        raise DataError(
            f"evaluation.share: {share} of {len(rows)} rows holds out {count}, expected at least 1 and fewer than all. "
            "Change the share, or give evaluation.file"
        )
    held = set(np.random.default_rng((seed, 2**31)).permutation(len(rows))[:count].tolist())
    return [row for place, row in enumerate(rows) if place not in held], [rows[place] for place in sorted(held)]
