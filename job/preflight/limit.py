"""Calls that may hang, and may not hold up a check."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(limit_s: float, act: Callable[[], T]) -> T:
    """What `act` gives, from a thread that is left alone when it takes longer.

    Raises:
        TimeoutError: it took more than `limit_s` seconds; it may still be going on.
        Exception: what `act` raised.
    """
    given: list[T] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            given.append(act())
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=run, name="preflight", daemon=True)  # must not keep the process alive
    thread.start()
    thread.join(limit_s)
    if faults:
        raise faults[0]
    if not given:
        raise TimeoutError(f"no end within {limit_s:g} s")
    return given[0]
