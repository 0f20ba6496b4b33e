"""RMS norms and gated MLPs in one step each: the chains' values bit for bit, and their gradients."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from job.experts import Expert
from job.norm_and_gate import keep_less, made_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = GATED | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[Any, int, int]] = {
    "Llama": (transformers.LlamaConfig(**GATED), 5, 2),
    "Mistral": (transformers.MistralConfig(**GATED), 5, 2),
    "Qwen2": (transformers.Qwen2Config(**GATED), 5, 2),
    "Qwen3, norms of heads": (transformers.Qwen3Config(**GATED, head_dim=8), 9, 2),
    "Phi3, gate and up fused": (transformers.Phi3Config(**GATED), 5, 0),
    "GLM-4, four norms a layer": (transformers.Glm4Config(**GATED, head_dim=8), 9, 0),
    "Granite": (transformers.GraniteConfig(**GATED), 5, 2),
    "Qwen2-MoE, a shared expert": (transformers.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=16), 5, 2),
    "Llama with another activation": (transformers.LlamaConfig(**GATED, hidden_act="gelu"), 5, 0),
    "Gemma2, other norms": (transformers.Gemma2Config(**GATED, head_dim=8), 0, 0),
    "OPT, none of both": (transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0), 0, 0),
}
"""A configuration of each kind, and how many norms and MLPs of it are computed in one step."""


def both(config: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A frozen model with random weights, norms' too, and the same in one step."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for name, value in theirs.named_parameters():
        if "norm" in name:
            nn.init.normal_(value, 1.0, 0.3)
    theirs = theirs.to(dtype).requires_grad_(False)
    ours = copy.deepcopy(theirs)
    keep_less(ours)
    return theirs, ours


def through(model: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the states that came in."""
    states = states.clone().requires_grad_()
    logits = model(inputs_embeds=states, use_cache=False).logits
    (logits.float() ** 2).sum().backward()
    assert states.grad is not None
    return logits.detach(), states.grad


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_and_gradients_too(family: str) -> None:
    config, norms, gates = FAMILIES[family]
    theirs, ours = both(config)
    changed = [module for name, module in ours.named_modules() if type(module) is not type(theirs.get_submodule(name))]
    assert sum(isinstance(module, LlamaMLP) or hasattr(module, "gate_proj") for module in changed) == gates
    assert len(changed) == norms + gates
    states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    (expected, slope), (found, ours_slope) = through(theirs, states), through(ours, states)
    assert torch.equal(found, expected)
    assert distance(ours_slope, slope) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_values_are_the_same_bits_and_gradients_are_no_further_from_the_truth(dtype: torch.dtype) -> None:
    theirs, ours = both(FAMILIES["Llama"][0], dtype)
    states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    (expected, slope), (found, ours_slope) = through(theirs, states), through(ours, states)
    assert torch.equal(found, expected)
    _, truth = through(copy.deepcopy(theirs).float(), states.float())
    assert distance(ours_slope, truth) < 1.1 * distance(slope, truth)


def test_gradients_are_those_of_the_formulas_in_float64() -> None:
    norm, mlp = LlamaRMSNorm(16, 1e-5).requires_grad_(False), Expert(16, 24, nn.SiLU()).requires_grad_(False)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(norm, mlp)
    keep_less(model)
    x = torch.randn(5, 16, requires_grad=True)
    model(x).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    normed = norm.weight.double() * exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gate, up, down = (one.weight.double() for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gate = normed @ gate.T
    ((gate / (1 + (-gate).exp()) * (normed @ up.T)) @ down.T).square().sum().backward()
    assert x.grad is not None and exact.grad is not None
    assert distance(x.grad, exact.grad) < 1e-6


def test_what_came_in_is_not_changed() -> None:
    model = nn.Sequential(LlamaRMSNorm(16), Expert(16, 24, nn.SiLU())).requires_grad_(False)
    keep_less(model)
    x = torch.randn(5, 16)
    before, states, slope = x.clone(), x.requires_grad_(), torch.ones(5, 16)
    kept = slope.clone()
    model(states).backward(slope, retain_graph=True)
    model[0](states).backward(slope)
    assert torch.equal(states, before) and torch.equal(slope, kept)


def test_a_norm_that_is_trained_goes_the_long_way() -> None:
    norm = LlamaRMSNorm(16)
    model = nn.Sequential(norm)
    keep_less(model)
    assert type(norm) is LlamaRMSNorm
    norm.requires_grad_(False)
    keep_less(model)
    assert type(norm) is not LlamaRMSNorm and isinstance(norm, LlamaRMSNorm)
    norm.requires_grad_(True)
    norm(torch.randn(3, 16)).sum().backward()
    assert norm.weight.grad is not None


def test_parts_stay_with_what_was_made_of_them_only_where_a_gradient_will_ask() -> None:
    class Down(nn.Linear):
        seen: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).seen = made_of(x)
            return super().forward(x)

    mlp = Expert(16, 24, nn.SiLU()).requires_grad_(False)
    mlp.down_proj.__class__ = Down
    keep_less(mlp)
    mlp(torch.randn(3, 16, requires_grad=True))
    gate, up = Down.seen
    assert gate.shape == up.shape == (3, 24)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            mlp(torch.randn(3, 16))
        assert Down.seen is None
