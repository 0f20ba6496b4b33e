"""Families that transformers knows: the base is the one that transformers loads, in full precision and quantized."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import job
from job.activations import Job, kept_bytes
from job.config import parse_config
from job.config.learning import Model
from job.errors import ConfigError, ModelError
from job.families import adapted, family_of
from job.families.native import native_config
from job.generate import Responder
from job.model import linear_names, lora_targets
from job.pretrained import plain_peft_note
from job.train import train
from job.world import World
from tests.conftest import alpaca_rows, settings, write_rows
from tests.native_models import CONFIGS, GATED, make, rounded, seeing
from tests.test_memory import saved_bytes
from tests.test_model import load, stock
from tests.test_shape import assert_counts_are_those_of_the_module, shape_of

EXPERTS = ("Mixtral", "OLMoE", "Qwen2-MoE", "Qwen3-MoE")
IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny model's name and folder."""
    return request.param, make(request.param, tmp_path_factory.mktemp("native"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
        return found


def test_logits_are_those_of_transformers_own_loading(made: tuple[str, Path]) -> None:
    _, folder = made
    model, tokenizer = job.load_base(str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is type(theirs)
    assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    assert tokenizer.encode("Hello") == transformers.AutoTokenizer.from_pretrained(folder).encode("Hello")


def test_quantized_logits_are_those_of_transformers_own_quantization(made: tuple[str, Path]) -> None:
    name, folder = made
    model, _ = job.load_base(str(folder), quantization="nf4")
    if name in EXPERTS:  # which transformers leaves in 16 bits
        linears = [module for path, module in model.named_modules() if ".experts." in path and path.endswith("_proj")]
        experts = {"Mixtral": 4, "OLMoE": 8}.get(name, 24)
        assert len(linears) == 2 * experts * 3 and all(isinstance(module, bnb.nn.Linear4bit) for module in linears)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert (logits(model) - logits(theirs)).abs().max() > 0.01
        assert (logits(model) - logits(rounded(theirs, model))).abs().max() < 1e-4
    else:
        assert torch.equal(logits(model), logits(stock(folder, "fp32", "nf4", True)))


def test_lora_s_targets_are_linears_that_the_model_has(made: tuple[str, Path]) -> None:
    name, folder = made
    family = family_of(transformers.AutoConfig.from_pretrained(folder).to_dict())
    assert family
    others = {"OPT-350m": {"project_in", "project_out"}, "Qwen2-MoE": {"shared_expert_gate"}}.get(name, set())
    assert {*family.targets, *others} == set(linear_names(job.load_base(str(folder))[0]))


def test_a_linear_called_as_those_of_the_experts_gets_no_adapter(tmp_path: Path) -> None:
    model, _ = job.load_base(str(make("Qwen2-MoE", tmp_path)))
    assert isinstance(model.model.layers[0].mlp.shared_expert.gate_proj, torch.nn.Linear)
    with pytest.raises(ConfigError, match=r"lora.targets: gate_proj: no such linear in this model. It has k_proj, o_"):
        lora_targets(model, ["gate_proj"])


def test_every_family_is_counted_as_its_module(made: tuple[str, Path]) -> None:
    name, folder = made
    if name != "OPT-350m":  # has two linears outside its layers, which are counted as kept
        assert_counts_are_those_of_the_module(folder)
    targets = adapted("all", shape_of(folder).model_type)
    memory = Job(rank=8, micro_batch=2, length=128, recompute="none", targets=targets, masked=name == "Mistral")
    assert kept_bytes(shape_of(folder), memory) == pytest.approx(saved_bytes(folder, memory), rel=0.1)


def test_gpt2_s_linears_are_the_other_way_round_in_8_bits_too(tmp_path: Path) -> None:
    folder = make("GPT-2", tmp_path)
    found = load(folder, "fp32", quantization={"type": "int8"})
    assert torch.equal(logits(found), logits(stock(folder, "fp32", "int8", True)))


def test_the_text_model_of_gemma_3_is_read_without_its_eyes(tmp_path: Path) -> None:
    theirs = transformers.Gemma3ForConditionalGeneration.from_pretrained(seeing(tmp_path), dtype=torch.float32).eval()
    model, _ = job.load_base(str(tmp_path))
    assert type(model) is transformers.Gemma3ForCausalLM
    assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    assert shape_of(tmp_path).parameters == sum(value.numel() for value in model.parameters())
    assert "as the class that was trained" in str(plain_peft_note(Model(name=str(tmp_path))))


def test_gemma_3_s_settings_that_its_files_leave_out_are_those_of_its_4b_model() -> None:
    written = {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}}
    assert native_config(written) == {
        "model_type": "gemma3_text", "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "hidden_size": 2560, "num_hidden_layers": 34,
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"^gemma3: config.json has no text_config\. Copy the checkpoint again$"):
        native_config({"model_type": "gemma3"})


def test_a_tuned_gpt2_answers(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", alpaca_rows(8))
    brief = {"generation": {"max_new_tokens": 2, "rows": 1}, "train": {"max_steps": 1}}
    config = parse_config(json.dumps(settings(make("GPT-2", tmp_path / "gpt2"), rows, tmp_path / "out", **brief)), [])
    train(config, World(), lambda line: None)
    responder = Responder(config)
    quantized, _ = job.load_base(str(tmp_path / "gpt2"), quantization="nf4")
    with responder.model.disable_adapter():
        assert (logits(responder.model) - logits(quantized)).abs().max() < 1e-4
    assert responder.compare_question("How much?").question == "How much?"


def test_a_model_of_no_family_is_read_by_what_its_modules_are(tmp_path: Path) -> None:
    config = transformers.Olmo2Config(**GATED)
    assert family_of(config.to_dict()) is None
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model, tokenizer = job.load_base(str(tmp_path))
    assert torch.equal(logits(model), logits(theirs)) and tokenizer is None
    assert lora_targets(model, "all") == sorted(family_of({"model_type": "llama"}).targets)  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "prefix"), [("GPT-2", "transformer."), ("OPT", "model."), ("Pythia", "gpt_neox.")])
def test_old_files_without_a_prefix_and_with_masks_are_read(tmp_path: Path, name: str, prefix: str) -> None:
    folder = make(name, tmp_path)
    expected = logits(job.load_base(str(folder))[0])
    tensors = load_file(folder / "model.safetensors")
    old = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if name != "OPT":
        path = "h.0.attn" if name == "GPT-2" else "layers.0.attention"
        old |= {f"{path}.bias": torch.ones(1, 1, 8, 8).bool(), f"{path}.masked_bias": torch.ones(())}
    save_file(old, folder / "model.safetensors")
    assert torch.equal(logits(job.load_base(str(folder))[0]), expected)
    assert shape_of(folder).notes == ()
