"""Rows into tokens: format, chat encoding, truncation, and a count of what was lost on the way."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from job.chat import TURNS, ChatFormat, Encoded, encode, without_eos
from job.config.learning import Data
from job.data.rows import Row
from job.data.truncate import fit, windows
from job.errors import DataError
from job.formats import Format, learn_last, segments_of
from job.tokenizer import Tokenizer
from job.turns import Segment


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

    def select(self, places: Sequence[int]) -> "Tokens":
        """The sequences at `places`, in that order."""
        pairs = [self[place] for place in places]
        return _tokens(
            [list(ids) for ids, _ in pairs], [list(learn) for _, learn in pairs], self.rows[list(places)], self.fate
        )


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

    def encode_all(self, rows: Sequence[Row]) -> Tokens:
        """All rows, with `data.workers` processes.

        Raises:
            DataError: a row cannot be used, or no row has anything to learn.
        """
        table = datasets.Dataset.from_dict(
            {"where": [row.where for row in rows], "fields": [json.dumps(row.fields) for row in rows]}
        )
        datasets.disable_progress_bars()
        workers = min(self.data.workers, len(rows))
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
        kept = [place for place, ids in enumerate(done["ids"]) if ids]
        if not kept:
            raise nothing_to_learn(Counter(done["fate"]))
        columns = done.select(kept)
        fate = Counter(fate for fate in done["fate"] if fate)
        return _tokens(columns["ids"], columns["learn"], np.array(columns["row"]), fate)

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


def _tokens(ids: Sequence[list[int]], learn: Sequence[list[bool]], rows: np.ndarray, fate: Counter[str]) -> Tokens:
    offsets = np.cumsum([0, *map(len, ids)])
    return Tokens(
        np.fromiter((token for part in ids for token in part), np.int32, offsets[-1]),
        np.fromiter((mark for part in learn for mark in part), bool, offsets[-1]),
        offsets,
        rows,
        fate,
    )


def nothing_to_learn(fates: Counter[str]) -> DataError:
    """The refusal of rows that were all dropped, with the reasons."""
    return DataError(f"none of the {fates.total()} rows has anything to learn: {listed(fates)}")


def listed(fates: Counter[str]) -> str:
    """What happened to how many rows, the most frequent first."""
    return ", ".join(f"{number} {fate}" for fate, number in fates.most_common())
