"""Which linears of a module on the meta device become bitsandbytes' quantized ones; a model most of which would not is
refused."""

import re
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from job.config.learning import Quantization
from job.errors import ModelError
from job.experts import fused_experts
from job.linear import FrozenLinear4bit

SAME_PRODUCT = ("FalconLinear",)
"""Subclasses of nn.Linear that write the product in other words."""
KEPT_SHARE = 0.1
"""Up to which share of the weights in the layers no linear may hold, as the convolutions of Mamba."""

_IN_A_LAYER = re.compile(r"(?<![^.])\d+\.")


def quantize(model: Any, name: str, quantization: Quantization, compute_dtype: torch.dtype) -> None:
    """Replace its linears, all but the output layer, by quantized ones.

    Args:
        name: what model.name says, for the message.

    Raises:
        ModelError: more than a tenth of the weights in its layers would stay in 16 bits.
    """
    _refuse_fused_experts(model, name)
    for module in model.modules():
        if isinstance(module, nn.Linear) and _is_plain(type(module)):
            module.__class__ = nn.Linear  # of which alone transformers makes quantized linears
    keep = get_keys_to_not_convert(model)
    replace_with_bnb_linear(model, keep, quantization_config=_bnb_config(quantization, compute_dtype))
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = FrozenLinear4bit
    _refuse_mostly_kept(model, name)


def _is_plain(kind: type[nn.Linear]) -> bool:
    """Whether it multiplies as nn.Linear does. Not torch's own kinds: its attention reads their weights itself."""
    inherits = kind.forward is nn.Linear.forward and not kind.__module__.startswith("torch.")
    return inherits or kind.__name__ in SAME_PRODUCT


def _bnb_config(quantization: Quantization, compute_dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    if quantization.type == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _refuse_fused_experts(model: nn.Module, name: str) -> None:
    fused = next(iter(fused_experts(model)), None)
    if fused:
        raise ModelError(
            f"model.name: {name}: {fused} holds all experts in one tensor, which bitsandbytes does not quantize: most "
            "of the model would stay in 16 bits. Use a dense model, or quantization.type: none"
        )


def _refuse_mostly_kept(model: nn.Module, name: str) -> None:
    """By what the module is: the plan counts matrices by their names, and would call these quantized."""
    quantized, kept = 0, dict[str, int]()
    for path, module in model.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            if not _IN_A_LAYER.search(f"{path}."):
                continue
            if leaf == "weight" and isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
                quantized += module.in_features * module.out_features
            elif value.dim() > 1:
                kept[f"{path}.{leaf}"] = value.numel()
    share = sum(kept.values()) / max(quantized + sum(kept.values()), 1)
    if share > KEPT_SHARE:
        largest = max(kept, key=lambda each: kept[each])
        kind = type(model.get_submodule(largest.rpartition(".")[0])).__name__
        raise ModelError(
            f"model.name: {name}: {share:.0%} of the weights in the layers would stay in 16 bits, such as {largest} of "
            f"a {kind}, which cannot be made a quantized linear. Use another model, or quantization.type: none"
        )
