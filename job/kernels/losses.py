"""-log p of targets and the gradient of the logits, in place of the logits: two passes over a row."""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(logits, targets, losses, stride, vocabulary, ignored, SLOPES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    learnt = target != ignored
    column = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if learnt:
        for start in range(0, vocabulary, BLOCK):
            value = tl.load(logits + start + column, mask=start + column < vocabulary, other=float("-inf"))
            value = value.to(tl.float32)
            higher = tl.maximum(highest, value)
            # a column that has seen nothing but -inf has no sum yet
            seen = higher > float("-inf")
            total = tl.where(seen, total * tl.exp(highest - higher) + tl.exp(value - higher), 0.0)
            highest = higher
        top = tl.max(highest, 0)
        norm = top + tl.log(tl.sum(tl.where(highest > float("-inf"), total * tl.exp(highest - top), 0.0), 0))
        tl.store(losses + row, norm - tl.load(logits + target).to(tl.float32))
    else:
        norm = 0.0
        tl.store(losses + row, 0.0)
    if SLOPES:
        tl.debug_barrier()  # the target's logit is read before its place is written
        for start in range(0, vocabulary, BLOCK):
            place = start + column
            inside = place < vocabulary
            value = tl.load(logits + place, mask=inside & learnt, other=float("-inf"))
            slope = tl.exp(value.to(tl.float32) - norm) - tl.where(place == target, 1.0, 0.0)
            tl.store(logits + place, tl.where(learnt, slope, 0.0).to(value.dtype), mask=inside)


def losses_in_place(logits: torch.Tensor, targets: torch.Tensor, ignored: int, slopes: bool) -> torch.Tensor:
    """-log p [N] of the targets [N] in fp32, 0 where they are `ignored`.

    Args:
        logits: [N, V]; in their place is afterwards, if `slopes`, the gradient of the losses' sum.
    """
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _kernel[(len(logits),)](
        logits, targets, found, logits.stride(0), logits.shape[1], ignored, SLOPES=slopes, BLOCK=BLOCK, num_warps=8
    )
    return found
