"""Products with the frozen base in 8-bit floating point (E4M3), for GPUs whose units take it.

Every row of the input, every row of the weight and, backwards, every column of it is scaled by its largest magnitude to
the type's, so that a row's outlier costs that row alone (Micikevicius et al. 2022, FP8 Formats for Deep Learning, with
a scale a row); sums are made as the units do them fastest. What is trained is never rounded to 8 bits.

Inputs are others in every step, the weight is the same: an adapter would learn to make up for how it was rounded, and
that is not how it is used later. So every few steps the weight is rounded in another way (see `widened`).
"""

import math
from itertools import pairwise
from typing import Any

import bitsandbytes.functional as F
import torch

from job.linear import VALUES, dequantized_anew

if torch.cuda.is_available():
    from job.kernels import eight_bits

TYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(TYPE).max
MULTIPLE = 16
"""The product's sizes are multiples of it."""

STEPS = 4
"""For how many a weight is rounded in one way: so many that, kept, it costs little to make, few for learning."""
GOLDEN = (math.sqrt(5) - 1) / 2

Scaled = tuple[torch.Tensor, torch.Tensor]
"""FP8 numbers [N, K], and fp32 scales [N, 1] by which they are the values."""


def _mended() -> float:
    """By what numbers are to be multiplied to be the values they were rounded from, on average over all scales: 1.0007.

    Below a power of two numbers lie half as far apart as above it, so more is rounded down to it than up. A row's
    largest value is held as it is: one that outweighs all others makes its row too large by as much.
    """
    numbers = [1 + k * torch.finfo(TYPE).eps for k in range(round(1 / torch.finfo(TYPE).eps) + 1)]
    ends = [1, *((low + high) / 2 for low, high in pairwise(numbers)), 2]
    # the mean of number / value over values that are spread evenly by their logarithm
    return math.log(2) / sum(n * (1 / low - 1 / high) for n, (low, high) in zip(numbers, pairwise(ends), strict=True))


MENDED = _mended()


def fits(out_features: int, in_features: int) -> bool:
    """Whether FP8 units multiply by a weight of these sizes, forward and backward."""
    return out_features % MULTIPLE == 0 and in_features % MULTIPLE == 0


def scaled(x: torch.Tensor) -> Scaled:
    """x [N, K] in 8 bits, with a scale a row."""
    return _rounded(x, 1.0)


def widened(step: int) -> float:
    """By how much a weight's scales are larger in this step than they need be, from 1 to below 2.

    The type has as many numbers between a power of two and the next as between the next two, so that what a value is
    rounded by goes round once while its scale doubles. Multiples of the golden ratio modulo 1 lie far apart, however
    many they are (Knuth, The Art of Computer Programming, volume 3, section 6.4): over steps a value's errors cancel,
    but for a part that all values share and `MENDED` makes up for.
    """
    return math.pow(2, step // STEPS * GOLDEN % 1)


def forward(x: Scaled, weight: torch.Tensor, state: Any, out: torch.Tensor, wider: float = 1.0) -> None:
    """x W' of x [N, in] and the frozen weight [out, in], which is here, into `out` [N, out].

    Args:
        wider: see `widened`.
    """
    _product(x, _weight(weight, state, out.dtype, wider, turned=False), out)


def backward(dy: Scaled, weight: torch.Tensor, state: Any, out: torch.Tensor, wider: float = 1.0) -> None:
    """dy W of dy [N, out], into `out` [N, in]."""
    _product(dy, _weight(weight, state, out.dtype, wider, turned=True), out)


def _product(left: Scaled, right: Scaled, out: torch.Tensor) -> None:
    torch._scaled_mm(
        left[0], right[0].T, scale_a=left[1], scale_b=right[1].T, out_dtype=out.dtype, use_fast_accum=True, out=out
    )


def _weight(weight: torch.Tensor, state: Any, dtype: torch.dtype, wider: float, turned: bool) -> Scaled:
    """The weight, or turned its transpose, with a scale for each of its rows; kept where its values are to be, until
    they are rounded in another way."""
    kept: dict[Any, tuple[float, Scaled]] | None = getattr(state, VALUES, None)
    if kept is None:
        return _made(weight, state, dtype, wider, turned)
    place = (TYPE, turned)
    if place not in kept or kept[place][0] != wider:
        kept.pop(place, None)  # before the next is made
        kept[place] = wider, _made(weight, state, dtype, wider, turned)
    return kept[place][1]


def _made(weight: torch.Tensor, state: Any, dtype: torch.dtype, wider: float, turned: bool) -> Scaled:
    if _by_kernel(weight, state):
        return eight_bits.weight_in_eight_bits(weight.detach(), state, _largest(state, turned), wider, MENDED, turned)
    matrix = weight.detach() if state is None else dequantized_anew(weight.detach(), state, dtype)
    return _rounded(matrix.T if turned else matrix, wider)


def _by_kernel(weight: torch.Tensor, state: Any) -> bool:
    """Whether the weight goes from 4 bits to 8 without values in between."""
    return state is not None and weight.is_cuda and eight_bits.readable(state)


def _has_kernel(x: torch.Tensor) -> bool:
    return x.is_cuda


def _rounded(x: torch.Tensor, wider: float) -> Scaled:
    """x [N, K] over a scale a row, that much wider than it need be."""
    if _has_kernel(x):
        return eight_bits.rows_in_eight_bits(x, wider, MENDED)
    wide = x.float()
    scales = (wide.abs().amax(1, keepdim=True) * (wider / LARGEST)).clamp_(min=1e-30)
    return (wide / scales).to(TYPE), scales * MENDED


def _largest(state: Any, turned: bool) -> torch.Tensor:
    """fp32 [out, 1], or turned [in, 1]: of no less than the largest value, for a block's magnitude is its largest. Made
    once, kept beside the frozen weight's other scales."""
    kept: dict[bool, torch.Tensor] = state.__dict__.setdefault("largest", {})
    if turned not in kept:
        absmax = state.absmax
        if state.nested:
            absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
        blocks = absmax.float().view(state.shape[0], -1) * state.code.abs().max() / LARGEST
        largest = blocks.amax(0).repeat_interleave(state.blocksize) if turned else blocks.amax(1)
        kept[turned] = largest.clamp_(min=1e-30).unsqueeze(1)
    return kept[turned]
