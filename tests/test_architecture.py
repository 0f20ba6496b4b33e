"""Settings under transformers' own names that make no model are refused by name before any weight is looked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import job
from job.architecture import refuse_impossible
from job.errors import ModelError
from tests.native_models import CONFIGS, GATED

SIZE = "a whole number, 1 or more. Copy the checkpoint again"


def refusal_of(folder: Path, settings: dict[str, Any]) -> str:
    """What is said to a folder that holds these settings and no weights."""
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as refusal:
        job.load_base(str(folder))
    return str(refusal.value).removeprefix(f"model.name: {folder}: ")


@pytest.mark.parametrize(
    ("name", "setting", "value", "expected"),
    [
        ("Llama 2", "hidden_size", 0, SIZE),
        ("Llama 2", "num_hidden_layers", 0, SIZE),
        ("Llama 2", "num_hidden_layers", -1, SIZE),
        ("Llama 2", "num_key_value_heads", 0, SIZE),
        ("Llama 2", "vocab_size", 0, SIZE),
        ("GPT-2", "n_head", 0, SIZE),
        ("Llama 2", "num_key_value_heads", 3, "a divisor of num_attention_heads 4. Copy the checkpoint again"),
        ("Mixtral", "num_experts_per_tok", 5, "at most the number of experts, 4. Copy the checkpoint again"),
        ("Qwen3-MoE", "num_experts_per_tok", 25, "at most the number of experts, 24. Copy the checkpoint again"),
    ],
)
def test_a_size_that_makes_no_model_is_named(
    tmp_path: Path, name: str, setting: str, value: int, expected: str
) -> None:
    settings = CONFIGS[name].to_dict() | {setting: value}
    assert refusal_of(tmp_path, settings) == f"config.json has {setting} {value}, expected {expected}"


def test_a_word_that_transformers_does_not_know_is_named_with_its_setting(tmp_path: Path) -> None:
    llama = GATED | {"model_type": "llama"}
    activation = refusal_of(tmp_path, llama | {"hidden_act": "foo"})
    assert activation.startswith('config.json has hidden_act "foo", expected one of gelu, ') and "silu" in activation
    assert refusal_of(tmp_path, llama | {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}) == (
        'config.json has rope_parameters.rope_type "foo", expected one of default, dynamic, linear, llama3, longrope, '
        "proportional, yarn. Copy the checkpoint again"
    )


def test_an_encoder_is_refused_unless_it_is_a_decoder(tmp_path: Path) -> None:
    bert = GATED | {"model_type": "bert"}
    assert refusal_of(tmp_path, bert) == (
        "bert is an encoder (config.json has is_decoder false), whose tokens see those that they would have to learn. "
        "Use a decoder, such as Llama or Qwen"
    )
    assert "no weights" in refusal_of(tmp_path, bert | {"is_decoder": True})
    assert "no weights" in refusal_of(tmp_path, CONFIGS["Pythia"].to_dict() | {"is_decoder": False})


def test_no_settings_that_transformers_has_by_itself_are_refused() -> None:
    there = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind != "gemma4_assistant":  # whose own settings contradict each other
            refuse_impossible(transformers.CONFIG_MAPPING[kind](), kind)
            there += 1
    assert there > 150
