"""Rotary positions of queries and keys as one operation, that keeps the angles and neither queries nor keys.

Known by its code, the function that transformers copies into most families is left out of their attention for this one;
values are its own, bit for bit in plain torch.
"""

from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.models.llama import modeling_llama

from job.forward_code import code

if torch.cuda.is_available():
    from job.kernels.rotary import rotate

NAME = "apply_rotary_pos_emb"
PARTS = (NAME, "rotate_half")


def rotate_in_one_step(model: nn.Module) -> None:
    """Have attention rotate in one step, where it does what Llama's does: pairs of a head's first and second half."""
    kinds = {kind: _in_place_of(kind) for kind in {type(module) for module in model.modules()}}
    for module in model.modules():
        if kinds[type(module)] is not type(module):
            module.__class__ = kinds[type(module)]


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """q cos + rotate_half(q) sin, and k alike (Su et al. 2021, RoFormer, equation 34), of [B, heads, T, D] each.

    Args:
        cos, sin: [B or 1, T, D].
        unsqueeze_dim: 1; any other goes the long way.
    """
    if unsqueeze_dim != 1 or cos.requires_grad or cos.dtype != q.dtype or q.dim() != 4 or not _fit(q, k, cos, sin):
        long: tuple[torch.Tensor, torch.Tensor] = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return long
    both: tuple[torch.Tensor, torch.Tensor] = _Rotation.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return both


def _fit(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether every token has its angles, in memory as a kernel reads them."""
    (batch, _, length, width), angles = q.shape, cos.shape
    alike = cos.stride() == sin.stride() and cos.stride(-1) == 1 and sin.shape == angles
    tokens = angles in ((batch, length, width), (1, length, width))
    return alike and tokens and (k.shape[0], k.shape[2], k.shape[3]) == (batch, length, width)


class _Rotation(torch.autograd.Function):
    """y1 = x1 c1 - x2 s1 and y2 = x2 c2 + x1 s2 of the halves; dx1 = dy1 c1 + dy2 s2 and dx2 = dy2 c2 - dy1 s1."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        if q.is_cuda:
            return rotate(q, k, cos, sin)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if grads[0].is_cuda:
            return *rotate(grads[0], grads[1], cos, sin, back=True), None, None
        return _turned_back(grads[0], cos, sin), _turned_back(grads[1], cos, sin), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos.unsqueeze(1)).add_(torch.cat((-second, first), -1).mul_(sin.unsqueeze(1)))


def _turned_back(dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = (dy * sin.unsqueeze(1)).chunk(2, -1)
    return (dy * cos.unsqueeze(1)).add_(torch.cat((second, -first), -1))


def _in_place_of(kind: Any) -> Any:
    """The same class, whose forward pass finds ours by the name of the function that it calls."""
    forward = getattr(kind, "forward", None)
    if (
        not isinstance(forward, FunctionType)
        or hasattr(forward, "__wrapped__")
        or NAME not in forward.__code__.co_names
    ):
        return kind
    theirs = forward.__globals__
    if any(code(theirs.get(name)) != code(getattr(modeling_llama, name)) for name in PARTS):
        return kind
    ours = FunctionType(
        forward.__code__, {**theirs, NAME: rotated}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": ours})
