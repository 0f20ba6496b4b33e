"""From settings to the training and held-out data of a run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from job.chat import chat_format
from job.config import RunConfig
from job.data.batches import Batches
from job.data.encode import Encoder
from job.data.rows import Row
from job.data.split import read_split
from job.errors import DataError, InputError
from job.formats import format_of
from job.tokenizer import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """A run's rows, encoded; `held_out` is None without evaluation."""

    encoder: Encoder
    train_rows: Sequence[Row]
    held_out_rows: Sequence[Row]
    train: Batches
    held_out: Batches | None

    def report(self) -> list[str]:
        """What was read, as what, and what was lost, in sentences."""
        named = [("train", self.train_rows, self.train)]
        if self.held_out is not None:
            named.append(("held out", self.held_out_rows, self.held_out))
        lines = [f"format {self.encoder.name}, {self.encoder.chat.name}"]
        for name, rows, batches in named:
            lengths = batches.tokens.lengths
            fates = ", ".join(f"{number} {fate}" for fate, number in sorted(batches.tokens.fate.items()))
            sequences = len(batches.epoch(0))
            lines.append(
                f"{name}: {len(rows)} rows ({fates}), {int(lengths.sum()):,} tokens, longest {int(lengths.max())}, "
                f"{sequences} sequences"
            )
        return lines


def load_dataset(config: RunConfig, tokenizer: Tokenizer) -> Dataset:
    """Read, encode and divide the rows.

    Raises:
        DataError: a source is missing, broken or empty, or a row lacks fields; names file, row and fields.
    """
    rows, held_out = read_split(config)
    encoder = make_encoder(config, tokenizer, rows[0])
    return Dataset(
        encoder,
        rows,
        held_out,
        _batches(config, encoder, rows, "data.train"),
        _batches(config, encoder, held_out, "evaluation") if held_out else None,
    )


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


def _batches(config: RunConfig, encoder: Encoder, rows: Sequence[Row], name: str) -> Batches:
    with rows_of(name):
        tokens = encoder.encode_all(rows)
    data, train = config.data, config.train
    return Batches(tokens, data.max_length, data.packing, data.shuffle, train.seed, train.global_batch_size)


@contextmanager
def rows_of(setting: str) -> Iterator[None]:
    """Puts the setting that named the rows in front of what is wrong with them."""
    try:
        yield
    except DataError as fault:
        raise DataError(f"{setting}: {fault}") from fault
