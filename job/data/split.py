"""The rows of a run: those that are trained on and those that are held out."""

from collections.abc import Sequence

import numpy as np

from job.config import RunConfig
from job.data.rows import Row, read_rows, rows_of
from job.errors import DataError


def read_split(config: RunConfig) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows); the latter are empty without evaluation.

    Raises:
        DataError: a source is missing, broken or empty, or the share holds out none or all.
    """
    with rows_of("data.train"):
        rows = read_rows(config.data.train, config.storage)
    if config.evaluation.file is not None:
        with rows_of("evaluation.file"):
            return rows, read_rows(config.evaluation.file, config.storage)
    if config.evaluation.share:
        return split_rows(rows, config.evaluation.share, config.train.seed)
    return rows, []


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
