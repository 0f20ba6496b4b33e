"""The arithmetic of linears with LoRA that have the same input, forward and backward, with as few passes over memory as
it takes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import QuantState

from job import fp8
from job.dropout import drop
from job.linear import dequantized, gathered, product
from job.norm_and_gate import gated
from job.recompute import recomputing

if torch.cuda.is_available():
    from job.kernels.low_rank import HIGHEST, MOST, add_low_rank

PER_LAYER = 4
"""Tensors of a layer: its weight, bias, A and B."""


class Layer(NamedTuple):
    """What is no tensor that autograd knows, of one layer: how its weight is quantized, its adapter's scale, the keys
    and share of its dropout, how much wider its weight's scales are in 8 bits (`fp8.widened`), None where it multiplies
    in 16, and whether its output is all that its decoder layer still adds, which nobody reads when that is computed
    again."""

    state: QuantState | None
    scale: float
    tokens: torch.Tensor | None
    features: torch.Tensor | None
    share: float
    wider: float | None
    ends_layer: bool

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] as its adapter sees it."""
        return x if self.tokens is None or self.features is None else drop(x, self.tokens, self.features, self.share)


class Sums(torch.autograd.Function):
    """For each layer y = x W' + bias + scale drop(x) A' B', with dA = (scale dy B)' drop(x) and
    dB = scale dy' (drop(x) A'), and together dx = sum of dy W + drop(scale dy B A)
    (Hu et al. 2021, LoRA, equation 3, and its derivatives).

    The low-rank product is written first, and the wide one added as it comes about. Without dropout the layers' A are
    one, so that x is read once for them, and once for their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: list[Layer],
        parts: tuple[torch.Tensor, torch.Tensor] | None,
        learns: bool,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        outputs, rows = [], x.flatten(0, -2)
        lows = _lows(x, layers, tensors)
        unread = recomputing() and all(one.ends_layer for one in layers)
        small = fp8.scaled(rows) if learns and not unread and any(one.wider is not None for one in layers) else None
        for one, low, (weight, bias, _, b) in zip(layers, lows, _by_layer(tensors), strict=True):
            bias = None if bias is None else bias.to(x.dtype)
            if not learns:
                outputs.append(_alone(x, low, one, weight, bias, b))
                continue
            # what is given on may be changed in place, and no view may: its own memory is filled
            y = (x.new_zeros if unread else x.new_empty)(*x.shape[:-1], len(b))
            outputs.append(y)
            if unread:
                continue
            _fill(y.view(-1, len(b)), rows, small, low, one, weight, bias, b)
        ctx.layers, ctx.shape, ctx.whole = layers, x.shape, parts is None
        keys = [key for one in layers for key in (one.tokens, one.features)]
        ctx.save_for_backward(*((x,) if parts is None else parts), *lows, *keys, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, count, parts = ctx.saved_tensors, len(ctx.layers), 1 if ctx.whole else 2
        tensors = saved[len(saved) - PER_LAYER * count :]
        with gathered(*(one for weight, _, a, b in _by_layer(tensors) for one in (weight, a, b))):
            return _gradients(ctx, grads, saved[:parts], saved[parts:][:count], tensors)


def _gradients(ctx: Any, grads: Any, parts: Any, lows: Any, tensors: Any) -> tuple[torch.Tensor | None, ...]:
    needs = ctx.needs_input_grad
    slopes = [grad.flatten(0, -2) for grad in grads]
    ranks, nothing = [low.shape[1] for low in lows], slopes[0].new_empty(())
    narrow = slopes[0].new_empty(len(slopes[0]), sum(ranks))
    narrows = torch.split_with_sizes(narrow, ranks, 1)
    for one, dy, out, (_, _, _, b) in zip(ctx.layers, slopes, narrows, _by_layer(tensors), strict=True):
        torch.addmm(nothing, dy, b, beta=0, alpha=one.scale, out=out)
    das: Any = [None] * len(lows)
    if any(needs[4 + PER_LAYER * place + 2] for place in range(len(lows))):
        x = parts[0] if ctx.whole else gated(*parts)
        if any(one.tokens is not None for one in ctx.layers):
            das = [its.T @ one.dropped(x).flatten(0, -2) for one, its in zip(ctx.layers, narrows, strict=True)]
        else:
            das = torch.split_with_sizes(narrow.T @ x.flatten(0, -2), ranks)
        del x  # of a gated MLP it was made for this
    found: list[torch.Tensor | None] = []
    for place, (one, dy, low) in enumerate(zip(ctx.layers, slopes, lows, strict=True)):
        _, of_bias, of_a, of_b = needs[4 + PER_LAYER * place :][:PER_LAYER]
        db = torch.addmm(nothing, dy.T, low, beta=0, alpha=one.scale) if of_b else None
        found += [None, dy.sum(0) if of_bias else None, das[place] if of_a else None, db]
    dx = _input_gradient(ctx, slopes, narrow, tensors).view(ctx.shape) if needs[0] else None
    return dx, None, None, None, *found


def _input_gradient(ctx: Any, slopes: list[torch.Tensor], narrow: torch.Tensor, tensors: Any) -> torch.Tensor:
    """dx [N, in]."""
    adapters = [a for _, _, a, _ in _by_layer(tensors)]
    together = torch.cat(adapters) if len(adapters) > 1 else adapters[0]
    dropped = any(one.tokens is not None for one in ctx.layers)
    small = all(one.wider is not None for one in ctx.layers)
    dx = None
    if dropped:
        narrows = torch.split_with_sizes(narrow, [len(a) for a in adapters], 1)
        for one, its, a in zip(ctx.layers, narrows, adapters, strict=True):
            share = one.dropped((its @ a).view(ctx.shape)).flatten(0, -2)
            dx = share if dx is None else dx.add_(share)
    elif not small:
        dx = narrow @ together
    wide = []
    for one, dy, (weight, *_) in zip(ctx.layers, slopes, _by_layer(tensors), strict=True):
        if one.wider is not None:
            wide.append(dy.new_empty(len(dy), ctx.shape[-1]))
            fp8.backward(fp8.scaled(dy), weight, one.state, wide[-1], one.wider)
        else:
            matrix = dequantized(weight, one.state, dy.dtype)
            dx = dy @ matrix if dx is None else dx.addmm_(dy, matrix)
            del matrix  # before the next is made
    if dx is None:
        return _added(wide, narrow, together, 1.0)
    total: torch.Tensor = dx
    for one in wide:
        total.add_(one)
    return total


def _lows(x: torch.Tensor, layers: list[Layer], tensors: Any) -> list[torch.Tensor]:
    """drop(x) A' [N, r] of each layer."""
    adapters = [a for _, _, a, _ in _by_layer(tensors)]
    if len(layers) == 1 or any(one.tokens is not None for one in layers):
        return [one.dropped(x).flatten(0, -2) @ a.T for one, a in zip(layers, adapters, strict=True)]
    together = x.flatten(0, -2) @ torch.cat(adapters).T
    return list(torch.split_with_sizes(together, [len(a) for a in adapters], 1))


