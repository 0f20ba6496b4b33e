"""RMS norms and gated MLPs as one operation each, that keep less for the backward pass than transformers' chains.

A norm keeps its input as it came instead of a copy in fp32. Of a gated MLP gate and up are kept; what is made of them,
which the linear behind would keep for its adapter, is made again. In plain torch values are those of the chains, bit
for bit; kernels take the same formulas and roundings and sum in another order.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from job.experts import Expert
from job.forward_code import code

if torch.cuda.is_available():
    from job.kernels import gates, norms

SILU = (nn.SiLU, SiLUActivation)
MADE_OF = "made_of"
"""Attribute of an activated gate times up: these two, and its version, which a change in place would raise."""


def keep_less(model: nn.Module) -> None:
    """Have norms and gated MLPs whose code is Llama's, as that of most families is, computed in one step each."""
    kinds: dict[type, Any] = {kind: _in_place_of(kind) for kind in {type(module) for module in model.modules()}}
    for module in model.modules():
        ours = kinds[type(module)]
        if ours is not None and ours.can(module):
            module.__class__ = ours


def made_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Gate and up where `x` is silu(gate) * up in a graph, so that it need not be kept; see `gated`."""
    *parts, version = getattr(x, MADE_OF, (None,))
    return (parts[0], parts[1]) if parts and x._version == version else None


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020, GLU Variants Improve Transformer), without a graph."""
    if gate.is_cuda:
        return gates.gate_times_up(gate.contiguous(), up.contiguous())
    return F.silu(gate).mul_(up)


class _Norm:
    """In front of a module like LlamaRMSNorm."""

    @staticmethod
    def can(module: Any) -> bool:
        """Whether it is the one that the gradient is known of."""
        return not module.weight.requires_grad

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] to the same."""
        if self.weight.requires_grad:  # it was not when the module was looked at
            plain: torch.Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return plain
        result: torch.Tensor = _RmsNorm.apply(  # type: ignore[no-untyped-call]
            hidden_states, self.weight, self.variance_epsilon
        )
        return result


class Gated:
    """In front of a module like LlamaMLP."""

    @staticmethod
    def can(module: Any) -> bool:
        """Whether it is the one that the gradient is known of."""
        return type(module.act_fn) in SILU

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """[..., H] to the same."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product: torch.Tensor = _Gate.apply(gate, up)  # type: ignore[no-untyped-call]
        if product.requires_grad:
            setattr(product, MADE_OF, (gate, up, product._version))
        result: torch.Tensor = self.down_proj(product)
        return result


class _RmsNorm(torch.autograd.Function):
    """y = w * (x r), r = (mean(x^2) + eps)^-1/2 in fp32 (Zhang and Sennrich 2019, equation 4), w frozen;
    dx = r (g - x r^2 mean(g x)) with g = w dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        if x.is_cuda:
            y, roots = norms.norm(x, weight, epsilon)
            ctx.save_for_backward(x, weight, roots)
            return y
        wide = x.float()
        roots = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, weight, roots)
        return weight * (wide * roots).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, roots = ctx.saved_tensors
        if x.is_cuda:
            return norms.norm_gradient(grads[0], x, weight, roots), None, None
        wide, slopes = x.float(), (grads[0] * weight).float()
        means = (slopes * wide).mean(-1, keepdim=True)
        slopes.addcmul_(wide, roots.square() * means, value=-1).mul_(roots)
        return slopes.to(x.dtype), None, None


class _Gate(torch.autograd.Function):
    """y = silu(g) u; dg = dy u s (1 + g (1 - s)) with s = sigmoid(g), and du = dy silu(g)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        gate, up = ctx.saved_tensors
        if gate.is_cuda and all(ctx.needs_input_grad) and gate.is_contiguous() and up.is_contiguous():
            gates.gradients_in_place(grads[0].contiguous(), gate, up)
            # what is used up: whoever would go through the graph again is told
            torch.autograd.graph.increment_version((gate, up))
            return gate.detach(), up.detach()
        dgate = dup = None
        if ctx.needs_input_grad[0]:
            dgate = grads[0] * up
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        if ctx.needs_input_grad[1]:
            dup = F.silu(gate).mul_(grads[0])
        return dgate, dup


def _in_place_of(kind: Any) -> Any:
    """The same class with one of ours in front of it; None where its forward pass is written in another way.

    transformers copies Llama's into each family, but for documentation and annotations.
    """
    for ours, references in ((_Norm, (LlamaRMSNorm,)), (Gated, (LlamaMLP, Expert))):
        if code(kind) in map(code, references):
            return type(kind.__name__, (ours, kind), {"__module__": kind.__module__})
    return None
