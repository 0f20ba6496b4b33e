"""torch.compile as a decorator that waits for the first call.

bitsandbytes and DeepSpeed decorate functions with it where they are imported, of which a run calls none: optimizers for
the CPU and one that is not offered. Finding torch's compiler for them takes a sixth of the time until the first step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import isfunction
from typing import Any

import torch


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """For the while, functions that are given to torch.compile are compiled when they are first called."""
    at_once = torch.compile
    torch.compile = partial(_later, at_once)
    try:
        yield
    finally:
        torch.compile = at_once


def _later(at_once: Callable[..., Any], model: Any = None, **how: Any) -> Any:
    if model is None:
        return partial(_later, at_once, **how)
    if not isfunction(model):
        return at_once(model, **how)
    made: list[Any] = []

    @wraps(model)
    def called(*given: Any, **named: Any) -> Any:
        if not made:
            made.append(at_once(model, **how))
        return made[0](*given, **named)

    return called
