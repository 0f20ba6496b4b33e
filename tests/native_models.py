"""Tiny models with random weights of every family that transformers knows by its own names."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from tests.conftest import make_tokenizer

LEGACY = Path(__file__).parent / "legacy_models"
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
SMALL |= {"max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = SMALL | {"intermediate_size": 160, "num_key_value_heads": 2}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 256}
PLAIN = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 24, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS = {
    "Llama 2": transformers.LlamaConfig(**GATED),
    "Llama 3.2": transformers.LlamaConfig(**GATED, tie_word_embeddings=True, rope_parameters=LLAMA_3),
    "Mistral": transformers.MistralConfig(**GATED, sliding_window=32),
    "Mixtral": transformers.MixtralConfig(**GATED, num_local_experts=4),
    "OLMoE": transformers.OlmoeConfig(**GATED, num_experts=8, num_experts_per_tok=2),
    "Qwen2.5": transformers.Qwen2Config(**GATED),
    "Qwen3": transformers.Qwen3Config(**GATED, head_dim=32),
    "Qwen2-MoE": transformers.Qwen2MoeConfig(**GATED, **EXPERTS, shared_expert_intermediate_size=96),
    "Qwen3-MoE": transformers.Qwen3MoeConfig(**GATED, head_dim=16, **EXPERTS),
    "GLM-4 (2024)": transformers.GlmConfig(**GATED, head_dim=16),
    "GLM-4 (2025)": transformers.Glm4Config(**GATED, head_dim=16),
    "Gemma": transformers.GemmaConfig(**GATED, head_dim=32),
    "Gemma 2": transformers.Gemma2Config(**GATED, head_dim=32),
    "Gemma 3": transformers.Gemma3TextConfig(**GATED, head_dim=32),
    "Phi-4": transformers.Phi3Config(**GATED),
    "Phi-4-mini": transformers.Phi3Config(**GATED, tie_word_embeddings=True, partial_rotary_factor=0.75),
    "OPT": transformers.OPTConfig(**SMALL, ffn_dim=256, word_embed_proj_dim=64),
    "OPT-350m": transformers.OPTConfig(**SMALL, ffn_dim=256, word_embed_proj_dim=32, do_layer_norm_before=False),
    "GPT-2": transformers.GPT2Config(**PLAIN, n_embd=64, n_layer=2, n_head=4, n_positions=512),
    "Pythia": transformers.GPTNeoXConfig(**SMALL, intermediate_size=256),
}


SEEING = "Gemma 3 with images"


def make(name: str, folder: Path) -> Path:
    """Write the model in fp32 with a tokenizer into `folder`, which is returned."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for value in model.parameters():  # beyond what is drawn at first, so that no term is too small to be seen
            value.add_(torch.randn_like(value), alpha=0.05)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def seeing(folder: Path) -> Path:
    """Write a Gemma 3 that sees images, with a tokenizer, into `folder`, which is returned."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=CONFIGS["Gemma 3"], vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def tiny(name: str, folder: Path) -> Path:
    """A folder with the model; those under their authors' names are there already."""
    if name not in (*CONFIGS, SEEING):
        return LEGACY / name
    folder.mkdir()
    return seeing(folder) if name == SEEING else make(name, folder)


@torch.no_grad()
def rounded(theirs: Any, quantized: Any) -> Any:
    """transformers' model with nf4's values in every weight that is quantized in the other, experts' each by itself."""
    taken = set()
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = _weight_of(theirs, name)
            weight.copy_(dequantize_4bit(*quantize_4bit(weight.clone(), quant_type="nf4", compress_statistics=True)))
            taken.add(name)
    assert taken
    return theirs


def _weight_of(theirs: Any, name: str) -> torch.Tensor:
    """The weight of a linear of ours, in place: a part of a fused tensor, of an expert."""
    fused, _, place = name.partition(".experts.")
    if not place:
        weight: torch.Tensor = theirs.get_submodule(name).weight
        return weight
    experts, (number, part) = theirs.get_submodule(f"{fused}.experts"), place.split(".")
    if part == "down_proj":
        down: torch.Tensor = experts.down_proj[int(number)]
        return down
    gate_up: torch.Tensor = experts.gate_up_proj[int(number)]
    return gate_up.chunk(2)[part == "up_proj"]
