"""Storage that fails for a while ends no run: what is written waits and is tried again, behind the training's back."""

import errno
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Generic, Literal, TypeVar

from job.errors import JobError
from job.store import Store, answer, reason, without_query

__all__ = ["LONGEST_PAUSE_S", "Uploads", "passes", "patiently", "pause_s", "why"]

T = TypeVar("T")
Say = Callable[[str], None]
_CHANCE = random.Random()  # noqa: S311 - no secret; of its own, since the run's seed has to give the same numbers
LONGEST_PAUSE_S = 30.0
"""Seconds between two tries at most: storage that is back is noticed so soon."""
_PLACE = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
LASTING = frozenset(
    (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.ENODEV, errno.EBADF, errno.EOPNOTSUPP, *_PLACE)
)
"""Faults of storage that time does not mend. Not among them: a full disk or quota (someone may make room), EIO, ESTALE,
EBUSY, and EINVAL, which S3's driver raises for bodies that were damaged on the way too."""
OURS = ("builtins", "job", "torch", "safetensors_rust")
"""Packages whose errors, OSErrors aside, are none of the storage's: mistakes, memory, other ranks that are gone."""
KEYS = re.compile("Credential|Token|SSO|Login|Refresh|Unauthorized|Forbidden")
"""Names of the faults of those who fetch keys (botocore, google.auth), and gcsfs' words for keys that are refused."""


def pause_s(tries: int) -> float:
    """Seconds until the next try after so many: 1, 2, 4 ... 30, up to half of it less, so that runs do not march."""
    return min(2.0 ** min(tries - 1, 5), LONGEST_PAUSE_S) * _CHANCE.uniform(0.5, 1.0)


class Uploads:
    """Jobs done in order by one thread of their own, each tried again for as long as the storage fails.

    A job gets its bytes with it: what it holds is in memory until it is done. Nothing bounds the queue but the caller,
    who asks `idle` first. A fault that is none of the storage's ends the thread and is raised by the next call.

    Args:
        say: hears a line when a job begins to fail, and one when it is done after all; from the thread.
        retry_s: seconds of failing that `wait` bears.
        pause_s: seconds until the next try, after so many.
    """

    def __init__(self, say: Say, retry_s: float, pause_s: Callable[[int], float] = pause_s):
        self.retry_s, self._say, self._pause_s = retry_s, say, pause_s
        self._changed = threading.Condition()
        self._waiting: deque[_Job[object]] = deque()
        self._present: _Job[object] | None = None
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._closed = self._hurried = False

    def put(self, what: str, act: Callable[[], object], *stores: Store) -> None:
        """Queue a job.

        Args:
            what: its name after "the", such as "checkpoint of step 120".
            act: does it; it may be called again after any part of it.
            stores: those that it uses, made anew when their keys are refused: keys expire, and files bring new ones.

        Raises:
            what `raise_fault` does.
        """
        with self._changed:
            self.raise_fault()
            if self._closed:
                raise RuntimeError(f"{what} came after the end")
            self._waiting.append(_Job(what, act, stores, "written", "while training goes on", self._say))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or under way; raises what `raise_fault` does."""
        with self._changed:
            self.raise_fault()
            return not self._left()

    def wait(self, timeout_s: float) -> None:
        """Wait until it is idle. What waits for its next try is tried at once.

        Args:
            timeout_s: seconds at most.

        Raises:
            JobError: a job has failed for `retry_s` of the waiting, or the time is over: which, and why. It goes on
                being tried until `close`. And what `raise_fault` does.
        """
        began = time.monotonic()
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            while left := self._left():
                self.raise_fault()
                end = began + timeout_s
                if left[0].since is not None:
                    end = min(end, max(left[0].since, began) + self.retry_s)
                now = time.monotonic()
                if now >= end:
                    raise left[0].given_up(now - began, [job.what for job in left[1:]])
                self._changed.wait(min(end - now, 60.0))  # an endless wait is no number that the system takes
            self.raise_fault()

    @property
    def closed(self) -> bool:
        """Whether nothing more is tried, so that a job that waits for others gives up."""
        return self._closed

    def close(self) -> None:
        """No more tries: what is queued is forgotten; an attempt under way ends by itself, or with the process."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def raise_fault(self) -> None:
        """Raise what ended the thread, if anything did: a JobError, or a mistake of ours."""
        if self._fault:
            raise self._fault

    def _left(self) -> list["_Job[object]"]:
        return [*([self._present] if self._present else []), *self._waiting]

    def _work(self) -> None:
        try:
            for job in self._jobs():
                self._do(job)
                del job  # and with it its bytes
        except BaseException as fault:
            with self._changed:
                self._fault = fault
                self._changed.notify_all()

    def _do(self, job: "_Job[object]") -> None:
        try:
            while not job.attempt():
                with self._changed:
                    self._changed.notify_all()  # whoever waits hears that it fails
                    self._changed.wait_for(lambda: self._closed or self._hurried, self._pause_s(job.tries))
                    self._hurried = False
                    if self._closed:
                        return
        except OSError as fault:
            raise job.lasting(fault) from fault

    def _jobs(self) -> Iterator["_Job[object]"]:
        while True:
            with self._changed:
                self._present = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                self._present = self._waiting.popleft()
                self._hurried = False  # whoever hurries us is served by a first try
            yield self._present


