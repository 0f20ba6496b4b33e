"""Rows, and 4-bit weights, as FP8 numbers with a scale each: read once, written once."""

from typing import Any

import torch
import triton
import triton.language as tl

TYPE = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)
"""Of the type."""
TILES = {False: (16, 512), True: (128, 128)}
"""Rows and columns of weights that a program takes, for a result as it lies and for a transposed one."""


@triton.jit  # type: ignore[untyped-decorator]
def _rows(x, out, scales, width, stride, wider, mended, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0) * (wider / LARGEST), 1e-30)
    tl.store(out + row * width + column, (value / scale).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale * mended)


@triton.jit  # type: ignore[untyped-decorator]
def _weight(packed, out, wide, scales, wider, mended, levels, absmax, code, outer, offset, height, width, INNER: tl.constexpr, OUTER: tl.constexpr, NESTED: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    GROUPS: tl.constexpr = COLUMNS // INNER
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    byte = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    there = (row < height)[:, None]
    pair = tl.load(packed + row[:, None] * (width // 2) + byte[None, :], mask=there & (byte < width // 2)[None, :], other=0).to(tl.int32)  # fmt: skip  # noqa: E501
    both = tl.join(tl.load(levels + (pair >> 4)), tl.load(levels + (pair & 15)))
    block = row[:, None] * (width // INNER) + group[None, :]
    known = there & (group < width // INNER)[None, :]
    magnitude = tl.load(absmax + block, mask=known, other=0)
    if NESTED:
        outermost = tl.load(outer + block // OUTER, mask=known, other=0.0)
        magnitude = tl.load(code + magnitude.to(tl.int32)) * outermost + tl.load(offset)
    value = tl.reshape(both, (ROWS, GROUPS, INNER)) * magnitude[:, :, None]
    value = tl.reshape(value, (ROWS, COLUMNS))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if TURNED:
        scale = tl.load(scales + column, mask=column < width, other=1.0) * wider
        tl.store(wide + column, scale * mended, mask=(column < width) & (tl.program_id(0) == 0))
        small = tl.trans((value / scale[None, :]).to(out.dtype.element_ty))
        place = column[:, None].to(tl.int64) * height + row[None, :]
        tl.store(out + place, small, mask=(column < width)[:, None] & (row < height)[None, :])
    else:
        scale = tl.load(scales + row, mask=row < height, other=1.0) * wider
        tl.store(wide + row, scale * mended, mask=(row < height) & (tl.program_id(1) == 0))
        place = row[:, None] * width + column[None, :]
        tl.store(out + place, (value / scale[:, None]).to(out.dtype.element_ty), mask=there & (column < width)[None, :])


def rows_in_eight_bits(x: torch.Tensor, wider: float, mended: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, K] as FP8 numbers [N, K] times scales [N, 1] in fp32.

    Args:
        wider: by how much the scales are larger than those that take each row's largest to the type's, 1 to 2.
        mended: by how much those that are given back are larger than those by which was divided.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=TYPE, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    columns = triton.next_power_of_2(x.shape[1])
    warps = min(max(columns // 512, 4), 16)
    _rows[(len(x),)](x, out, scales, x.shape[1], x.stride(0), float(wider), mended, COLUMNS=columns, num_warps=warps)
    return out, scales


def readable(state: Any) -> bool:
    """Whether the weight is quantized as this kernel reads it: blocks lie within rows."""
    inner = state.blocksize
    return bool(inner & (inner - 1) == 0 and 64 <= inner <= 128 and state.shape[1] % inner == 0)


def weight_in_eight_bits(
    packed: torch.Tensor, state: Any, scales: torch.Tensor, wider: float, mended: float, turned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of a weight [out, in] that bitsandbytes packed as FP8 numbers, times scales in fp32.

    Args:
        scales: fp32, one for each row [out, 1], or, `turned`, for each column [in, 1]; no value is larger than 448 of
            them.
        wider: by how much the scales are larger than these, 1 to 2.
        mended: by how much those that are given back are larger still.
        turned: give [in, out].
    """
    height, width = state.shape
    out = torch.empty((width, height) if turned else (height, width), dtype=TYPE, device=packed.device)
    wide = torch.empty_like(scales)
    nested = state.state2 if state.nested else None
    more = (nested.code, nested.absmax, state.offset) if nested else (state.code, state.absmax, state.code)
    rows, columns = TILES[turned]
    _weight[(triton.cdiv(height, rows), triton.cdiv(width, columns))](
        packed.view(torch.uint8), out, wide, scales, float(wider), mended, state.code, state.absmax, *more, height,
        width, INNER=state.blocksize, OUTER=nested.blocksize if nested else 1, NESTED=bool(nested),
        TURNED=turned, ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return out, wide
