"""The experts of a Mixture-of-Experts as linears, in the place of the tensors into which transformers fuses them.

bitsandbytes quantizes linears, and the files hold each expert apart: so every part of an expert is read, quantized and
sharded like any other weight.
"""

from typing import Any

import torch
from torch import nn


class Expert(nn.Module):
    """A gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] to the same."""
        product: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return product


class Experts(nn.ModuleList):
    """All experts of a layer. Ranks may skip different ones: ZeRO-3 gathers a decoder layer as a unit."""

    def __init__(self, fused: Any):
        count, hidden, inner = fused.down_proj.shape
        super().__init__(Expert(hidden, inner, fused.act_fn) for _ in range(count))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what each token's experts make of it.

        Args:
            x: tokens [N, hidden].
            chosen: numbers of each token's experts [N, k].
            weights: their weights [N, k].
        """
        total = torch.zeros_like(x)
        for number, expert in enumerate(self):
            tokens, place = torch.where(chosen == number)
            if not tokens.numel():
                continue
            out = expert(x[tokens]) * weights[tokens, place, None]
            total = total.index_add(0, tokens, out.to(total.dtype))
        return total


def separate(model: nn.Module) -> None:
    """Put `Experts` in the place of every module with fused experts, as Mixtral's and Qwen3's are; on meta."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("Experts") and hasattr(module, "gate_up_proj"):
            with torch.device("meta"):
                apart = Experts(module).to(module.gate_up_proj.dtype)
            model.set_submodule(name, apart)


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a weight of every expert of a layer."""
    return [name for name, value in model.named_parameters() if value.dim() == 3 and "expert" in name]
