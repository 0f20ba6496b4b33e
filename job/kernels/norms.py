"""RMS norms with frozen weights, forward and backward, each in one pass over memory."""

import torch
import triton
import triton.language as tl

ELEMENTS = 4096
"""A program takes as many rows as have so many elements, at least one."""


@triton.jit  # type: ignore[untyped-decorator]
def _forward(x, weight, y, roots, count, width, epsilon, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < count) & (column < width)
    place = row.to(tl.int64) * width + column
    value = tl.load(x + place, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 1) / width + epsilon)
    scale = tl.load(weight + column, mask=column < width, other=0.0)
    normed = (wide * root[:, None]).to(value.dtype)
    result = scale.to(tl.float32) * normed.to(tl.float32)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(roots + first, root, mask=first < count)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(dy, x, weight, roots, dx, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < count) & (column < width)
    place = row.to(tl.int64) * width + column
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    slope = slope * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    root = tl.load(roots + first, mask=first < count, other=0.0)
    mean = tl.sum(slope * wide, 1) / width
    result = root[:, None] * (slope - wide * (root * root * mean)[:, None])
    tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y = weight * (x r) [..., H] and r = (mean(x^2) + epsilon)^-1/2 as fp32 [rows], x [..., H]."""
    x = x.contiguous()
    count, width = x.numel() // x.shape[-1], x.shape[-1]
    y = torch.empty_like(x, dtype=torch.result_type(x, weight))
    roots = torch.empty(count, dtype=torch.float32, device=x.device)
    sizes = _sizes(width)
    _forward[(triton.cdiv(count, sizes[0]),)](x, weight, y, roots, count, width, epsilon, *sizes, num_warps=8)
    return y, roots


def norm_gradient(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """dx [..., H] of `norm`, of dy [..., H] and what it made."""
    x, dy = x.contiguous(), dy.contiguous()
    count, width = x.numel() // x.shape[-1], x.shape[-1]
    dx = torch.empty_like(x)
    sizes = _sizes(width)
    _backward[(triton.cdiv(count, sizes[0]),)](dy, x, weight, roots, dx, count, width, *sizes, num_warps=8)
    return dx


def _sizes(width: int) -> tuple[int, int]:
    columns = triton.next_power_of_2(width)
    return max(ELEMENTS // columns, 1), columns
