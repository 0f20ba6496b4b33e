"""Adapters that others trained: settings that leave them products of A and B pass, all others are refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from job.adapter_file import AdapterFile
from job.errors import InputError
from job.lora_kinds import KNOWN, REFUSED, refuse_other_kinds
from job.store import Store
from tests.test_merge import merged
from tests.tuned import LEGACY, base_logits, logits, tuned

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
ON: dict[str, Any] = {
    "alora_invocation_tokens": [5, 6], "arrow_config": {"top_k": 2}, "ensure_weight_tying": True,
    "kasa_config": {"beta": 0.1}, "layer_replication": [[0, 2], [1, 2]], "lora_bias": True,
    "modules_to_save": ["lm_head"], "monteclora_config": {"num_samples": 2},
    "target_parameters": ["mlp.experts.gate_up_proj"], "trainable_token_indices": [3],
    "use_bdlora": {"nblocks": 2}, "use_qalora": True, "velora_config": {"scale": 1},
}  # fmt: skip
"""Other kinds of LoRA, as peft writes them."""


def said(**settings: Any) -> str:
    """Why an adapter with these settings is refused."""
    with pytest.raises(InputError) as refused:
        refuse_other_kinds(PLAIN | settings, "there")
    return str(refused.value)


def edited(folder: Path, **settings: Any) -> Path:
    """The adapter with these settings."""
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


def test_every_setting_of_peft_s_lora_is_known_to_keep_values_or_to_change_them() -> None:
    """Fails with a new release of peft that has more: find out what it does and put it where it belongs."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} | set(peft.LoraConfig().to_dict())
    assert fields - KNOWN - set(REFUSED) == set()
    assert not KNOWN & set(REFUSED) and set(ON) == set(REFUSED)


def test_what_peft_writes_unless_told_otherwise_passes() -> None:
    written = json.loads(json.dumps(peft.LoraConfig(r=4, lora_alpha=8).to_dict()))
    refuse_other_kinds(written, "there")
    refuse_other_kinds(PLAIN, "there")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_kinds_of_lora_are_refused_by_name_and_pass_where_they_are_off(name: str) -> None:
    assert said(**{name: ON[name]}) == (
        f"there: {name} is {json.dumps(ON[name])}: {REFUSED[name]}. Only products of A and B are exported or merged"
    )
    for off in (None, False, [], {}):
        refuse_other_kinds(PLAIN | {name: off}, "there")


@pytest.mark.parametrize(
    "value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "later", 2]
)
def test_adapters_that_began_by_changing_their_base_are_refused(value: Any) -> None:
    assert said(init_lora_weights=value) == (
        f"there: init_lora_weights is {json.dumps(value)}, which changes the base's weights before training, and A and "
        "B belong to the changed ones. Save the adapter again with peft's path_initial_model_for_weight_conversion"
    )


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_adapters_that_began_otherwise_pass(value: Any) -> None:
    refuse_other_kinds(PLAIN | {"init_lora_weights": value}, "there")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("use_rslora", "false", "true or false"),
        ("use_dora", 1, "true or false"),
        ("fan_in_fan_out", "auto", "true or false"),
        ("bias", True, '"none" or "all" or "lora_only"'),
    ],
)
def test_values_that_can_be_read_in_two_ways_are_refused(name: str, value: Any, expected: str) -> None:
    assert said(**{name: value}) == (
        f"there/adapter_config.json: {name} is {json.dumps(value)}, expected {expected}. Copy the adapter again"
    )


@pytest.mark.parametrize("sizes", [{"r": 4.5}, {"r": True}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}])
def test_sizes_that_are_no_numbers_are_refused(sizes: dict[str, Any]) -> None:
    assert said(**sizes) == "there/adapter_config.json has no numbers r and lora_alpha. Copy the adapter again"


def test_settings_that_nobody_knows_are_refused_unless_they_are_off() -> None:
    assert said(twist=3) == (
        "there: twist is 3, which is not known here and may change what the adapter computes. Take it out of "
        "adapter_config.json if it does not"
    )
    refuse_other_kinds(PLAIN | {"twist": None, "turn": False}, "there")


def test_dora_without_magnitudes_is_refused_and_so_are_magnitudes_without_dora(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "a", targets=["o_proj"])
    with pytest.raises(InputError) as refused:
        AdapterFile(Store(str(edited(tmp_path / "a", use_dora=True))))
    assert str(refused.value) == (
        f"{tmp_path}/a: model.layers.0.self_attn.o_proj has no lora_magnitude_vector, adapter_config.json says "
        "use_dora true. Copy the adapter again"
    )
    tuned(LEGACY / "qwen1", tmp_path / "b", targets=["o_proj"], dora=True)
    with pytest.raises(InputError) as refused:
        AdapterFile(Store(str(edited(tmp_path / "b", use_dora=False))))
    assert str(refused.value) == (
        f"{tmp_path}/b: model.layers.0.self_attn.o_proj has a lora_magnitude_vector, adapter_config.json says use_dora "
        "false. Copy the adapter again"
    )


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_one_whose_base_changed_merges_once_peft_has_saved_it_for_the_plain_base(
    tmp_path: Path, tiny_model: Path, kind: Any
) -> None:
    """The cure that the refusal names, with plain peft."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=kind)
    config.base_model_name_or_path = str(tiny_model)
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = kind
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.add_(torch.randn_like(value), alpha=0.2)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "as-it-is")
    with pytest.raises(InputError, match=rf'/as-it-is: init_lora_weights is "{kind}", which changes the base'):
        merged(tmp_path / "as-it-is", tmp_path / "out")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merged(tmp_path / "plain", tmp_path / "out", "native", "float32")
    assert (base_logits(tmp_path / "out") - expected).abs().max() < 1e-4


def test_a_head_that_was_trained_beside_the_products_is_refused_by_its_setting(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "a", targets=["o_proj"])
    file = tmp_path / "a/adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, file)
    with pytest.raises(InputError, match=r'/a: modules_to_save is \["lm_head"\]: whole modules were trained beside'):
        merged(edited(tmp_path / "a", modules_to_save=["lm_head"]), tmp_path / "out")
