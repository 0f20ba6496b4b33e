"""What becomes quantized: as much as the plan counts, whatever a model calls its linears; else the model is refused."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from torch import nn

import job
from job.config.learning import Model, Quantization
from job.errors import ModelError
from job.model import build
from job.quantize import quantize
from tests.conftest import make_tokenizer
from tests.native_models import GATED, SMALL, rounded
from tests.test_shape import assert_counts_are_those_of_the_module

IDS = torch.arange(3, 43)[None]
NF4 = Quantization(type="nf4")


def test_linears_of_falcon_s_own_class_are_quantized_as_the_plan_counts_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.FalconConfig(**SMALL | {"bias": True})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    assert_counts_are_those_of_the_module(tmp_path)
    model, _ = job.load_base(str(tmp_path), quantization="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(IDS).logits - rounded(theirs, model)(IDS).logits).abs().max() < 1e-4
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == 2 * 4


def test_a_linear_that_multiplies_otherwise_is_not_made_a_plain_one() -> None:
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=64)
    with pytest.raises(ModelError) as refused:
        build(config, Model(name="owner/xlnet"), NF4, "fp32", "fp32")
    assert str(refused.value) == (
        "model.name: owner/xlnet: 56% of the weights in the layers would stay in 16 bits, such as "
        "transformer.layer.0.rel_attn.q of a XLNetRelativeAttention, which cannot be made a quantized linear. Use "
        "another model, or quantization.type: none"
    )
    assert build(config, Model(name="owner/xlnet"), Quantization(type="none"), "fp32", "fp32") is not None


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_experts_that_the_files_hold_otherwise_are_refused_alike_with_and_without_quantization(
    tmp_path: Path, kind: str
) -> None:
    transformers.PhimoeConfig(**GATED).save_pretrained(tmp_path)  # and no weights
    with pytest.raises(ModelError) as refused:
        job.load_base(str(tmp_path), quantization=kind)
    assert str(refused.value) == (
        f"model.name: {tmp_path}: transformers makes the fused experts of phimoe of other tensors in its files, which "
        "is done here for Mixtral, OLMoE, Qwen1.5-MoE, Qwen2-MoE, Qwen3-MoE alone. Use one of these, or a dense model"
    )


def test_a_subclass_of_linear_that_only_has_another_name_is_quantized() -> None:
    class Renamed(nn.Linear):
        """Nothing of its own."""

    class Halved(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / 2

    found = []
    for kind in (Renamed, Halved):
        model = build(transformers.LlamaConfig(**SMALL), Model(name="m"), Quantization(type="none"), "fp32", "fp32")
        model.model.layers[0].self_attn.q_proj.__class__ = kind
        quantize(model, "m", NF4, torch.float32)
        found.append(type(model.model.layers[0].self_attn.q_proj).__name__)
    assert found == ["FrozenLinear4bit", "Halved"]
