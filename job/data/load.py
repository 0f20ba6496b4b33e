"""From settings to the training and held-out data of a run."""

from collections.abc import Callable
from dataclasses import dataclass

from job.chat import chat_format
from job.config import RunConfig
from job.data.batches import Batches
from job.data.encode import Encoder, Tokens
from job.data.rows import Row, rows_of
from job.data.split import read_split
from job.errors import DataError, InputError
from job.formats import format_of
from job.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encodings:
    """A run's rows as tokens; `how` says by which formats, `held_out` is None without evaluation."""

    how: str
    train: Tokens
    held_out: Tokens | None


Share = Callable[[Callable[[], Encodings]], Encodings]
"""Has one rank do something and gives what comes of it to all."""


@dataclass(frozen=True)
class Dataset:
    """A run's batches; `held_out` is None without evaluation."""

    how: str
    train: Batches
    held_out: Batches | None

    def report(self) -> list[str]:
        """What was read, as what, and what was lost, in sentences."""
        named = [("train", self.train)]
        if self.held_out is not None:
            named.append(("held out", self.held_out))
        lines = [self.how]
        for name, batches in named:
            tokens, sequences = batches.tokens, len(batches.epoch(0))
            fates = ", ".join(f"{number} {fate}" for fate, number in sorted(tokens.fate.items()))
            lines.append(
                f"{name}: {sum(tokens.fate.values())} rows ({fates}), {int(tokens.lengths.sum()):,} tokens, "
                f"longest {int(tokens.lengths.max())}, {sequences} sequences"
            )
        return lines


def load_dataset(config: RunConfig, tokenizer: Tokenizer, share: Share = lambda encode: encode()) -> Dataset:
    """Read, encode and divide the rows.

    Args:
        share: with several ranks, has the first of them read and encode for all.

    Raises:
        DataError: a source is missing, broken or empty, or a row lacks fields; names file, row and fields.
    """
    found = share(lambda: _encodings(config, tokenizer))
    data, train = config.data, config.train

    def batches(tokens: Tokens) -> Batches:
        return Batches(tokens, data.max_length, data.packing, data.shuffle, train.seed, train.global_batch_size)

    return Dataset(found.how, batches(found.train), None if found.held_out is None else batches(found.held_out))


def _encodings(config: RunConfig, tokenizer: Tokenizer) -> Encodings:
    rows, held_out = read_split(config)
    encoder = make_encoder(config, tokenizer, rows[0])
    with rows_of("data.train"):
        train = encoder.encode_all(rows)
    if not held_out:
        return Encodings(f"format {encoder.name}, {encoder.chat.name}", train, None)
    with rows_of("evaluation"):
        return Encodings(f"format {encoder.name}, {encoder.chat.name}", train, encoder.encode_all(held_out))


def make_encoder(config: RunConfig, tokenizer: Tokenizer, first: Row) -> Encoder:
    """The encoder for rows like `first`.

    Raises:
        InputError: the format is unknown or cannot be recognised.
    """
    try:
        name, kind = format_of(config.data.format, config.data.template, first.fields)
    except InputError as fault:
        raise DataError(f"{first.where}: {fault}") from fault
    return Encoder(config.data, kind, name, tokenizer, chat_format(tokenizer, config.data.template))