def _fill(
    y: torch.Tensor,
    rows: torch.Tensor,
    small: fp8.Scaled | None,
    low: torch.Tensor,
    one: Layer,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    b: torch.Tensor,
) -> None:
    """x W' + bias + scale low B' into y [N, out], of rows x [N, in], which `small` is in 8 bits."""
    if small is not None and one.wider is not None:
        fp8.forward(small, weight, one.state, y, one.wider)
        _added([y], low, b.T, one.scale)
        if bias is not None:
            y += bias
        return
    start = y.new_empty(()) if bias is None else bias
    torch.addmm(start, low, b.T, beta=float(bias is not None), alpha=one.scale, out=y)
    y.addmm_(rows, dequantized(weight, one.state, rows.dtype).T)


def _alone(
    x: torch.Tensor, low: torch.Tensor, one: Layer, weight: torch.Tensor, bias: torch.Tensor | None, b: torch.Tensor
) -> torch.Tensor:
    """The same by bitsandbytes' product, which for few tokens reads the four bits as they are."""
    wide = product(x, weight, bias, one.state)
    return torch.addmm(wide.flatten(0, -2), low, b.T, alpha=one.scale).view(wide.shape)


def _added(parts: list[torch.Tensor], left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """The sum of the parts and of scale left right, in the first part's place."""
    if parts[0].is_cuda and len(parts) <= MOST and left.shape[1] <= HIGHEST:
        return add_low_rank(parts, left, right, scale)
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0].addmm_(left, right, alpha=scale)


def _by_layer(tensors: Any) -> Iterator[Any]:
    """Weight, bias, A and B of each layer."""
    return zip(*(iter(tensors),) * PER_LAYER, strict=True)
