"""Dropout's hash, threshold and product in one Triton kernel; `dropout.kept` is the same in plain torch."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


# no annotations: the compiler looks their names up on the GPU's side
@triton.jit  # type: ignore[untyped-decorator]
def _kernel(x, out, tokens, features, width, threshold, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < width
    mixed = tl.load(tokens + token) ^ tl.load(features + feature, mask=inside, other=0)
    mixed = mixed * -1640531535
    mixed = mixed ^ (mixed >> 15)
    mixed = mixed * -2048144777
    place = token.to(tl.int64) * width + feature
    value = tl.load(x + place, mask=inside, other=0.0)
    scaled = (value.to(tl.float32) * scale).to(value.dtype)
    tl.store(out + place, tl.where(mixed >= threshold, scaled, 0.0), mask=inside)


def drop_on_gpu(
    x_BTF: torch.Tensor, tokens_BT: torch.Tensor, features_F: torch.Tensor, threshold: int, scale: float
) -> torch.Tensor:
    """`x_BTF` with the elements zeroed whose hash is below `threshold`, the rest times `scale` (fp32, then rounded)."""
    x_BTF = x_BTF.contiguous()
    out = torch.empty_like(x_BTF)
    width = x_BTF.shape[-1]
    grid = (tokens_BT.numel(), triton.cdiv(width, BLOCK))
    _kernel[grid](x_BTF, out, tokens_BT.contiguous(), features_F, width, threshold, scale, BLOCK=BLOCK)
    return out
