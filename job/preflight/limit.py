"""Calls that may hang, and may not hold up a check; the time that all its stages have together."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
MARGIN_S = 4.0


class Budget:
    """The seconds of a check, shared by its stages: one that takes long leaves less to the others."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.begun = time.monotonic()
        self.margin_s = min(MARGIN_S, seconds / 8)
        """Kept at the end of a stage for the answers that are on their way, and for saying what they mean."""
        self.give(seconds)

    def give(self, left_s: float) -> None:
        """From now on so much is left: the first rank's time counts, others began earlier or later."""
        self._ends = time.monotonic() + left_s

    @property
    def left_s(self) -> float:
        """Until the end; 0 when it is over."""
        return max(self._ends - time.monotonic(), 0.0)

    @property
    def passed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.begun

    @property
    def act_s(self) -> float:
        """What the next stage may take on a rank."""
        return max(self.left_s - self.margin_s, 0.0)

    @property
    def short(self) -> bool:
        """Whether too little is left for a stage: what does not end then need not hang."""
        return self.act_s < self.margin_s


def begin(act: Callable[[], T]) -> Callable[[float], T]:
    """Start `act` in a thread, which is left alone when it takes too long.

    Returns:
        Waits so many seconds and gives what `act` gave; raises what it raised, and TimeoutError when it has not ended.
    """
    given: list[T] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            given.append(act())
        except BaseException as fault:
            faults.append(fault)

    def end(limit_s: float) -> T:
        thread.join(limit_s)
        if faults:
            raise faults[0]
        if not given:
            raise TimeoutError(f"no end within {limit_s:g} s")
        return given[0]

    thread = threading.Thread(target=run, name="preflight", daemon=True)  # must not keep the process alive
    thread.start()
    return end


def within(limit_s: float, act: Callable[[], T]) -> T:
    """What `act` gives, from a thread that is left alone when it takes longer.

    Raises:
        TimeoutError: it took more than `limit_s` seconds; it may still be going on.
        Exception: what `act` raised.
    """
    return begin(act)(limit_s)
