"""A sum of matrices and a product of low rank, in one pass over the matrices."""

import torch
import triton
import triton.language as tl

MOST = 3
"""Matrices that are summed at once."""
HIGHEST = 128
"""Rank of a product that a program holds in shared memory."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(first, second, third, left, right, height, width, rank, left_stride, right_row, right_column, scale, PARTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < height) & (column < width)
    place = row * width + column
    total = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 1:
        total += tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 2:
        total += tl.load(third + place, mask=inside, other=0.0).to(tl.float32)
    inner = tl.arange(0, RANK)
    a = tl.load(left + row * left_stride + inner[None, :], mask=(row < height) & (inner < rank)[None, :], other=0.0)
    b = tl.load(right + inner[:, None] * right_row + column * right_column, mask=(inner < rank)[:, None] & (column < width), other=0.0)  # fmt: skip  # noqa: E501
    total += tl.dot(a, b, input_precision="ieee") * scale
    tl.store(first + place, total.to(first.dtype.element_ty), mask=inside)


def add_low_rank(parts: list[torch.Tensor], left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """The first part, in whose place is then the sum of all and of scale left right.

    Args:
        parts: one to three of [N, W], contiguous.
        left: [N, R] with R of at most `HIGHEST`, the last dimension contiguous.
        right: [R, W] in any order.
    """
    first, (height, width), rank = parts[0], parts[0].shape, left.shape[1]
    second, third = (parts[place] if len(parts) > place else first for place in (1, 2))
    grid = (triton.cdiv(height, 64), triton.cdiv(width, 128))
    _kernel[grid](
        first, second, third, left, right, height, width, rank, left.stride(0), *right.stride(), scale,
        PARTS=len(parts), RANK=max(triton.next_power_of_2(rank), 16), ROWS=64, COLUMNS=128, num_warps=4,
    )  # fmt: skip
    return first
