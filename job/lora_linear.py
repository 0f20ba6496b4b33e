"""LoRA beside a frozen linear as one operation, in place of peft's chain of five.

peft computes y + B(A(drop(x))) * scale by modules, each of which writes a tensor as wide as the output, and autograd
sums three gradients as wide as the input. Here the low-rank product is added to the base's output where it lies, and
in the backward pass to the base's gradient; kept are x, which the neighbours keep too, and the narrow A(drop(x)): masks
are made again, and so is the x of a gated MLP's last linear, of gate and up, which are kept. Adapters that are more
than that (DoRA, several at once, merged) go peft's way.
"""

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from peft.tuners.lora import bnb, layer
from torch import nn

from job.dropout import RowDropout, drop
from job.linear import FrozenLinear4bit, gathered, product, values
from job.norm_and_gate import gated, keep_less, made_of

ADAPTER = "default"


class _OneStep:
    """Before one of peft's layers: its forward pass in one step, where its adapter is plain LoRA."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] to [..., out]."""
        if args or kwargs or not _is_plain(self, x):
            other: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return other
        base, a, b = self.base_layer, self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        dropout = self.lora_dropout[ADAPTER]
        mask = dropout.mask(x) if isinstance(dropout, RowDropout) else None
        share = dropout.p if mask else 0.0
        tokens, features = mask or (None, None)
        state = getattr(base.weight, "quant_state", None)
        result: torch.Tensor = _Sum.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, state, a, b, self.scaling[ADAPTER], tokens, features, share, made_of(x)
        )
        return result


class LoraLinear4bit(_OneStep, bnb.Linear4bit):  # type: ignore[misc]
    """peft's layer around a 4-bit linear, in one step."""


class LoraLinear(_OneStep, layer.Linear):  # type: ignore[misc]
    """peft's layer around a linear that is not quantized, in one step."""


def in_one_step(model: nn.Module) -> None:
    """Have every layer with LoRA compute it in one step where it can, and norms and gated MLPs too."""
    keep_less(model)
    kinds: dict[type, Any] = {bnb.Linear4bit: LoraLinear4bit, layer.Linear: LoraLinear}
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]


def _is_plain(lora: Any, x: torch.Tensor) -> bool:
    if x.dim() < 2 or not x.numel():
        return False
    if lora.disable_adapters or lora.merged or list(lora.active_adapters) != [ADAPTER] or lora.lora_variant:
        return False
    base, a, b = lora.base_layer, lora.lora_A[ADAPTER], lora.lora_B[ADAPTER]
    if type(base) not in (FrozenLinear4bit, nn.Linear) or b.bias is not None or base.weight.requires_grad:
        return False
    if type(base) is FrozenLinear4bit and x.dtype == torch.float16 != base.compute_dtype:
        return False  # bitsandbytes computes in the type of x where that is one of the others
    if type(base) is nn.Linear and base.weight.dtype != x.dtype:
        return False
    if not isinstance(lora.lora_dropout[ADAPTER], RowDropout | nn.Identity):
        return False
    here = all(_is_here(weight) for weight in (base.weight, a.weight, b.weight))
    return here and a.weight.dtype == b.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


def _is_here(weight: torch.Tensor) -> bool:
    """Whether the weight is whole: ZeRO-3 gathers some only when their own module is called."""
    status = getattr(weight, "ds_status", None)
    return status is None or status.name == "AVAILABLE"


class _Sum(torch.autograd.Function):
    """y = x W' + bias + scale drop(x) A' B', with dx = dy W + drop(scale dy B A), dA = (scale dy B)' drop(x) and
    dB = scale dy' (drop(x) A') (Hu et al. 2021, LoRA, equation 3, and its derivatives)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: QuantState | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        tokens: torch.Tensor | None,
        features: torch.Tensor | None,
        share: float,
        parts: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        y = product(x, weight, None if bias is None else bias.to(x.dtype), state)
        if y._is_view() or not y.is_contiguous():  # what is given on may be changed in place, and no view may
            y = y.clone(memory_format=torch.contiguous_format)
        low = _dropped(x, tokens, features, share).flatten(0, -2) @ a.T
        y.view(len(low), -1).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(weight, a, b, low, tokens, features, *(parts or (x,)))
        ctx.state, ctx.scale, ctx.share, ctx.shape = state, scale, share, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, a, b, *_ = saved = ctx.saved_tensors
        with gathered(a, b):
            return _Sum._gradients(ctx, grads[0].flatten(0, -2), *saved)

    @staticmethod
    def _gradients(ctx: Any, dy: torch.Tensor, *saved: Any) -> tuple[torch.Tensor | None, ...]:
        weight, a, b, low, tokens, features, *parts = saved
        narrow = (dy @ b).mul_(ctx.scale)
        da = None
        if ctx.needs_input_grad[4]:
            x = parts[0] if len(parts) == 1 else gated(*parts)
            da = narrow.T @ _dropped(x, tokens, features, ctx.share).flatten(0, -2)
            del x  # of a gated MLP it was made for this
        db = (dy.T @ low).mul_(ctx.scale) if ctx.needs_input_grad[5] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            with values(weight, ctx.state, dy.dtype) as matrix:
                dx = dy @ matrix
            if tokens is None:
                dx.addmm_(narrow, a)
            else:
                dx += _dropped((narrow @ a).view(ctx.shape), tokens, features, ctx.share).flatten(0, -2)
            dx = dx.view(ctx.shape)
        return dx, None, dbias, None, da, db, None, None, None, None, None


def _dropped(x: torch.Tensor, tokens: torch.Tensor | None, features: torch.Tensor | None, share: float) -> torch.Tensor:
    return x if tokens is None or features is None else drop(x, tokens, features, share)
