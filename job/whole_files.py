"""Files of any size, written as a stream to any URL, that appear whole or not at all."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from job.store import ANSWER_S, SLOWEST, Store, is_s3

Write = Callable[[memoryview], object]
PART = 16 << 20
"""Bytes of a part of an upload, of which S3 takes 10,000: the largest file has 156 GiB."""


@contextmanager
def appearing(store: Store, name: str) -> Iterator[Write]:
    """Takes the file's bytes one after the other; the file is there once the block ends without an exception.

    Two parts of an upload are held at most, except for memory:, where all of it is.

    Raises:
        what the storage's driver raises.
    """
    draft = _draft(store, name)
    try:
        yield draft.write
        draft.close()
        draft.commit()
    except BaseException:
        with suppress(Exception):  # the fault that brought us here is the one to tell
            draft.discard()
        draft.closed = True  # fsspec's would be finished when it is collected
        raise


def _draft(store: Store, name: str) -> Any:
    if store.is_local:
        return _Draft(store.path(name))
    if store.url.startswith("memory:"):  # fsspec shows a file there from its first byte on
        return _Held(store, name)
    draft = store.fs.open(store.path(name), "wb", block_size=PART, autocommit=False)
    return _limited(draft) if is_s3(store.url) else draft


def _limited(upload: Any) -> Any:
    """s3fs' upload with a time limit on each of its calls: it has none, and a server that falls silent is waited for
    without end."""
    limit = {"timeout": ANSWER_S + PART / SLOWEST}

    def discard() -> None:
        if upload.mpu:
            upload.fs.abort_mpu(upload.bucket, upload.key, upload.mpu["UploadId"], **limit)

    upload._call_s3, upload.discard = partial(upload._call_s3, **limit), discard
    return upload


class _Held:
    """Bytes that become a file in one step."""

    def __init__(self, store: Store, name: str):
        self.store, self.name, self.bytes, self.closed = store, name, bytearray(), False
        self.write = self.bytes.extend
        self.close = self.discard = lambda: None

    def commit(self) -> None:
        """All bytes at once."""
        self.store.write(self.name, bytes(self.bytes))


class _Draft:
    """A file beside the one that it becomes; fsspec's own drafts lie in /tmp, which may be small."""

    def __init__(self, target: str):
        self.target, self.draft, self.closed = target, f"{target}.{uuid4().hex}.part", False
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.file = open(self.draft, "wb")  # noqa: SIM115 - closed by `close` and `discard`
        self.write = self.file.write

    def close(self) -> None:
        """All bytes onto the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def commit(self) -> None:
        """The draft in the place of the file."""
        os.replace(self.draft, self.target)

    def discard(self) -> None:
        """Nothing is left."""
        self.file.close()
        Path(self.draft).unlink(missing_ok=True)