def patiently(
    act: Callable[[], T],
    what: str,
    retry_s: float,
    say: Say,
    *stores: Store,
    done: Literal["written", "read"] = "written",
    pause_s: Callable[[int], float] = pause_s,
) -> T:
    """What `act` gives, tried again as in the background while the caller waits.

    Args:
        act, what, stores, pause_s: as those of `Uploads`.
        retry_s: seconds for which it may fail; 0 is a single try.
        say: hears that it fails, and that it worked after all.
        done: what is done with it, for the messages.

    Raises:
        FileNotFoundError, FileExistsError: the storage's answer, as it is.
        JobError: it has failed for so long, or fails for good: why.
    """
    job = _Job(what, act, stores, done, f"for {_span(retry_s)}", say if retry_s > 0 else lambda line: None)
    try:
        while not job.attempt():
            if job.failing_s() >= retry_s:
                raise job.given_up(job.failing_s())
            time.sleep(min(pause_s(job.tries), max(retry_s - job.failing_s(), 0.0)))
    except OSError as fault:
        if isinstance(fault, FileNotFoundError | FileExistsError):
            raise
        raise job.lasting(fault) from fault
    return job.result


class _Job(Generic[T]):
    """Something to be done with storage, and how often and since when that failed."""

    result: T

    def __init__(self, what: str, act: Callable[[], T], stores: Sequence[Store], done: str, meanwhile: str, say: Say):
        self.what, self._act, self._stores, self._done = what, act, stores, done
        self._meanwhile, self._say, self._renews = meanwhile, say, False
        self.tries, self.why = 0, ""
        self.since: float | None = None

    def attempt(self) -> bool:
        """Try once; whether it worked. A fault that does not pass is raised as it is."""
        self.tries += 1
        try:
            if self._renews:
                for store in self._stores:
                    store.renew()
            self.result = self._act()
        except Exception as fault:
            if not passes(fault):
                raise
            self._failed(fault)
            return False
        if self.since is not None:
            self._tell(f"the {self.what} is {self._done} after all, {_span(self.failing_s())} later")
        return True

    def failing_s(self) -> float:
        """Seconds since the first failure."""
        return 0.0 if self.since is None else time.monotonic() - self.since

    def lasting(self, fault: OSError) -> JobError:
        """The error for a fault that no other try mends."""
        return JobError(
            f"the {self.what} cannot be {self._done}: {why(fault)}. Trying again does not help: make the storage "
            "usable as it was when the run began, then start the run again"
        )

    def given_up(self, seconds: float, behind: Sequence[str] = ()) -> JobError:
        """The error of those who have waited so many seconds for it and for what is queued behind it."""
        others = f", nor what follows it ({', '.join(behind)})" if behind else ""
        return JobError(
            f"the {self.what} could not be {self._done} in {_span(seconds)}{others}: "
            f"{self.why or 'the storage has not answered yet'}. Check the storage: network, space and keys. "
            "storage.retry_minutes is how long a run waits for it"
        )

    def _failed(self, fault: Exception) -> None:
        self.why, self._renews = why(fault), _about_keys(fault)
        if self.since is None:
            self.since = time.monotonic()
            self._tell(f"the {self.what} cannot be {self._done} ({self.why}); trying again {self._meanwhile}")

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # a terminal that was closed ends no run
            self._say(line)


def passes(fault: BaseException) -> bool:
    """Whether another try may do better: storage and its drivers fail for a while, our own mistakes for good."""
    if isinstance(fault, FileNotFoundError | FileExistsError):
        return _code(fault) == "NoSuchUpload"  # its answer was lost, or it was cleared away: all parts come again
    if isinstance(fault, OSError):
        return fault.errno not in LASTING
    home = type(fault).__module__.partition(".")[0]  # drivers' own errors are anybody's: botocore, aiohttp, google
    return isinstance(fault, Exception) and not isinstance(fault, JobError) and home not in OURS


def _about_keys(fault: Exception) -> bool:
    """Whether new keys may help. S3 answers 400 to HEAD with an expired token, 403 to much else."""
    said = f"{type(fault).__name__} {_code(fault)} {fault if isinstance(fault, OSError) else ''}"
    return isinstance(fault, PermissionError) or answer(fault)[0] in (400, 401, 403) or bool(KEYS.search(said))


def why(fault: Exception) -> str:
    """The fault in a few words, none of them secret: who fetches keys may quote what it was given."""
    name = type(fault).__name__
    if _code(fault).startswith("Expired"):
        return "access denied, the keys have expired"
    if KEYS.search(name) and name != "NoCredentialsError":
        return f"the keys could not be fetched ({name})"
    return without_query(reason(fault))


def _code(fault: BaseException | None) -> str:
    """S3's word for it, such as ExpiredToken; empty without one."""
    while fault is not None:
        response = getattr(fault, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        fault = fault.__cause__
    return ""


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
