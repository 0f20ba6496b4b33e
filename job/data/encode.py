"""Rows into tokens: format, chat encoding, truncation, and a count of what was lost on the way."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from job.chat import TURNS, ChatFormat, Encoded, encode, without_eos
from job.config.learning import Data
from job.data.rows import Row
from job.data.truncate import fit, windows
from job.errors import DataError
from job.formats import Format, learn_last, segments_of
from job.tokenizer import Tokenizer
from job.turns import Segment
from job.world import cores

ROWS_A_WORKER, MOST_WORKERS = 4000, 16
"""Rows that are worth a process of their own, which takes a second to start; and processes at most."""


@dataclass(frozen=True)
class Tokens:
    """All sequences of a data set: `ids` (int32) and `learn` (bool) flat, sequence i at offsets[i]:offsets[i + 1].

    `rows` says which row each came from; `fate` counts rows by what happened to them.
    """

    ids: np.ndarray
    learn: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    fate: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a sequence."""
        return np.diff(self.offsets)

    def __getitem__(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[place], self.offsets[place + 1])
        return self.ids[part], self.learn[part]


class Encoder:
    """Turns rows into learnable sequences of at most `data.max_length` tokens.

    Args:
        data: the settings.
        kind, name: the format and its name.
        tokenizer, chat: how text becomes ids.
    """

    def __init__(self, data: Data, kind: Format, name: str, tokenizer: Tokenizer, chat: ChatFormat):
        self.data, self.kind, self.name, self.tokenizer, self.chat = data, kind, name, tokenizer, chat
        self.eos = str(tokenizer.inner.eos_token)

    def segments(self, row: Row) -> list[Segment]:
        """The row's segments, without an eos that is written as text at their end.

        Raises:
            DataError: fields are missing or wrong; names the row and what was found.
        """
        return without_eos(self._written(row), self.eos)

    def _written(self, row: Row) -> list[Segment]:
        try:
            segments = segments_of(self.kind, self.name, row.fields)
        except ValueError as fault:
            raise DataError(f"{row.where}: {fault}") from fault
        return learn_last(segments) if self.data.learn == "last" else segments

    def encode(self, row: Row) -> tuple[list[list[Encoded]], str]:
        """The row's sequences, and its fate: kept, truncated: ..., split: ... or dropped: ..."""
        written = self._written(row)
        segments = without_eos(written, self.eos)
        if not any(part.learn and part.role != "markup" and part.content.strip() for part in segments):
            return [], "dropped: nothing to learn"
        try:
            made = [self._sequences(talk) for talk in self.talks(segments)]
        except ValueError as fault:
            raise DataError(f"{row.where}: {fault}") from fault
        fate = next((fate for _, fate in made if fate != "kept"), "kept")
        if fate == "kept" and segments != written:
            fate = "kept without the eos text at the end"
        elif fate == "kept" and len(made) > 1:
            fate = "kept as a sequence for each answer"
        return [parts for sequences, _ in made for parts in sequences], fate

    def talks(self, segments: list[Segment]) -> list[list[Segment]]:
        """The row as it is learnt: whole, or a conversation for each answer."""
        return (self.chat.talks(segments) if segments[0].role in TURNS else []) or [segments]

    def _sequences(self, segments: list[Segment]) -> tuple[list[list[Encoded]], str]:
        parts = encode(segments, self.tokenizer, self.chat)
        limit = self.data.max_length
        if _length(parts) <= limit:
            return [parts], "kept"
        if all(part.learn or part.markup for part in parts) and self.name == "text":
            ids = [token for part in parts for token in part.ids]
            whole = [window for window in windows(ids, limit) if len(window) > 1]  # one token predicts nothing
            return [[Encoded(window, False, True)] for window in whole], "split: text over max_length"
        shortened = self._without_old_turns(segments, limit)
        if not any(part.learn and part.ids and not part.markup for part in shortened):
            return [], "dropped: over max_length, and only its oldest turns are learnt"
        cut = fit(shortened, limit)
        return ([cut], "truncated: over max_length") if cut else ([], "dropped: the chat format alone fills max_length")

    def _without_old_turns(self, segments: list[Segment], limit: int) -> list[Encoded]:
        """Leave out the oldest exchanges of a long conversation while that is enough; the last always stays."""
        parts = encode(segments, self.tokenizer, self.chat)
        while _length(parts) > limit:
            users = [place for place, segment in enumerate(segments) if segment.role == "user"]
            if len(users) < 2:
                break
            segments = segments[: users[0]] + segments[users[1] :]
            parts = encode(segments, self.tokenizer, self.chat)
        return parts

    def identity(self) -> str | None:
        """All that decides what becomes of a row, as text; None where that is somebody's program."""
        tokens = self.tokenizer.identity()
        if tokens is None or ":" in self.name:
            return None
        data = self.data
        return json.dumps([tokens, self.name, self.chat.name, data.template, data.learn, data.max_length])

    def table(self, rows: Sequence[Row]) -> pyarrow.Table:
        """A line a sequence: its `ids`, which of them to `learn`, its `row`, that row's `fate`. A row that was dropped
        has a line without ids, and the second sequence of a row an empty fate.

        Raises:
            DataError: a row cannot be used.
        """
        table = datasets.Dataset.from_dict(
            {"where": [row.where for row in rows], "fields": [json.dumps(row.fields) for row in rows]}
        )
        datasets.disable_progress_bars()
        workers = self._workers(len(rows))
        environment = os.environ
        try:
            done = table.map(
                self._encode_batch,
                batched=True,
                with_indices=True,
                keep_in_memory=True,
                remove_columns=["where", "fields"],
                num_proc=workers if workers > 1 else None,
                features=_COLUMNS,  # else they are guessed from the first rows, which may all be dropped
                new_fingerprint="tokens",
            )
        finally:
            # with processes, datasets leaves a copy in its place, whose changes nobody sees who holds the original
            os.environ = environment  # noqa: B003
        return done.with_format("arrow")[:]

    def _workers(self, rows: int) -> int:
        if self.data.workers != "auto":
            return min(self.data.workers, rows)
        if ":" in self.name:  # a program of the user's, which may remember rows
            return 1
        return min(rows // ROWS_A_WORKER, cores(), MOST_WORKERS)

    def _encode_batch(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"ids": [], "learn": [], "row": [], "fate": []}
        for index, where, fields in zip(indices, batch["where"], batch["fields"], strict=True):
            sequences, fate = self.encode(Row(where, json.loads(fields)))
            for number, parts in enumerate(sequences or [[]]):
                out["ids"].append([token for part in parts for token in part.ids])
                out["learn"].append([part.learn for part in parts for _ in part.ids])
                out["row"].append(index)
                out["fate"].append("" if number else fate)
        return out


_COLUMNS = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),
        "learn": datasets.List(datasets.Value("bool")),
        "row": datasets.Value("int64"),
        "fate": datasets.Value("string"),
    }
)


