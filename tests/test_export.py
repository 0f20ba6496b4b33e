"""Adapters under the names of their base's authors, and back: the same products, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.adapter_file import find
from job.config import parse_config
from job.errors import InputError, OutputError
from job.export import export
from job.run_folder import RunFolder
from job.store import Store
from tests.conftest import settings
from tests.forked import run
from tests.tuned import LEGACY, base_logits, checkpoint, tuned

CASES: list[tuple[str, dict[str, Any], int, set[str]]] = [
    ("chatglm2", {"targets": ["query_key_value"]}, 12, {"query_key_value"}),
    ("chatglm3", {}, 12, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ("chatglm3", {"share_a": True}, 4, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ("chatglm3", {"rslora": True, "targets": ["v_proj", "q_proj", "o_proj"]}, 8, {"query_key_value", "dense"}),
    ("chatglm2", {"share_a": True, "targets": ["q_proj", "v_proj"]}, 4, {"query_key_value"}),
    ("qwen1", {}, 12, {"c_attn", "c_proj", "w1", "w2"}),
    ("qwen1", {"targets": ["o_proj", "up_proj"]}, 4, {"attn.c_proj", "w1"}),
]


def exported(source: Path | str, out: Path, names: Any = "original") -> list[str]:
    """Export; what was said."""
    said: list[str] = []
    export(find(str(source)), Store(str(out)), names, said.append)
    return said


def about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def added_by_hand(base: Path, adapter: Path, folder: Path) -> Path:
    """The authors' checkpoint with each product added to the tensor that its name says, by nothing but tensor math."""
    settings_, tensors = about(adapter), load_file(base / "model.safetensors")
    products = load_file(adapter / "adapter_model.safetensors")
    scale = settings_["lora_alpha"] / (settings_["r"] ** (0.5 if settings_["use_rslora"] else 1))
    for name, a in products.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = products[name.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == settings_["r"]
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"].float() + scale * b @ a
    checkpoint(base, folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "lora", "rank", "targets"), CASES)
def test_on_the_authors_own_weights_it_computes_what_was_trained_and_comes_back_bit_for_bit(
    tmp_path: Path, name: str, lora: dict[str, Any], rank: int, targets: set[str]
) -> None:
    expected = tuned(LEGACY / name, tmp_path / "native", **lora)
    said = exported(tmp_path / "native", tmp_path / "original")
    assert (about(tmp_path / "original")["r"], set(about(tmp_path / "original")["target_modules"])) == (rank, targets)
    assert any(f"rank {rank} under these names" in line for line in said) == (rank > 4)
    found = base_logits(added_by_hand(LEGACY / name, tmp_path / "original", tmp_path / "added"))
    assert (found - expected).abs().max() < 2e-5 < (base_logits(LEGACY / name) - expected).abs().max()
    exported(tmp_path / "original", tmp_path / "back", "native")
    first, again = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("native", "back"))
    assert set(first) == set(again) and all(torch.equal(first[key], again[key]) for key in first)
    assert about(tmp_path / "back") == about(tmp_path / "native")


