"""The files of a stream: which there are, and their rows by ranged reads that are tried again when a network fails."""

import io
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from job.config.running import Storage
from job.data.files import Outage, Row, ending, file_rows, refuse_unknown_kind, shorter
from job.data.rows import files_of, is_hub_id, named, parted
from job.errors import DataError
from job.reading import answer, pause, retry_after_s
from job.store import Store, reason, without_query

PIECE = 8 << 20
"""Bytes of a request where a file is read from its start to its end."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
FINAL = (401, 403, 404, 410)
"""HTTP answers that no second try changes."""


@dataclass(frozen=True)
class Shard:
    """One file of a stream; `size` is in bytes."""

    url: str
    size: int

    @property
    def name(self) -> str:
        """What messages call it, without a signature."""
        return named(self.url)


def list_shards(sources: str | Sequence[str], storage: Storage) -> tuple[Shard, ...]:
    """The files that the sources name, in order; none is opened.

    Raises:
        DataError: one is missing or cannot be streamed: a slice, a hub id, an unknown kind of file.
    """
    found: list[Shard] = []
    for source in [sources] if isinstance(sources, str) else sources:
        bare, split = parted(source)
        if split not in (None, "train"):
            raise DataError(
                f"{without_query(source)}: a slice cannot be streamed. Name whole files, or set data.streaming: false"
            )
        if is_hub_id(bare):
            raise DataError(
                f"{bare}: a hub id cannot be streamed. Name its files, such as "
                f"hf://datasets/{bare}/**/*.parquet, or set data.streaming: false"
            )
        urls = files_of(bare, storage)
        for url in urls:
            refuse_unknown_kind(named(url))
        found += [Shard(url, size) for url, size in zip(urls, _sizes(urls, storage), strict=True)]
    return tuple(found)


def _sizes(urls: Sequence[str], storage: Storage) -> list[int]:
    store = Store(urls[0], storage)  # those of one source are of one file system
    try:
        sizes = store.fs.sizes([store.fs._strip_protocol(url) for url in urls])
    except Exception as fault:  # every driver has its own errors
        raise DataError(f"{named(urls[0])}: cannot be read: {without_query(reason(fault))}") from fault
    unknown = next((url for url, size in zip(urls, sizes, strict=True) if size is None), None)
    if unknown:
        raise DataError(
            f"{named(unknown)}: its server does not say how long it is, so it cannot be streamed. Copy it to a disk or "
            "bucket, or set data.streaming: false"
        )
    return [int(size) for size in sizes]


def shard_rows(shard: Shard, storage: Storage, skip: int, given_up: threading.Event, piece: int = 0) -> Iterator[Row]:
    """The rows of a file behind the first `skip`, read as far as they are asked for.

    Args:
        piece: bytes of a request, 0 for PIECE.
        given_up: ends the waiting for a storage that does not answer.

    Raises:
        DataError: the file or a row is broken, or the file has fewer than `skip` rows; names file and line.
        JobError: the storage did not answer for storage.retry_minutes.
    """
    if not shard.size:
        if skip:
            raise shorter(shard.name, 0, skip)
        return
    # Parquet is asked for exact ranges, anywhere; all else is read on and on
    table = ending(shard.name) == ".parquet"
    whole = RangedFile(shard, storage, given_up, 0 if table else piece or PIECE)
    file = whole if table else io.BufferedReader(whole)
    yield from file_rows(cast(BinaryIO, file), shard.name, skip, lazy=True)


class RangedFile(io.RawIOBase):
    """A file at any URL, read by ranges that are tried again for storage.retry_minutes.

    Args:
        piece: bytes that are asked for at least: what is more than was wanted is kept for the next read.
    """

    def __init__(self, shard: Shard, storage: Storage, given_up: threading.Event, piece: int):
        store = Store(shard.url, storage)
        self.fs, self.path, self.size = store.fs, store.root, shard.size
        self.patience_s, self.given_up = storage.retry_minutes * 60, given_up
        self.piece, self.place = piece, 0
        self.kept, self.kept_at = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence] + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        stop = min(self.place + len(buffer), self.size)
        if stop <= self.place:
            return 0
        if not self.kept_at <= self.place < self.kept_at + len(self.kept):
            self.kept = self._whole(self.place, min(max(stop, self.place + self.piece), self.size))
            self.kept_at = self.place
        part = self.kept[self.place - self.kept_at : stop - self.kept_at]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)

    def _whole(self, start: int, stop: int) -> bytes:
        content, expected = self._read(start, stop), stop - start
        if len(content) > expected:
            raise ValueError(
                f"the server sent {len(content):,} bytes where {expected:,} were asked for. Expected one that answers "
                "range requests: serve the file by one, or copy it to a disk or bucket"
            )
        if len(content) < expected:
            raise EOFError(
                f"it ends at byte {start + len(content):,}, expected {self.size:,}: it was changed meanwhile"
            )
        return content

    def _read(self, start: int, stop: int) -> bytes:
        begun, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return bytes(self.fs.cat_file(self.path, start=start, end=stop))
            except Exception as fault:  # every driver has its own errors
                if _final(fault):
                    raise
                left_s = begun + self.patience_s - time.monotonic()
                if left_s <= 0 or self.given_up.is_set():
                    raise Outage(
                        f"bytes {start:,} to {stop:,} could not be read for {self.patience_s / 60:g} minutes "
                        f"({without_query(reason(fault))}). Start the run again when the storage answers"
                    ) from fault
                asked_s = retry_after_s(fault)
            pause(min(pause_s if asked_s is None else asked_s, left_s), self.given_up)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _final(fault: Exception) -> bool:
    """Whether no second try can mend it."""
    known = isinstance(fault, FileNotFoundError | PermissionError | IsADirectoryError)
    return known or answer(fault)[0] in FINAL or type(fault).__name__ == "NoCredentialsError"
