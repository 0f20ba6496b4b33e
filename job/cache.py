"""Downloaded bytes kept on the node's own disk, so that the next run there does not download them again.

Processes and jobs may share the folder: a file appears whole (written aside, then renamed), and whoever has opened one
reads it to its end though another process evicts it. The cache never fails a run: it says one line and steps aside.
"""

import json
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Self

from job.config.running import Storage
from job.store import Store, reason

KEPT, DRAFT = ".kept", ".draft"
"""Endings of our files; others in the folder are left alone."""
CHECK = 4
"""Bytes of the CRC-32 behind the content: after a power cut a file can have its length and not its bytes."""
STALE_S = 3600
"""Seconds after which a draft belongs to a process that is gone."""


class Cache:
    """A folder of byte ranges of files, the least recently used removed first.

    Args:
        folder: where; made when the first range is kept.
        limit_gib: largest size of all ranges together, GiB; None is no limit.
        say: hears why the cache is not used, once.
    """

    def __init__(self, folder: str | Path, limit_gib: float | None = None, say: Callable[[str], None] = print):
        self.folder = Path(folder).expanduser()
        self.limit = inf if limit_gib is None else limit_gib * 2**30
        self._say, self._said, self._keeps, self._trimmed = say, False, True, False
        self._lock = threading.Lock()

    @classmethod
    def of(cls, storage: Storage, say: Callable[[str], None] = print) -> Self | None:
        """The cache that the settings ask for; None when it is off."""
        return cls(storage.cache_dir, storage.cache_gib, say) if storage.cache_dir else None

    def identity(self, store: Store, file: str) -> str | None:
        """A name for the file as it is now: another one when it has changed. None when the storage does not tell."""
        try:
            version = _version(store, file)
        except Exception as fault:  # every driver has its own errors; reading the file meets them again and says them
            self._tell(f"{store.url}/{file} is read without the cache: {reason(fault)}")
            return None
        if version is None:
            self._tell(f"{store.url} is read without the cache: the server does not tell whether a file has changed")
            return None
        return sha256(json.dumps([store.storage.endpoint, store.url, file, version]).encode()).hexdigest()

    def get(self, identity: str, start: int, stop: int) -> memoryview | None:
        """Bytes [start, stop) of the file; None when they are not kept, or damaged."""
        path = self._path(identity, start, stop)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size != stop - start + CHECK:
                    return None
                raw = memoryview(file.read())
        except FileNotFoundError:
            return None
        except OSError as fault:
            self._tell(f"the cache {self.folder} cannot be read: {fault.strerror}. Going on without it")
            return None
        content = raw[:-CHECK]
        if _check(content) != raw[-CHECK:]:
            return None
        with suppress(OSError):  # evicted meanwhile, or another user's: it only looks older than it is
            os.utime(path)
        return content

    def put(self, identity: str, start: int, stop: int, content: bytes | memoryview) -> None:
        """Keep bytes [start, stop) of the file, unless they alone are more than the limit."""
        if not self._keeps or stop - start + CHECK > self.limit:
            return
        path = self._path(identity, start, stop)
        draft = path.with_suffix(f".{uuid.uuid4().hex}{DRAFT}")  # process ids of two containers may be the same
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(draft, "xb") as file:
                    file.write(content)
                    file.write(_check(content))
                os.replace(draft, path)
            except BaseException:  # a full disk, Ctrl-C
                draft.unlink(missing_ok=True)
                raise
            self._trim()
        except OSError as fault:
            self._keeps = False
            self._tell(f"the cache {self.folder} cannot be written: {fault.strerror}. Going on without it")

    def _path(self, identity: str, start: int, stop: int) -> Path:
        return self.folder / f"{identity}-{start}-{stop}{KEPT}"

    def _tell(self, line: str) -> None:
        with self._lock:
            said, self._said = self._said, True
        if not said:
            self._say(line)

    def _trim(self) -> None:
        """Remove the least recently used ranges above the limit, and what killed processes left behind."""
        with self._lock:
            if self._trimmed and self.limit == inf:
                return
            self._trimmed = True
            found = []
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.name.endswith((KEPT, DRAFT)):
                        with suppress(FileNotFoundError):  # another process was faster
                            about = entry.stat()
                            found.append((about.st_mtime, about.st_size, Path(entry.path)))
            total = sum(size for _, size, _ in found)
            for used, size, path in sorted(found):
                is_draft = path.suffix == DRAFT
                if used < time.time() - STALE_S if is_draft else total > self.limit:
                    path.unlink(missing_ok=True)
                    total -= size


def _version(store: Store, file: str) -> str | None:
    """What differs once the file has changed; None when the server tells nothing."""
    path = store.path(file)
    if not store.url.startswith(("http://", "https://")):
        return str(store.fs.ukey(path))
    about = store.fs.info(path)  # fsspec's ukey of HTTP is the URL alone: "assume HTTP files are static"
    marks = [about.get(mark) for mark in ("ETag", "Content-MD5", "Digest", "Last-Modified")]
    return json.dumps([*marks, about.get("size")]) if any(marks) else None


def _check(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(CHECK, "little")