def _length(parts: Sequence[Encoded]) -> int:
    return sum(len(part.ids) for part in parts)


def tokens_of(table: pyarrow.Table) -> Tokens:
    """The lines of `Encoder.table` as flat arrays.

    Raises:
        DataError: no row has anything to learn.
    """
    counts = table["fate"].value_counts().to_pylist()
    fate = Counter({count["values"]: count["counts"] for count in counts if count["values"]})
    lengths = pyarrow.compute.list_value_length(table["ids"]).to_numpy()
    if not lengths.any():
        raise nothing_to_learn(fate)
    offsets = np.concatenate([[0], lengths[lengths > 0]]).cumsum(dtype=np.int64)
    rows = table["row"].to_numpy()[lengths > 0]
    return Tokens(_flat(table["ids"], np.int32), _flat(table["learn"], np.bool_), offsets, rows, fate)


def _flat(column: pyarrow.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    """The values of all lists, one behind the other; joined here, since Arrow's own joining ends at 2**31 of them."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).astype(dtype, copy=False)


def nothing_to_learn(fates: Counter[str]) -> DataError:
    """The refusal of rows that were all dropped, with the reasons."""
    return DataError(f"none of the {fates.total()} rows has anything to learn: {listed(fates)}")


def listed(fates: Counter[str]) -> str:
    """What happened to how many rows, the most frequent first."""
    return ", ".join(f"{number} {fate}" for fate, number in fates.most_common())
