"""Values of bitsandbytes' 4-bit weights, with their doubly quantized scales, in one kernel."""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Bytes of two values that a program takes."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(packed, out, levels, absmax, code, outer, offset, count, INNER: tl.constexpr, OUTER: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = start + tl.arange(0, BLOCK)
    pair = tl.load(packed + byte, mask=byte * 2 < count, other=0).to(tl.int32)
    first = tl.load(levels + (pair >> 4))
    second = tl.load(levels + (pair & 15))
    # a block's magnitude once for all of its bytes
    block = start * 2 // INNER + tl.arange(0, BLOCK * 2 // INNER)
    inside = block * INNER < count
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        outermost = tl.load(outer + block // OUTER, mask=inside, other=0.0)
        scale = tl.load(code + scale.to(tl.int32)) * outermost + tl.load(offset)
    value = tl.reshape(tl.join(first, second), (BLOCK * 2 // INNER, INNER)) * scale[:, None]
    place = start * 2 + tl.arange(0, BLOCK * 2 // INNER)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)


def readable(state: Any) -> bool:
    """Whether the weight is quantized as this kernel reads it."""
    inner = state.blocksize
    return bool(inner & (inner - 1) == 0 and 64 <= inner <= 2 * BLOCK and (not state.nested or state.state2.blocksize))


def dequantized(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The values [out, in] in `dtype` of a weight that bitsandbytes packed, its `quant_state` beside it.

    Each is rounded once, from a product in fp32 of its level and its block's magnitude; bitsandbytes does the same.
    """
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    count = out.numel()
    nested = state.state2 if state.nested else None
    more = (nested.code, nested.absmax, state.offset) if nested else (state.code, state.absmax, state.code)
    _kernel[(triton.cdiv(count, 2 * BLOCK),)](
        packed.view(torch.uint8), out, state.code, state.absmax, *more, count,
        INNER=state.blocksize, OUTER=nested.blocksize if nested else 1, NESTED=bool(nested), BLOCK=BLOCK, num_warps=8,
        enable_fp_fusion=False,  # bitsandbytes adds the offset apart
    )  # fmt: skip
    return out
