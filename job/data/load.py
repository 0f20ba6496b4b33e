"""From settings to the training and held-out data of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread

import pyarrow

from job.chat import chat_format
from job.config import RunConfig
from job.data.batches import Batches, Fits
from job.data.encode import Encoder, Tokens, tokens_of
from job.data.kept import Kept
from job.data.rows import Row, rows_of
from job.data.shards import Shard
from job.data.split import first_rows, read_held_out, read_split, stream_shards
from job.data.stream import Share, Stream
from job.errors import DataError, InputError
from job.formats import format_of
from job.tokenizer import Tokenizer

Table = Callable[[Encoder, Sequence[Row]], pyarrow.Table]


@dataclass(frozen=True)
class Encodings:
    """A run's rows as tokens; `how` says by which formats, and what was kept of them; `held_out` is None without
    evaluation."""

    how: list[str]
    train: Tokens
    held_out: Tokens | None


@dataclass(frozen=True)
class Dataset:
    """A run's batches; `held_out` is None without evaluation, `kept` where no rows were read."""

    how: list[str]
    train: Batches | Stream
    held_out: Batches | None
    kept: Kept | None = None

    def report(self) -> list[str]:
        """What was read, as what, and what was lost, in sentences; of a stream, what will be read."""
        held_out = [] if self.held_out is None else [f"held out: {self.held_out.report()}"]
        return [*self.how, f"train: {self.train.report()}", *held_out]

    def keep(self, say: Callable[[str], None]) -> Thread | None:
        """Have tokens that were made now written where the next start finds them; on the rank that made them."""
        return None if self.kept is None else self.kept.keep(say)

    def check(self, fits: Fits) -> None:
        """Have all rows judged: those in memory now, a stream's as they come."""
        for batches in (self.train, self.held_out):
            if batches is not None:
                batches.check(fits)


def load_dataset(config: RunConfig, tokenizer: Tokenizer, share: Share = lambda encode: encode()) -> Dataset:
    """Read, encode and divide the rows; with data.streaming, list the training files and read none but the first row.

    Args:
        share: with several ranks, has the first of them read and encode for all.

    Raises:
        DataError: a source is missing, broken or empty, or a row lacks fields; names file, row and fields.
    """
    data, train = config.data, config.train

    def batches(tokens: Tokens | None) -> Batches | None:
        if tokens is None:
            return None
        return Batches(tokens, data.max_length, data.packing, data.shuffle, train.seed, train.global_batch_size)

    if data.streaming:
        readers: list[Encoder] = []  # only on the rank that reads

        def open_stream() -> tuple[list[str], tuple[Shard, ...], Tokens | None]:
            how, shards, held_out, encoder = _open_stream(config, tokenizer)
            readers.append(encoder)
            return how, shards, held_out

        how, shards, held_out = share(open_stream)
        return Dataset(how, Stream(shards, config, readers[0] if readers else None, share), batches(held_out))
    kept: list[Kept] = []  # only on the rank that reads

    def encode() -> Encodings:
        kept.append(Kept(config))
        return _encodings(config, tokenizer, kept[0])

    found: Encodings = share(encode)
    trained = batches(found.train)
    assert trained is not None
    return Dataset(found.how, trained, batches(found.held_out), kept[0] if kept else None)


def _encodings(config: RunConfig, tokenizer: Tokenizer, kept: Kept) -> Encodings:
    rows, held_out = read_split(config)
    encoder = make_encoder(config, tokenizer, rows[0])
    with rows_of("data.train"):
        train = tokens_of(kept.table(encoder, rows))
    held = _held_out(encoder, held_out, kept.table)
    return Encodings([_how(encoder), *kept.said], train, held)


def _open_stream(
    config: RunConfig, tokenizer: Tokenizer
) -> tuple[list[str], tuple[Shard, ...], Tokens | None, Encoder]:
    """(by which formats, the files, held-out tokens, the encoder)."""
    shards = stream_shards(config)
    encoder = make_encoder(config, tokenizer, first_rows(config, shards, 1)[0])
    return [_how(encoder)], shards, _held_out(encoder, read_held_out(config), Encoder.table), encoder


def _how(encoder: Encoder) -> str:
    return f"format {encoder.name}, {encoder.chat.name}"


def _held_out(encoder: Encoder, rows: Sequence[Row], table: Table) -> Tokens | None:
    with rows_of("evaluation"):
        return tokens_of(table(encoder, rows)) if rows else None


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
