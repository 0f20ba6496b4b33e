"""Activations computed again in the backward pass, a layer at a time; and whether that is what happens now."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

from transformers.modeling_layers import GradientCheckpointingLayer

from job.host_inputs import HostInputs

_now: Literal["first", "again"] | None = None
"""Seen by all threads: autograd computes again on its own."""


def recompute_activations(model: Any, on_host: HostInputs | None = None, layers: int | None = None) -> None:
    """Keep only each layer's input for the backward pass. Our dropout needs no random state to be restored.

    Args:
        on_host: where the inputs go meanwhile; without, they stay on the GPU.
        layers: so many, the first; all without. What the last keep is free again when the first are computed again.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # the first is the name since transformers 5.20
    enable({"use_reentrant": False, "preserve_rng_state": False, "context_fn": _around})
    each = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in each[layers:] if layers is not None else ():
        layer.gradient_checkpointing = False
    if on_host is not None:
        for module in model.modules():
            if again := getattr(module, "_gradient_checkpointing_func", None):
                module._gradient_checkpointing_func = partial(_away, on_host, again)


def _away(on_host: HostInputs, again: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with on_host.away():  # what is saved inside stays with torch's checkpoint, whose hooks are nearer
        return again(*args, **kwargs)


def recomputing() -> bool:
    """Whether a layer is computed again: of what it makes only what autograd keeps is read."""
    return _now == "again"


def pass_now() -> Literal["first", "again"] | None:
    """Which pass this is through a layer that is computed again in the backward pass; None through any other."""
    return _now


def _around() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first and of the second forward pass of a layer."""
    return _marked("first"), _marked("again")


@contextmanager
def _marked(number: Literal["first", "again"]) -> Iterator[None]:
    global _now
    before, _now = _now, number
    try:
        yield
    finally:
        _now = before
