"""Rows as the model will see them, the learnt part marked, and what was lost."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from rich.text import Text

from job.chat import Encoded
from job.data.encode import Encoder, listed, nothing_to_learn
from job.data.rows import Row, rows_of
from job.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"
LISTED = 10


def show(encoder: Encoder, train: Sequence[Row], held_out: Sequence[Row], count: int) -> Iterator[Text]:
    """The first `count` training and held-out rows, then how many there are of both and what was lost.

    Of a stream, `train` are its first rows.

    Raises:
        DataError: what training would refuse: a row lacks fields, or none has anything to learn.
    """
    parts = [("", "train, first rows of the stream" if encoder.data.streaming else "train", "data.train", train)]
    if held_out:
        parts.append(("held out, ", "held out", "evaluation", held_out))
    for mark, _, setting, rows in parts:
        with rows_of(setting):
            yield from _rows(encoder, rows[:count], mark)
    for _, name, setting, rows in parts:
        with rows_of(setting):
            yield from _losses(encoder, rows, name)


def _rows(encoder: Encoder, rows: Sequence[Row], mark: str) -> Iterator[Text]:
    """Rows decoded from the very ids that are trained on; learnt text is green, between ⟦ and ⟧."""
    for row in rows:
        sequences, fate = encoder.encode(row)
        for parts in sequences:
            learnt = sum(len(part.ids) for part in parts if part.learn)
            tokens = sum(len(part.ids) for part in parts)
            yield Text(f"{mark}{row.where}: {tokens} tokens, {learnt} learnt, {fate}", style="bold")
            yield _marked(parts, encoder.tokenizer)
        if not sequences:
            yield Text(f"{mark}{row.where}: {fate}", style="bold red")


def _losses(encoder: Encoder, rows: Sequence[Row], name: str) -> Iterator[Text]:
    """Lengths of all rows, then the rows that were dropped or cut, and why."""
    lengths, fates, named = [], Counter[str](), []
    for row in rows:
        sequences, fate = encoder.encode(row)
        lengths += [sum(len(part.ids) for part in parts) for parts in sequences]
        fates[fate] += 1
        if not fate.startswith("kept"):
            named.append(f"  {row.where}: {fate}")
    if not lengths:
        raise nothing_to_learn(fates)
    yield Text(f"{name}: {len(rows)} rows ({listed(fates)})", style="bold")
    shares = np.percentile(lengths, [0, 50, 90, 99, 100]).astype(int)
    yield Text("tokens a row: shortest {}, median {}, 90% {}, 99% {}, longest {}".format(*shares))
    for line in named[:LISTED]:
        yield Text(line)
    if len(named) > LISTED:
        yield Text(f"  and {len(named) - LISTED} more")


def _marked(parts: Sequence[Encoded], tokenizer: Tokenizer) -> Text:
    text = Text()
    learning = False
    run: list[int] = []
    for part in [*parts, None]:
        learn = part.learn if part else False
        if part is None or (learn != learning and part.ids):
            decoded = tokenizer.decode(run)
            text.append(f"{OPEN}{decoded}{CLOSE}" if learning else decoded, style="green" if learning else "")
            run, learning = [], learn
        run += part.ids if part else []
    return text
