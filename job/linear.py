"""The frozen 4-bit linear: bitsandbytes' product, without its hold on weights that ZeRO-3 gathered."""

from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch


class FrozenLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' Linear4bit, to which it is equal bit for bit in values and gradients.

    For the backward pass its own product keeps the gathered weight as a plain attribute, where neither DeepSpeed's
    release of a ZeRO-3 weight nor recomputation can free it (bitsandbytes#2034). Ours keeps the Parameter, whose
    memory DeepSpeed takes and gives back.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out] in the type of x."""
        state = self.weight.quant_state
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        if not needs_grad:
            plain: torch.Tensor = super().forward(x)
            return plain
        if not getattr(self, "compute_type_is_set", False):
            self.set_compute_type(x)
            self.compute_type_is_set = True
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.to(self.compute_dtype), self.weight, bias, state
        )
        return product.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: F.QuantState
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)  # the leaf itself: what DeepSpeed does to its data, this sees
        ctx.state = state
        product: torch.Tensor = bnb.matmul_4bit(x.detach(), weight.detach(), bias=bias, quant_state=state)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        gathered = getattr(weight, "ds_status", None)
        missing = gathered is not None and gathered.name == "NOT_AVAILABLE"
        if missing:  # layers that are no ZeRO-3 leaf modules and not recomputed
            weight.all_gather()
        values = F.dequantize_4bit(weight.detach().view(-1, 1), ctx.state).to(grads[0].dtype)
        if missing:
            weight.partition()
        bias = grads[0].flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return torch.matmul(grads[0], values), None, bias, None
