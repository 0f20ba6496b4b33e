"""Activations computed again in the backward pass, a layer at a time; and whether that is what happens now."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from job.host_inputs import HostInputs


class Pass(NamedTuple):
    """A pass through a layer that is computed again in the backward pass: which one, and what the first notes for the
    second, in the order of the layer's own code."""

    number: Literal["first", "again"]
    noted: list[Any]


_now: Pass | None = None
"""Seen by all threads: autograd computes again on its own."""


def recompute_activations(model: Any, on_host: HostInputs | None = None, layers: int | None = None) -> None:
    """Keep only each layer's input for the backward pass. Our dropout needs no random state to be restored.

    Args:
        on_host: where the inputs go meanwhile; without, they stay on the GPU.
        layers: so many, the first of the longest list of layers; all without, and where there is no such list. What
            the last keep is free again when the first are computed again.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # the first is the name since transformers 5.20
    enable({"use_reentrant": False, "preserve_rng_state": False, "context_fn": _around})
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [[one for one in each if isinstance(one, GradientCheckpointingLayer)] for each in lists]
    for layer in max(found, key=len, default=[])[layers:] if layers is not None else ():
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
    return _now is not None and _now.number == "again"


def pass_now() -> Pass | None:
    """Which pass this is; None through a layer that is not computed again."""
    return _now


def _around() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first and of the second forward pass of a layer."""
    noted: list[Any] = []
    return _marked(Pass("first", noted)), _marked(Pass("again", noted))


@contextmanager
def _marked(this: Pass) -> Iterator[None]:
    global _now
    before, _now = _now, this
    try:
        yield
    finally:
        _now = before
