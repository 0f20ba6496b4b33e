"""Ranges of files read ahead of their use: few requests, several at once, bounded in memory, tried again on failure.

with closing(read_ahead(store, ranges)) as contents:
    for wanted, content in zip(ranges, contents, strict=True): ...
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial

from job.cache import Cache
from job.errors import JobError, ModelError
from job.store import Store, answer, reason

__all__ = ["LONGEST_PAUSE_S", "REQUEST", "Cache", "Range", "answer", "pause", "read_ahead", "retry_after_s"]

REQUEST = 32 << 20
"""Bytes of the largest request that ranges are merged into."""
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the tries of a request."""
LONGEST_PAUSE_S = 300.0
"""Seconds that a server may ask us to wait; GPUs are held meanwhile."""


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file of a store."""

    file: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"{self.file}: no range goes from byte {self.start} to {self.stop}")

    @property
    def nbytes(self) -> int:
        """Its length, bytes."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"bytes {self.start:,} to {self.stop:,}"


def read_ahead(
    store: Store,
    ranges: Sequence[Range],
    budget: int = 256 << 20,
    workers: int = 8,
    progress: Callable[[int], None] | None = None,
    cache: Cache | None = None,
) -> Generator[memoryview, None, None]:
    """The bytes of each range, in order.

    Ranges that touch are fetched by one request of at most REQUEST bytes; no byte is read that was not asked for. A
    range lives as long as anything holds it, and with it all of its request. Close the generator when leaving early:
    what is not begun is cancelled, what is under way is waited for.

    Args:
        store: where the files are.
        ranges: what is wanted; one is never split.
        budget: bytes that are under way, or fetched and not used yet; a range is used when the next one is asked for.
            A range above the budget is read with nothing beside it.
        workers: requests at once.
        progress: hears, in the caller's thread, how many bytes of a request have come (kept ones too).
        cache: keeps the requests of stores that are not local.

    Raises:
        ModelError: a file is missing, denied or cut off, or its server does not know ranges.
        JobError: a request failed five times.
    """
    waiting = _requests(ranges, min(REQUEST, budget))
    under_way: deque[tuple[_Request, Future[memoryview]]] = deque()
    source, held = _Source(store, None if store.is_local else cache), 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
    try:
        source.identify(list(dict.fromkeys(request.whole.file for request in waiting)), pool)
        while waiting or under_way:
            while waiting and (not held or held + waiting[0].whole.nbytes <= budget):
                request = waiting.popleft()
                held += request.whole.nbytes
                under_way.append((request, pool.submit(source.fetch, request.whole)))
            request, future = under_way.popleft()
            content = future.result()
            if progress:
                progress(len(content))
            for part in request.parts:
                yield content[part.start - request.whole.start : part.stop - request.whole.start]
            del future, content  # what was used is gone before we wait again
            held -= request.whole.nbytes
    finally:
        source.given_up.set()
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Request:
    """One read for ranges that touch."""

    parts: list[Range]

    @property
    def whole(self) -> Range:
        return Range(self.parts[0].file, self.parts[0].start, self.parts[-1].stop)

    def takes(self, part: Range, most: int) -> bool:
        """Whether the range goes on where this ends, and both together are at most so many bytes."""
        whole = self.whole
        return (part.file, part.start) == (whole.file, whole.stop) and part.stop - whole.start <= most


def _requests(ranges: Iterable[Range], most: int) -> deque[_Request]:
    """Ranges that touch, joined up to `most` bytes; a longer one is a request of its own."""
    requests: deque[_Request] = deque()
    for part in ranges:
        if requests and requests[-1].takes(part, most):
            requests[-1].parts.append(part)
        else:
            requests.append(_Request([part]))
    return requests


class _Source:
    """The store behind its cache, asked by several threads until it is given up."""

    def __init__(self, store: Store, cache: Cache | None):
        self.store, self.cache, self.given_up = store, cache, threading.Event()
        self.identities: dict[str, str | None] = {}

    def identify(self, files: Sequence[str], pool: ThreadPoolExecutor) -> None:
        """Ask once for each file what the cache knows it by."""
        if self.cache:
            asked = pool.map(partial(self.cache.identity, self.store), files)
            self.identities = dict(zip(files, asked, strict=True))

    def fetch(self, wanted: Range) -> memoryview:
        """The bytes, all of them, from the cache or the store."""
        if not wanted.nbytes:
            return memoryview(b"")
        identity = self.identities.get(wanted.file)
        if self.cache and identity:
            kept = self.cache.get(identity, wanted.start, wanted.stop)
            if kept is not None:
                return kept
        content = self._read(wanted)
        if self.cache and identity:
            self.cache.put(identity, wanted.start, wanted.stop, content)
        return memoryview(content)

    def _read(self, wanted: Range) -> bytes:
        content = self._read_patiently(wanted)
        if len(content) < wanted.nbytes:
            raise ModelError(f"{self._named(wanted)} ends within {wanted}: the file is cut off. Copy it again")
        if len(content) > wanted.nbytes:
            raise ModelError(
                f"{self._named(wanted)}: the server sent {len(content):,} bytes for {wanted}. "
                "Expected a server that answers range requests: serve the folder by one, or copy it to a disk or bucket"
            )
        return content

    def _read_patiently(self, wanted: Range) -> bytes:
        tries = 0
        while True:
            try:
                return self.store.read(wanted.file, wanted.start, wanted.stop)
            except Exception as fault:  # every driver has its own errors
                self._refuse_final(wanted, fault)
                if tries == len(PAUSES_S):
                    raise JobError(
                        f"{self._named(wanted)}: {wanted} could not be read in {tries + 1} tries "
                        f"({reason(fault)}). Start the run again when the storage answers"
                    ) from fault
                asked_s = retry_after_s(fault)
            pause(PAUSES_S[tries] if asked_s is None else asked_s, self.given_up)
            tries += 1
            if self.given_up.is_set():
                raise CancelledError

    def _refuse_final(self, wanted: Range, fault: Exception) -> None:
        """Faults that no second try mends."""
        status, _ = answer(fault)
        if isinstance(fault, FileNotFoundError) or status in (404, 410):
            raise ModelError(f"{self._named(wanted)}: not found. Copy the file there again") from fault
        if isinstance(fault, PermissionError) or status in (401, 403):
            cure = "Make it readable to this user" if self.store.is_local else "Give the keys the right to read it"
            why = reason(fault) if isinstance(fault, PermissionError) else "access denied"
            raise ModelError(f"{self._named(wanted)}: {why}. {cure}") from fault
        if type(fault).__name__ == "NoCredentialsError":
            raise ModelError(f"{self._named(wanted)}: {reason(fault)}") from fault

    def _named(self, wanted: Range) -> str:
        return f"{self.store.url}/{wanted.file}"


def pause(seconds: float, given_up: threading.Event) -> None:
    """Wait, no longer than the reading goes on."""
    given_up.wait(seconds)


def retry_after_s(fault: BaseException) -> float | None:
    """Seconds that a server asked to wait: Retry-After is a number, or a date (RFC 9110, 10.2.3)."""
    status, headers = answer(fault)
    asked = headers.get("Retry-After") or headers.get("retry-after")
    if status not in (429, 503) or not asked:
        return None
    try:
        seconds = float(asked) if asked.strip().isdigit() else parsedate_to_datetime(asked).timestamp() - time.time()
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_PAUSE_S)
