"""Rotary positions of queries and keys in one kernel, forward and backward."""

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _turn(x, out, cos, sin, token, batch, place, heads, half, x_strides, out_strides, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    column = tl.arange(0, HALF)
    inside = column < half
    c1 = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        mask = (head < heads) & inside[None, :]
        source = x + batch * x_strides[0] + head * x_strides[1] + place * x_strides[2] + column[None, :]
        target = out + batch * out_strides[0] + head * out_strides[1] + place * out_strides[2] + column[None, :]
        first = tl.load(source, mask=mask, other=0.0)
        second = tl.load(source + half, mask=mask, other=0.0)
        kind = first.dtype
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        if BACK:
            one = (a * c1).to(kind).to(tl.float32) + (b * s2).to(kind).to(tl.float32)
            two = (b * c2).to(kind).to(tl.float32) - (a * s1).to(kind).to(tl.float32)
        else:
            one = (a * c1).to(kind).to(tl.float32) - (b * s1).to(kind).to(tl.float32)
            two = (b * c2).to(kind).to(tl.float32) + (a * s2).to(kind).to(tl.float32)
        tl.store(target, one.to(kind), mask=mask)
        tl.store(target + half, two.to(kind), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _both(q, k, q_out, k_out, cos, sin, length, q_heads, k_heads, half, q_strides, k_strides, q_out_strides, k_out_strides, cos_batch, cos_place, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    token = tl.program_id(0)
    batch = (token // length).to(tl.int64)
    place = (token % length).to(tl.int64)
    cos += batch * cos_batch + place * cos_place
    sin += batch * cos_batch + place * cos_place
    if tl.program_id(1) == 0:
        _turn(q, q_out, cos, sin, token, batch, place, q_heads, half, q_strides, q_out_strides, BACK, HEADS, HALF)
    else:
        _turn(k, k_out, cos, sin, token, batch, place, k_heads, half, k_strides, k_out_strides, BACK, HEADS, HALF)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q cos + rotate_half(q) sin, and of k the same, in the memory order of [B, T, heads, D].

    Args:
        q, k: [B, heads, T, D], the last dimension contiguous.
        cos, sin: [B or 1, T, D], alike in memory, the last dimension contiguous.
        back: the gradients of what came in, of the gradients `q` and `k` of what came out.
    """
    q, k = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k))
    batch, _, length, width = q.shape
    outs = [one.new_empty(batch, length, one.shape[1], width).transpose(1, 2) for one in (q, k)]
    strides = [tuple(one.stride()[:3]) for one in (q, k, *outs)]
    _both[(batch * length, 2)](
        q, k, *outs, cos, sin, length, q.shape[1], k.shape[1], width // 2, *strides,
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        BACK=back, HEADS=16, HALF=triton.next_power_of_2(width // 2), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return outs[0], outs[1]
