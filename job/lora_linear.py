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
from bitsandbytes.functional import QuantState
from peft.tuners.lora import bnb, layer
from torch import nn

from job.dropout import RowDropout, drop
from job.forward_code import called_alike
from job.linear import FrozenLinear4bit, gathered, product, values
from job.norm_and_gate import gated, keep_less, made_of
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

    def forward(self, asked: Any, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer that was asked."""
        if self.x is x and self.version == x._version and id(asked) in self.made:
            found = self.made.pop(id(asked))
            self.x = x if self.made else None
            return found
        layers = [asked, *(one for one in self.layers if one is not asked and _is_plain(one, x))]
        first, *others = _sums(x, layers)
        self.made = {id(one): output for one, output in zip(layers[1:], others, strict=True)}
        self.x, self.version = (x if others else None), x._version
        return first


class _OneStep:
    """Before one of peft's layers: its forward pass in one step, where its adapter is plain LoRA."""

    together: _Together | None = None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] to [..., out]."""
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


def in_one_step(model: nn.Module) -> None:
    """Have every layer with LoRA compute it in one step where it can, and norms, gated MLPs and rotations too."""
    keep_less(model)
    rotate_in_one_step(model)
    kinds: dict[type, Any] = {bnb.Linear4bit: LoraLinear4bit, layer.Linear: LoraLinear}
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
    groups = {kind: called_alike(kind) for kind in {type(module) for module in model.modules()}}
    for module in model.modules():
        for names in groups[type(module)]:
            layers = [one for one in (getattr(module, name, None) for name in names) if isinstance(one, _OneStep)]
            group = _Together(layers)
            for one in layers if len(layers) > 1 else ():
                one.together = group


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


@dataclass(frozen=True)
class _Layer:
    """What is no tensor that autograd knows, of one layer: how its weight is quantized, its adapter's scale, and the
    keys and share of its dropout."""

    state: QuantState | None
    scale: float
    tokens: torch.Tensor | None
    features: torch.Tensor | None
    share: float

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] as its adapter sees it."""
        return x if self.tokens is None or self.features is None else drop(x, self.tokens, self.features, self.share)


def _sums(x: torch.Tensor, loras: list[Any]) -> tuple[torch.Tensor, ...]:
    layers, tensors = [], []
    for lora in loras:
        base, dropout = lora.base_layer, lora.lora_dropout[ADAPTER]
        mask = dropout.mask(x) if isinstance(dropout, RowDropout) else None
        tokens, features = mask or (None, None)
        share = dropout.p if mask else 0.0
        state = getattr(base.weight, "quant_state", None)
        layers.append(_Layer(state, lora.scaling[ADAPTER], tokens, features, share))
        tensors += [base.weight, base.bias, lora.lora_A[ADAPTER].weight, lora.lora_B[ADAPTER].weight]
    learns = torch.is_grad_enabled()
    outputs: tuple[torch.Tensor, ...] = _Sums.apply(x, layers, made_of(x), learns, *tensors)  # type: ignore[no-untyped-call]
    return outputs


class _Sums(torch.autograd.Function):
    """For each layer y = x W' + bias + scale drop(x) A' B', with dA = (scale dy B)' drop(x) and
    dB = scale dy' (drop(x) A'), and together dx = sum of dy W + drop(scale dy B A)
    (Hu et al. 2021, LoRA, equation 3, and its derivatives)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: list[_Layer],
        parts: tuple[torch.Tensor, torch.Tensor] | None,
        learns: bool,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        outputs, narrow = [], []
        for one, (weight, bias, a, b) in zip(layers, _fours(tensors), strict=True):
            low = one.dropped(x).flatten(0, -2) @ a.T
            y = (_wide if learns else _wide_alone)(x, low, one, weight, bias, b)
            outputs.append(y)
            narrow.append(low)
        ctx.layers, ctx.shape, ctx.whole = layers, x.shape, parts is None
        keys = [key for one in layers for key in (one.tokens, one.features)]
        ctx.save_for_backward(*((x,) if parts is None else parts), *narrow, *keys, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, count, parts = list(ctx.saved_tensors), len(ctx.layers), 1 if ctx.whole else 2
        tensors = saved[len(saved) - 4 * count :]
        with gathered(*(weight for four in _fours(tensors) for weight in four[2:])):
            return _Sums._gradients(ctx, grads, saved[:parts], saved[parts:][:count], tensors)

    @staticmethod
    def _gradients(ctx: Any, grads: Any, parts: Any, lows: Any, tensors: Any) -> tuple[torch.Tensor | None, ...]:
        dx, found = None, []
        x = (parts[0] if ctx.whole else gated(*parts)) if any(ctx.needs_input_grad[6::4]) else None
        for place, (one, low, (weight, _, a, b)) in enumerate(zip(ctx.layers, lows, _fours(tensors), strict=True)):
            _, of_bias, of_a, of_b = ctx.needs_input_grad[4 + 4 * place :][:4]
            dy = grads[place].flatten(0, -2)
            narrow = _scaled(dy, b, one.scale)
            da = narrow.T @ one.dropped(x).flatten(0, -2) if of_a and x is not None else None
            db = _scaled(dy.T, low, one.scale) if of_b else None
            found += [None, dy.sum(0) if of_bias else None, da, db]
            if ctx.needs_input_grad[0]:
                if one.tokens is not None:
                    low_rank = one.dropped((narrow @ a).view(ctx.shape)).flatten(0, -2)
                    dx = low_rank if dx is None else dx.add_(low_rank)
                else:
                    dx = narrow @ a if dx is None else dx.addmm_(narrow, a)
                with values(weight, one.state, dy.dtype) as matrix:
                    dx.addmm_(dy, matrix)
        return None if dx is None else dx.view(ctx.shape), None, None, None, *found


def _fours(tensors: Any) -> Any:
    """Weight, bias, A and B of each layer."""
    return zip(*(iter(tensors),) * 4, strict=True)


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale left right, in one product."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _wide(
    x: torch.Tensor, low: torch.Tensor, one: _Layer, weight: torch.Tensor, bias: torch.Tensor | None, b: torch.Tensor
) -> torch.Tensor:
    # what is given on may be changed in place, and no view may: its own memory is filled
    y = x.new_empty(*x.shape[:-1], len(b))
    rows = y.view(-1, len(b))
    start = y.new_empty(()) if bias is None else bias.to(x.dtype)
    torch.addmm(start, low, b.T, beta=float(bias is not None), alpha=one.scale, out=rows)
    with values(weight, one.state, x.dtype) as matrix:
        rows.addmm_(x.flatten(0, -2), matrix.T)
    return y


def _wide_alone(
    x: torch.Tensor, low: torch.Tensor, one: _Layer, weight: torch.Tensor, bias: torch.Tensor | None, b: torch.Tensor
) -> torch.Tensor:
    """The same by bitsandbytes' product, which for few tokens reads the four bits as they are."""
    wide = product(x, weight, None if bias is None else bias.to(x.dtype), one.state)
    return torch.addmm(wide.flatten(0, -2), low, b.T, alpha=one.scale).view(wide.shape)