def test_one_that_was_trained_under_the_authors_names_becomes_parts_that_share_their_a(tmp_path: Path) -> None:
    tuned(LEGACY / "chatglm3", tmp_path / "native", share_a=True, targets=["query_key_value"])
    exported(tmp_path / "native", tmp_path / "original")
    content = load_file(tmp_path / "original/adapter_model.safetensors")
    dense = {key: torch.randn_like(value) * 0.1 for key, value in content.items()}
    save_file(dense, tmp_path / "original/adapter_model.safetensors")  # as peft does: nothing is said of another past
    exported(tmp_path / "original", tmp_path / "back", "native")
    assert about(tmp_path / "back")["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    exported(tmp_path / "back", tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert set(again) == set(dense) and all(torch.equal(again[key], dense[key]) for key in dense)


def test_a_run_or_its_run_file_means_its_adapter_and_its_tokenizer_comes_along(tmp_path: Path) -> None:
    values = settings(LEGACY / "qwen1", tmp_path / "rows.jsonl", tmp_path / "run")
    RunFolder(parse_config(json.dumps(values))).begin()
    tuned(LEGACY / "qwen1", tmp_path / "run/adapter")
    (tmp_path / "run/adapter/tokenizer.json").write_text("{}")
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    for number, source in enumerate((tmp_path / "run", tmp_path / "run.yaml", tmp_path / "run/adapter")):
        done = run("export", source, tmp_path / f"out{number}")
        assert done.code == 0 and done.err.endswith(f"adapter: {tmp_path}/out{number}\n")
        there = sorted(file.name for file in (tmp_path / f"out{number}").iterdir())
        assert there == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
        assert about(tmp_path / f"out{number}") == about(tmp_path / "out0")


def test_a_base_whose_authors_have_transformers_names_leaves_the_adapter_as_it_is(
    tmp_path: Path, tiny_model: Path
) -> None:
    tuned(tiny_model, tmp_path / "native")
    assert exported(tmp_path / "native", tmp_path / "out") == [
        "the adapter has these names already: it is copied",
        f"adapter: {tmp_path}/out",
    ]
    for file in (tmp_path / "native").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_what_has_no_place_under_other_names_is_refused(tmp_path: Path) -> None:
    tuned(LEGACY / "chatglm3", tmp_path / "a", dora=True, targets=["o_proj"])
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "a", tmp_path / "out")
    assert str(refused.value) == (
        f"{tmp_path}/a: model.layers.0.self_attn.o_proj has lora_magnitude_vector, which has no place under other "
        "names. Use `qlora merge`, or train without lora.bias and lora.dora"
    )
    shutil.rmtree(tmp_path / "a")
    tuned(LEGACY / "chatglm3", tmp_path / "a")
    config = about(tmp_path / "a") | {"base_model_name_or_path": str(LEGACY / "qwen1")}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "a", tmp_path / "out")
    assert str(refused.value) == (
        "the adapter has model.layers.0.mlp.gate_up_proj, which Qwen (first generation) has not. Give its own base"
    )
    shutil.rmtree(tmp_path / "a")
    tuned(LEGACY / "chatglm3", tmp_path / "a", targets=["k_proj"])
    config = about(tmp_path / "a") | {"base_model_name_or_path": str(LEGACY / "chatglm2")}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "a", tmp_path / "out")
    assert str(refused.value) == (
        "the adapter's model.layers.0.self_attn.k_proj has 16 outputs, the base's 32. Give its own base"
    )
    assert not (tmp_path / "out").exists()
    done = run("export", tmp_path / "a", "memory://out")
    assert done.code == 2 and done.err == "OutputError: memory://out goes with this process. Use a folder or a bucket\n"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "/adapter_model.safetensors is empty: nothing was saved. Train again, or give another adapter"),
        (
            {"o_proj.lora_A.weight": torch.zeros(0), "o_proj.lora_B.weight": torch.zeros(0)},
            ": o_proj has no A and B that are matrices. Copy the adapter again",
        ),
        (
            {"lm_head.weight": torch.ones(2, 2)},
            ": base_model.model.lm_head.weight is no part of a LoRA of linears. Only such adapters are exported or "
            "merged",
        ),
    ],
)
def test_adapters_that_hold_nothing_or_something_else_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], said: str
) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "a", targets=["o_proj"])
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(named, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "a", tmp_path / "out")
    assert str(refused.value) == f"{tmp_path}/a{said}"


def test_an_adapter_that_is_pickled_or_missing_is_refused(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "a", targets=["o_proj"])
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "a/adapter_model.bin")
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "a", tmp_path / "out")
    assert str(refused.value) == (
        f"{tmp_path}/a holds adapter_model.bin, which is pickled. Load it with plain peft and save it again as "
        "safetensors"
    )
    (tmp_path / "a/adapter_model.bin").unlink()
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "a", tmp_path / "out")
    assert str(refused.value) == f"{tmp_path}/a: no adapter there. Run `qlora train` first"


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "a")
    exported(tmp_path / "a", tmp_path / "original")
    file = tmp_path / "original/adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"native": "{}"})
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "original", tmp_path / "back", "native")
    assert str(refused.value) == "the header of the adapter's file is damaged (KeyError('settings')). Copy it again"


def test_folders_that_hold_something_are_left_alone(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "a")
    with pytest.raises(OutputError) as refused:
        exported(tmp_path / "a", tmp_path / "a")
    assert str(refused.value) == (
        f"{tmp_path}/a holds files already (adapter_config.json). Use an empty or a new folder"
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "IA3"}, " holds an adapter of the kind IA3, expected LORA. Only such are exported or merged"),
        (
            {"alpha_pattern": {"q_proj": 3}},
            ": alpha_pattern gives modules scales of their own. Expected one for all: r and lora_alpha",
        ),
        (
            {"base_model_name_or_path": None},
            "/adapter_config.json names no base. Give it as model.name=... behind the output",
        ),
        ({"r": "x"}, "/adapter_config.json has no numbers r and lora_alpha. Copy the adapter again"),
        (
            {"r": 8},
            ": model.layers.0.self_attn.o_proj has A [4, 64] and B [64, 4], adapter_config.json says r 8. Copy the "
            "adapter again",
        ),
        (None, ": no run file, no run and no adapter. Give one of them"),
    ],
)
def test_adapters_that_are_none_of_ours_are_refused(tmp_path: Path, changed: dict[str, Any] | None, said: str) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "a", targets=["o_proj"])
    config = tmp_path / "a/adapter_config.json"
    if changed is None:
        config.unlink()
    else:
        config.write_text(json.dumps(about(tmp_path / "a") | changed))
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "a", tmp_path / "out")
    assert str(refused.value) == f"{tmp_path}/a{said}"


def test_a_run_file_of_another_model_than_the_adapter_s_is_refused(tmp_path: Path) -> None:
    values = settings(LEGACY / "qwen1", tmp_path / "rows.jsonl", tmp_path / "run")
    RunFolder(parse_config(json.dumps(values))).begin()
    values["model"]["name"] = "elsewhere"
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    with pytest.raises(InputError) as refused:
        exported(tmp_path / "run.yaml", tmp_path / "out")
    assert str(refused.value) == (
        f'{tmp_path}/run: the adapter was trained on another model\n  model.name: "{LEGACY}/qwen1" there, '
        '"elsewhere" here\n  Set these back'
    )
