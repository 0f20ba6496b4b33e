"""Exported settings select the modules that have tensors and no others, as plain peft reads them on the base."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import job
from job.families import adapted
from job.model import lora_targets
from tests.test_export import about, exported
from tests.tuned import LEGACY, tuned

LAYERS = {"chatglm2": "transformer.encoder.layers", "chatglm3": "transformer.encoder.layers", "qwen1": "transformer.h"}


def tree(names: Iterable[str]) -> nn.Module:
    """A module with linears of these names."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, nn.Linear(4, 4))
    return root


def linears(base: Path) -> list[str]:
    """The names of the authors' linears."""
    with safe_open(base / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118
    return [name.removesuffix(".weight") for name in names]


def with_tensors(adapter: Path) -> set[str]:
    """The modules that have an A."""
    names = [name for name in load_file(adapter / "adapter_model.safetensors") if "lora_A" in name]
    return {name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in names}


def selected(adapter: Path, names: Iterable[str]) -> set[str]:
    """The modules of these names that peft gives an adapter by its settings."""
    model = peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(str(adapter)), tree(names))
    return {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def without(adapter: Path, part: str, **settings: Any) -> None:
    """Take the modules out of the adapter in whose names this is, as if they were never trained."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    save_file({name: value for name, value in load_file(file).items() if part not in name}, file)
    config.write_text(json.dumps(about(adapter) | settings))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layers", [[1], 1, 0])
def test_an_adapter_of_some_layers_stays_one_of_these_layers(tmp_path: Path, name: str, layers: Any) -> None:
    tuned(LEGACY / name, tmp_path / "native", targets=["q_proj", "o_proj"])
    kept = layers if isinstance(layers, int) else layers[0]
    without(tmp_path / "native", f".layers.{1 - kept}.", layers_to_transform=layers, layers_pattern="layers")
    exported(tmp_path / "native", tmp_path / "original")
    found = selected(tmp_path / "original", linears(LEGACY / name))
    assert found == with_tensors(tmp_path / "original")
    assert found and all(module.startswith(f"{LAYERS[name]}.{kept}.") for module in found)
    assert about(tmp_path / "original")["layers_to_transform"] == layers
    exported(tmp_path / "original", tmp_path / "back", "native")
    assert about(tmp_path / "back") == about(tmp_path / "native")


@pytest.mark.parametrize("name", LAYERS)
def test_one_that_differs_from_layer_to_layer_names_its_modules_whole(tmp_path: Path, name: str) -> None:
    tuned(LEGACY / name, tmp_path / "native", targets=["q_proj", "o_proj"])
    without(tmp_path / "native", ".layers.1.self_attn.q_proj", exclude_modules=["layers.1.self_attn.q_proj"])
    exported(tmp_path / "native", tmp_path / "original")
    assert len(with_tensors(tmp_path / "original")) == 3
    assert selected(tmp_path / "original", linears(LEGACY / name)) == with_tensors(tmp_path / "original")


@pytest.mark.parametrize("name", LAYERS)
def test_one_that_was_trained_on_some_layers_under_the_authors_names_comes_under_ours(
    tmp_path: Path, name: str
) -> None:
    tuned(LEGACY / name, tmp_path / "native", share_a=True, targets=["q_proj", "k_proj", "v_proj"])
    exported(tmp_path / "native", tmp_path / "original")
    place = LAYERS[name].rpartition(".")[2]
    without(tmp_path / "original", f"{LAYERS[name]}.0.", layers_to_transform=[1], layers_pattern=place)
    exported(tmp_path / "original", tmp_path / "back", "native")
    names = [
        name for name, module in job.load_base(str(LEGACY / name))[0].named_modules() if not any(module.children())
    ]
    assert selected(tmp_path / "back", [name for name in names if name.endswith("proj")]) == {
        f"model.layers.1.self_attn.{part}_proj" for part in "qkv"
    }


@pytest.mark.parametrize("name", LAYERS)
def test_the_targets_of_an_exported_adapter_can_be_trained_again(tmp_path: Path, name: str) -> None:
    base, _ = job.load_base(str(LEGACY / name))
    tuned(LEGACY / name, tmp_path / "native", targets=["o_proj"])
    exported(tmp_path / "native", tmp_path / "original")
    assert lora_targets(base, about(tmp_path / "original")["target_modules"]) == ["o_proj"]


def test_names_with_the_one_before_them_tell_linears_of_one_last_name_apart() -> None:
    assert adapted(["attn.c_proj"], "qwen2") == ("o_proj",)
    assert adapted(["mlp.c_proj"], "qwen2") == ("down_proj",)
    assert adapted(["c_proj"], "qwen2") == ("o_proj", "down_proj")
    assert adapted(["self_attention.query_key_value"], "glm") == ("q_proj", "k_proj", "v_proj")
    assert adapted(["tn.c_proj"], "qwen2") == ("tn.c_proj",)


def test_the_names_of_a_whole_adapter_are_short(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "native")
    exported(tmp_path / "native", tmp_path / "original")
    assert about(tmp_path / "original")["target_modules"] == ["c_attn", "c_proj", "w1", "w2"]
    assert "layers_to_transform" not in about(tmp_path / "original")
