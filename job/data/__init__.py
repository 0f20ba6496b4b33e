"""Rows into packed, globally defined batches."""

from job.data.batches import IGNORED, Batches, GlobalBatch, MicroBatch
from job.data.encode import Encoder, Tokens
from job.data.load import Dataset, load_dataset, make_encoder, read_split
from job.data.rows import Row, read_rows

__all__ = [
    "IGNORED",
    "Batches",
    "Dataset",
    "Encoder",
    "GlobalBatch",
    "MicroBatch",
    "Row",
    "Tokens",
    "load_dataset",
    "make_encoder",
    "read_rows",
    "read_split",
]
