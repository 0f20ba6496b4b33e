"""LoRA beside a frozen linear as one operation, in place of peft's chain of five; linears with the same input together.

peft computes y + B(A(drop(x))) * scale by modules, each of which writes a tensor as wide as the output, and autograd
sums three gradients as wide as the input. Here the low-rank product comes first and the wide one is added to it where
it lies, forward and backward; q, k and v of an attention, gate and up of an MLP sum the gradient of what they share in
one place. Kept are x, which the neighbours keep too, and the narrow A(drop(x)): masks are made again, and so is the x
of a gated MLP's last linear, of gate and up, which are kept. Adapters that are more than that (DoRA, several at once,
merged) go peft's way.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import bnb, layer
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from job import fp8
from job.dropout import Places, RowDropout
from job.forward_code import called_alike, code
from job.linear import FrozenLinear4bit, keep_values
from job.lora_sums import Layer, Sums
from job.norm_and_gate import Gated, keep_less, made_of
from job.rotary import rotate_in_one_step

ADAPTER = "default"


@dataclass
class _Together:
    """Layers that their parent calls with the same input. The first that is called computes for all, as far as they are
    plain; the others find their outputs `made`, of the input `x` in its `version`."""

    layers: list[Any]
    x: torch.Tensor | None = None
    version: int = 0
    made: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, asked: Any, x: torch.Tensor) -> torch.Tensor | None:
        """What was made for the layer that is asked."""
        if self.x is not x or self.version != x._version or id(asked) not in self.made:
            return None
        found = self.made.pop(id(asked))
        self.x = x if self.made else None
        return found

    def forward(self, asked: Any, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer that is asked, the first of them."""
        layers = [asked, *(one for one in self.layers if one is not asked and _is_plain(one, x))]
        first, *others = _sums(x, layers)
        self.made = {id(one): output for one, output in zip(layers[1:], others, strict=True)}
        self.x, self.version = (x if others else None), x._version
        return first


class _OneStep:
    """Before one of peft's layers: its forward pass in one step, where its adapter is plain LoRA."""

    together: _Together | None = None
    in_fp8: Places | None = None
    ends_layer = False

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] to [..., out]."""
        made: torch.Tensor | None = self.together.take(self, x) if self.together is not None else None
        if made is not None:
            return made
        if args or kwargs or not _is_plain(self, x):
            other: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return other
        if self.together is not None:
            output: torch.Tensor = self.together.forward(self, x)
            return output
        (alone,) = _sums(x, [self])
        return alone


class LoraLinear4bit(_OneStep, bnb.Linear4bit):  # type: ignore[misc]
    """peft's layer around a 4-bit linear, in one step."""


class LoraLinear(_OneStep, layer.Linear):  # type: ignore[misc]
    """peft's layer around a linear that is not quantized, in one step."""


def in_one_step(model: nn.Module, base_in_fp8: Places | None = None, values_kept: bool = False) -> None:
    """Have every layer with LoRA compute it in one step where it can, and norms, gated MLPs and rotations too.

    Args:
        base_in_fp8: have these layers multiply by their frozen weights in 8 bits while they learn, rounded as in the
            step that this is moved to.
        values_kept: have the values of their 4-bit weights kept.
    """
    keep_less(model)
    rotate_in_one_step(model)
    kinds: dict[type, Any] = {bnb.Linear4bit: LoraLinear4bit, layer.Linear: LoraLinear}
    found: list[Any] = [module for module in model.modules() if type(module) in kinds]
    for lora in found:
        lora.__class__ = kinds[type(lora)]
        lora.in_fp8 = base_in_fp8 if fp8.fits(lora.out_features, lora.in_features) else None
        if values_kept and type(lora.base_layer) is FrozenLinear4bit:
            keep_values(lora.base_layer.weight.quant_state)
    classes = {type(module) for module in model.modules()}
    groups = {kind: called_alike(kind) for kind in classes}
    like_llamas = {kind: code(kind) == code(LlamaDecoderLayer) for kind in classes}
    for module in model.modules():
        for names in groups[type(module)]:
            layers = [one for one in (getattr(module, name, None) for name in names) if isinstance(one, _OneStep)]
            group = _Together(layers)
            if len(layers) > 1 and all(one.together is None for one in layers):
                for one in layers:
                    one.together = group
        last = getattr(getattr(module, "mlp", None), "down_proj", None)
        if isinstance(last, _OneStep) and isinstance(module.mlp, Gated) and like_llamas[type(module)]:
            last.ends_layer = True


def _is_plain(lora: Any, x: torch.Tensor) -> bool:
    if x.dim() < 2 or not x.numel():
        return False
    if lora.disable_adapters or lora.merged or list(lora.active_adapters) != [ADAPTER] or lora.lora_variant:
        return False
    # looked up where torch keeps them: its modules' own way takes longer than a small product
    parts = lora._modules
    base = parts["base_layer"]
    a, b, dropout = (parts[name]._modules[ADAPTER] for name in ("lora_A", "lora_B", "lora_dropout"))
    weight, its_a, its_b = (one._parameters["weight"] for one in (base, a, b))
    if type(base) not in (FrozenLinear4bit, nn.Linear) or b._parameters["bias"] is not None or weight.requires_grad:
        return False
    if type(base) is FrozenLinear4bit and x.dtype == torch.float16 != base.compute_dtype:
        return False  # bitsandbytes computes in the type of x where that is one of the others
    if type(base) is nn.Linear and weight.dtype != x.dtype:
        return False
    if not isinstance(dropout, RowDropout | nn.Identity):
        return False
    here = _is_here(weight) and _is_here(its_a) and _is_here(its_b)
    return here and its_a.dtype == its_b.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


def _is_here(weight: torch.Tensor) -> bool:
    """Whether the weight is whole: ZeRO-3 gathers some only when their own module is called."""
    status = getattr(weight, "ds_status", None)
    return status is None or status.name == "AVAILABLE"


def _sums(x: torch.Tensor, loras: list[Any]) -> tuple[torch.Tensor, ...]:
    layers, tensors = [], []
    for lora in loras:
        parts = lora._modules
        base = parts["base_layer"]._parameters
        a, b, dropout = (parts[name]._modules[ADAPTER] for name in ("lora_A", "lora_B", "lora_dropout"))
        mask = dropout.mask(x) if type(dropout) is RowDropout else None
        tokens, features = mask or (None, None)
        share = dropout.p if mask else 0.0
        state = getattr(base["weight"], "quant_state", None)
        wider = None if lora.in_fp8 is None else fp8.widened(lora.in_fp8.step)
        layers.append(Layer(state, lora.scaling[ADAPTER], tokens, features, share, wider, lora.ends_layer))
        tensors += [base["weight"], base["bias"], a._parameters["weight"], b._parameters["weight"]]
    outputs: tuple[torch.Tensor, ...] = Sums.apply(  # type: ignore[no-untyped-call]
        x, layers, made_of(x), torch.is_grad_enabled(), *tensors
    )
    return outputs
