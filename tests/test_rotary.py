"""Rotary positions in one step: the chain's values bit for bit, its gradients, and who gets it."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

from job.rotary import rotate_in_one_step, rotated
from tests.test_norm_and_gate import GATED, SMALL, through

FAMILIES: dict[str, tuple[Any, int]] = {
    "Llama": (transformers.LlamaConfig(**GATED), 2),
    "Mistral": (transformers.MistralConfig(**GATED), 2),
    "Qwen3": (transformers.Qwen3Config(**GATED, head_dim=8), 2),
    "Gemma2": (transformers.Gemma2Config(**GATED, head_dim=8), 2),
    "Phi, half of a head": (transformers.PhiConfig(**SMALL, intermediate_size=48), 2),
    "GLM-4, neighbours instead of halves": (transformers.Glm4Config(**GATED, head_dim=8), 0),
    "Phi3, within a function of another code": (transformers.Phi3Config(**GATED), 0),
    "OPT, none": (transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0), 0),
}
"""A configuration of each kind, and how many of its modules rotate in one step."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_and_gradients_too(family: str, dtype: torch.dtype) -> None:
    config, count = FAMILIES[family]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    ours = copy.deepcopy(theirs)
    rotate_in_one_step(ours)
    changed = [module for name, module in ours.named_modules() if type(module) is not type(theirs.get_submodule(name))]
    assert len(changed) == count and all(isinstance(one, nn.Module) for one in changed)
    states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    (expected, slope), (found, ours_slope) = through(theirs, states), through(ours, states)
    assert torch.equal(found, expected)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert float((ours_slope.double() - slope.double()).norm() / slope.double().norm()) < tolerance


def test_gradients_are_those_of_float64() -> None:
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 1, 5, 8, requires_grad=True)
    angle = torch.randn(1, 5, 8)
    exact = [one.detach().double().requires_grad_() for one in (q, k)]
    plain = modeling_llama.apply_rotary_pos_emb(*exact, angle.double().cos(), angle.double().sin())
    for outputs in (rotated(q, k, angle.cos(), angle.sin()), plain):
        (outputs[0].square().sum() + outputs[1].pow(3).sum()).backward()
    for found, expected in ((q.grad, exact[0].grad), (k.grad, exact[1].grad)):
        assert found is not None and expected is not None
        assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_what_is_kept_is_angles_alone() -> None:
    kept: list[torch.Tensor] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 1, 5, 8, requires_grad=True)
    angle = torch.randn(2, 5, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        rotated(q, k, angle.cos(), angle.sin())
    assert [value.shape for value in kept] == [angle.shape, angle.shape]


def test_angles_of_another_type_or_place_go_the_long_way() -> None:
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    angle = torch.randn(2, 5, 8)
    found = rotated(q, k, angle.cos(), angle.sin(), unsqueeze_dim=2)
    assert torch.equal(found[0], modeling_llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin(), 2)[0])
    half, _ = rotated(q.transpose(1, 2).bfloat16(), k.transpose(1, 2).bfloat16(), angle.cos(), angle.sin())
    assert half.dtype == torch.float32  # as transformers' chain promotes


def test_other_models_of_the_process_stay_as_they_are() -> None:
    before = modeling_llama.apply_rotary_pos_emb
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["Llama"][0])
    rotate_in_one_step(model)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert modeling_llama.LlamaAttention.forward.__globals__["apply_rotary_pos_emb"] is before
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, modeling_llama.LlamaAttention) and type(attention) is not modeling_llama.LlamaAttention


@pytest.mark.parametrize("angles", [(2, 1, 8), (1, 1, 8)], ids=str)
def test_angles_that_are_one_for_all_tokens_go_the_long_way(angles: tuple[int, ...]) -> None:
    q, k, angle = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.randn(angles)
    found = rotated(q.requires_grad_(), k, angle.cos(), angle.sin())
    expected = modeling_llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[0].grad_fn is not None and "Rotation" not in type(found[0].grad_fn).__name__
