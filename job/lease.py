"""One run at a time in an output folder: a lease that its holder renews, and the key by which people stop the run."""

import math
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from random import random
from typing import Self
from uuid import uuid4

from job.errors import JobError, OutputError
from job.holder import Holder
from job.store import Store
from job.telling import telling

FOLDER, STOP_KEY = "lease", "stop"
TTL_S = 60.0
WITHOUT = "use other storage, or set storage.lease: false, which gives up the protection against a second run"


class NoLease:
    """A run's folder without protection against a second run; its thread looks for the stop key only.

    Attributes:
        lost: a sentence once another run took the folder over, for good; else None.
        asked_to_stop: whether somebody made the file `stop` in the folder; one from before this run is removed.

    Args:
        store: the run's folder.
        ttl_s: four times the seconds between two looks.

    Raises:
        Exception: what the storage's driver raises when it fails.
    """

    def __init__(self, store: Store, ttl_s: float = TTL_S):
        self.lost: str | None = None
        self.asked_to_stop = False
        self._store, self._every_s = store, ttl_s / 4
        self._ended = threading.Event()
        if store.exists(STOP_KEY):
            store.remove(STOP_KEY, missing_ok=True)
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Look now whether the folder is still ours, and renew the lease: nobody takes it in the next `ttl_s` seconds
        but the same job, once its scheduler has started it again. A storage that fails raises what its driver raises.

        Raises:
            JobError: another run took it over.
        """

    def release(self) -> None:
        """End the thread and give the folder back; raises nothing when the storage fails."""
        self._ended.set()
        self._thread.join(self._every_s)

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            for act in (self._renew, self._listen):
                with suppress(Exception):  # the storage fails: again at the next tick
                    try:
                        act()
                    except PermissionError:  # temporary keys have ended
                        self._store.renew()
                        raise

    def _listen(self) -> None:
        self.asked_to_stop = self.asked_to_stop or self._store.exists(STOP_KEY)

    def _renew(self) -> None:
        pass


class Lease(NoLease):
    """A run's folder, held by this process and renewed by a thread until `release`; made by `acquire`.

    The folder `lease` holds numbered files. Who takes over creates the next number, which only one can; the highest
    number holds. A holder writes its own file only, and never again once there is a higher one.
    """

    def __init__(self, store: Store, me: Holder, number: int):
        self._me, self._number = me, number
        self._turn = threading.Lock()  # check() and the thread
        super().__init__(store, me.ttl_s)

    @classmethod
    def acquire(
        cls,
        store: Store,
        job_id: str | None,
        say: Callable[[str], None],
        ttl_s: float = TTL_S,
        attempt: int | None = None,
    ) -> Self:
        """Take the folder, at once or after the time in which its holder would have given a sign of life.

        What the folder holds is to be read after this: until now another run may have written there.

        Args:
            store: the run's folder.
            job_id: the scheduler's id of this job: the same job, started again elsewhere, need not wait.
            say: hears a line before a wait.
            ttl_s: seconds without a renewal after which others may take the folder from us.
            attempt: how often the scheduler had started this job again.

        Raises:
            OutputError: another run holds the folder and lives.
            Exception: what the storage's driver raises when it fails; nothing of ours is left then.
        """
        me = Holder.here(job_id, ttl_s, attempt)
        while True:
            numbers = _numbers(store)
            if not numbers or _may_follow(store, numbers[-1], me, say):
                number = (numbers or [0])[-1] + 1
                try:
                    if _claim(store, number, numbers, me):
                        return cls(store, me, number)
                except BaseException:
                    _leave(store, number, me)
                    raise
                _leave(store, number, me)
            time.sleep(0.2 * random())  # noqa: S311  # two that gave way to each other come back one by one

    def check(self) -> None:
        self._renew()  # so that nobody finds it expired while what was checked for is written
        if self.lost:
            raise JobError(self.lost)

    def release(self) -> None:
        super().release()
        if not self._thread.is_alive():  # a renewal that hangs would write the file again
            _leave(self._store, self._number, self._me)

    def _renew(self) -> None:
        with self._turn:
            self._look()
            if not self.lost:
                self._me = replace(self._me, renewals=self._me.renewals + 1)
                self._store.write(_name(self._number), self._me.content())

    def _look(self) -> None:
        """Set `lost` when the folder is no longer ours."""
        while not self.lost:
            numbers = _numbers(self._store)
            highest = max([self._number, *numbers])
            content = _read(self._store, highest)
            holder = Holder.parse(content) if content is not None else None
            if holder and holder.id == self._me.id:
                for old in numbers:
                    if old < highest:  # a put of an earlier holder that came late
                        self._store.remove(_name(old), missing_ok=True)
                return
            if content is None and highest > self._number:  # it ended since, or gave way to us
                time.sleep(0.1)
                continue
            who = f"another run holds it ({holder})" if holder else f"{_name(highest)} is gone or damaged"
            self.lost = (
                f"output.url: {self._store.url} is no longer this run's: {who}. This run stops and publishes nothing "
                "more. Start it again when no other run uses the folder, or with another output.url"
            )


def held_by(store: Store) -> Holder | None:
    """Who holds the folder, alive or not; None when nobody does, or nobody says."""
    numbers = _numbers(store)
    content = _read(store, numbers[-1]) if numbers else None
    return None if content is None else Holder.parse(content)


def prove_conditional_puts(store: Store) -> None:
    """Make sure that the storage refuses to create what is there: some storage ignores the condition silently.

    Raises:
        OutputError: it does not refuse, or cannot be written.
    """
    name = f"{FOLDER}/{uuid4().hex}.probe"
    first, second = (uuid4().hex.encode() for _ in range(2))
    what = f"output.url: {store.url}: a file that must be new cannot be made"
    try:
        with telling(OutputError, what, f"Check that the folder can be written; if it can, {WITHOUT}"):
            answers = store.create(name, first), store.create(name, second)
            kept = store.read(name) == first
    finally:
        with suppress(Exception):
            store.remove(name, missing_ok=True)
    if answers != (True, False) or not kept:
        raise OutputError(
            f"output.url: {store.url}: a file that must be new replaced another one, expected a refusal "
            f"(If-None-Match: *). {WITHOUT.capitalize()}"
        )


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def _numbers(store: Store) -> list[int]:
    """The numbers of all lease files, ascending."""
    return sorted(int(name[:-5]) for name in store.child(FOLDER).names() if re.fullmatch(r"\d{8}\.json", name))


def _read(store: Store, number: int) -> bytes | None:
    try:
        return store.read(_name(number))
    except FileNotFoundError:
        return None


def _may_follow(store: Store, number: int, me: Holder, say: Callable[[str], None]) -> bool:
    """Whether the holder may be followed, once that is clear; False when it went, or another came, meanwhile.

    Raises:
        OutputError: it lives.
    """
    content = _read(store, number)
    if content is None:
        return False
    holder = Holder.parse(content)
    lives = holder.lives(me) if holder else None
    if lives:
        raise _in_use(store, number, holder)
    if lives is False or (holder and holder.is_before(me)):
        return True
    ttl_s = holder.ttl_s if holder else me.ttl_s
    said = False
    while (left_s := ttl_s - _age_s(store, number)) >= 0:
        if not said:
            whose = f"the run on {holder}" if holder else f"a run that {_name(number)} does not name"
            say(f"output.url: {store.url} is held: waiting up to {left_s:.0f} s to see whether {whose} is alive")
            said = True
        now = _next(store, number, content, left_s, ttl_s / 20)
        if now != content:
            later = Holder.parse(now) if now is not None else None
            if now is None or (later and later.id) != (holder and holder.id):
                return False
            raise _in_use(store, number, holder)
    return True


def _next(store: Store, number: int, content: bytes, wait_s: float, every_s: float) -> bytes | None:
    """The file once it is no longer `content`, or after `wait_s` seconds."""
    end = time.monotonic() + wait_s
    while True:
        time.sleep(every_s)
        now = _read(store, number)
        if now != content or time.monotonic() > end:
            return now


def _age_s(store: Store, number: int) -> float:
    """The age of a lease file by the storage's clock; endless when it is gone, so that creating its follower tells."""
    try:
        return store.age_s(_name(number))
    except FileNotFoundError:
        return math.inf


def _in_use(store: Store, number: int, holder: Holder | None) -> OutputError:
    who = holder or f"{_name(number)} does not say where"
    return OutputError(
        f"output.url: {store.url} is in use by another run that is alive ({who}). Use another output.url, or stop that "
        "run first"
    )


def _claim(store: Store, number: int, before: list[int], me: Holder) -> bool:
    """Create the lease file `number`; False when others claim the folder, too.

    Args:
        before: the numbers that may be followed. Anything else there means that we looked before others came.
    """
    if not store.create(_name(number), me.content()) or not set(_numbers(store)) <= {*before, number}:
        return False
    for old in before:
        with suppress(Exception):  # the highest holds: leftovers do no harm
            store.remove(_name(old), missing_ok=True)
    return True


def _leave(store: Store, number: int, me: Holder) -> None:
    """Remove the lease file if it is ours; one that the storage keeps from us will expire."""
    with suppress(Exception):
        content = _read(store, number)
        holder = Holder.parse(content) if content is not None else None
        if holder and holder.id == me.id:
            store.remove(_name(number), missing_ok=True)
