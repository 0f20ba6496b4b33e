"""silu(gate) * up, forward and backward, each in one pass over memory."""

import torch
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit  # type: ignore[untyped-decorator]
def _forward(gate, up, y, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0)
    u = tl.load(up + place, mask=inside, other=0.0)
    wide = g.to(tl.float32)
    active = (wide * tl.sigmoid(wide)).to(g.dtype)
    tl.store(y + place, (active.to(tl.float32) * u.to(tl.float32)).to(u.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(dy, gate, up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    slope = tl.load(dy + place, mask=inside, other=0.0)
    g = tl.load(gate + place, mask=inside, other=0.0)
    u = tl.load(up + place, mask=inside, other=0.0)
    wide = g.to(tl.float32)
    share = tl.sigmoid(wide)
    active = (wide * share).to(g.dtype).to(tl.float32)
    to_active = (slope.to(tl.float32) * u.to(tl.float32)).to(g.dtype).to(tl.float32)
    dgate = to_active * share * (1.0 + wide * (1.0 - share))
    tl.store(up + place, (active * slope.to(tl.float32)).to(u.dtype), mask=inside)
    tl.store(gate + place, dgate.to(g.dtype), mask=inside)


def gate_times_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all [...] and contiguous."""
    y = torch.empty_like(up)
    _forward[(triton.cdiv(y.numel(), BLOCK),)](gate, up, y, y.numel(), BLOCK=BLOCK, num_warps=8)
    return y


def gradients_in_place(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Put the gradients of gate and up in their places; all [...] and contiguous."""
    _backward[(triton.cdiv(up.numel(), BLOCK),)](dy, gate, up, up.numel(), BLOCK=BLOCK, num_warps=8)
