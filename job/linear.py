"""The frozen 4-bit linear: bitsandbytes' product, without its hold on weights that ZeRO-3 gathered."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch

if torch.cuda.is_available():
    from job.kernels import four_bits

VALUES = "kept_values"
"""Attribute of a quant_state: what is kept of the weight's values, by type; without it, nothing is."""
_RELEASED = "NOT_AVAILABLE"
"""DeepSpeed's name of the state."""


class FrozenLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' Linear4bit, to which it is equal bit for bit in values and gradients.

    For the backward pass its own product keeps the gathered weight as a plain attribute, where neither DeepSpeed's
    release of a ZeRO-3 weight nor recomputation can free it (bitsandbytes#2034). Ours keeps the Parameter, whose
    memory DeepSpeed takes and gives back.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out] in the type of x."""
        state = self.weight.quant_state
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        if not needs_grad:
            plain: torch.Tensor = super().forward(x)
            return plain
        if not getattr(self, "compute_type_is_set", False):
            self.set_compute_type(x)
            self.compute_type_is_set = True
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.to(self.compute_dtype), self.weight, bias, state
        )
        return product.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: F.QuantState
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)  # the leaf itself: what DeepSpeed does to its data, this sees
        ctx.state = state
        return product(x, weight, bias, state)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        with values(weight, ctx.state, grads[0].dtype) as matrix:
            gradient = torch.matmul(grads[0], matrix)
        bias = grads[0].flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient, None, bias, None


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: F.QuantState | None
) -> torch.Tensor:
    """x [..., in] times a frozen weight [out, in], without a graph.

    Args:
        state: how the weight is quantized, in bitsandbytes' 4 bits; None for one that is not.
    """
    if state is None:
        return torch.nn.functional.linear(x.detach(), weight.detach(), bias)
    result: torch.Tensor = bnb.matmul_4bit(x.detach(), weight.detach(), bias=bias, quant_state=state)
    return result


@contextmanager
def values(weight: torch.Tensor, state: F.QuantState | None, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The frozen weight's values [out, in] dequantized."""
    with gathered(weight):
        yield dequantized(weight, state, dtype)


def dequantized(weight: torch.Tensor, state: F.QuantState | None, dtype: torch.dtype) -> torch.Tensor:
    """The values [out, in] of a frozen weight that is here; those that are kept (see `keep_values`) are only read."""
    stored = weight.detach()
    if state is None:
        return stored.to(dtype)
    kept: dict[torch.dtype, torch.Tensor] | None = getattr(state, VALUES, None)
    if kept is None:
        return dequantized_anew(stored, state, dtype)
    if dtype not in kept:
        kept[dtype] = dequantized_anew(stored, state, dtype)
    return kept[dtype]


def keep_values(state: F.QuantState) -> None:
    """Have the values of the weight that this belongs to made once, at first use, and stay; those in 8 bits until they
    are rounded in another way."""
    setattr(state, VALUES, {})


def dequantized_anew(stored: torch.Tensor, state: F.QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The values [out, in] of a quantized weight that is here, made now."""
    if stored.is_cuda and four_bits.readable(state):
        return four_bits.dequantized(stored, state, dtype)
    whole: torch.Tensor = F.dequantize_4bit(stored.view(-1, 1), state)
    return whole.to(dtype)


@contextmanager
def gathered(*weights: torch.Tensor) -> Iterator[None]:
    """For the while, weights whole that ZeRO-3 has released, as it has in a backward pass those of layers that are no
    leaf modules of its and not recomputed."""
    missing: list[Any] = [one for one in weights if getattr(getattr(one, "ds_status", None), "name", "") == _RELEASED]
    for weight in missing:
        weight.all_gather()
    try:
        yield
    finally:
        for weight in missing:
            weight.partition()
