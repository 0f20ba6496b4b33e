"""GGUF files: the weights within are those that train, and configuration and tokenizer come from where they are."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from job.config.learning import Model
from job.config.running import Storage
from job.errors import ModelError
from job.pretrained import fetch, fetch_weights, plain_peft_note, read_config
from job.store import Store
from job.tokenizer import Tokenizer
from tests.conftest import make_llama
from tests.test_convert import BIN, pickled, quiet, same, trained, weights

RunFile = Callable[..., Path]


def make_gguf(model: Path, file: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
    """The tiny Llama and its tokenizer in one GGUF file, as llama.cpp's converter lays them out."""
    config = transformers.AutoConfig.from_pretrained(model)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    described = json.loads((model / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    special = {each["id"] for each in described["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if number in special else 1 for number in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in weights(model).items():
        matrix = value.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbours, transformers halves
                matrix = matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)
        exact = gguf.GGMLQuantizationType.F32 if matrix.ndim == 1 else kind
        stored = gguf.quantize(np.ascontiguousarray(matrix), exact)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=exact)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def exact_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny Llama in fp32 with its tokenizer."""
    folder = tmp_path_factory.mktemp("exact-model")
    make_llama(folder, dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_a_gguf_file_of_plain_floats_becomes_the_same_tensors(
    exact_model: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    make_gguf(exact_model, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    found = weights(quiet(Store(str(tmp_path))).url)
    assert same(found, {name: value.to(dtype) for name, value in weights(exact_model).items()})


def test_a_quantized_gguf_file_becomes_its_dequantized_weights(exact_model: Path, tmp_path: Path) -> None:
    make_gguf(exact_model, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    found = weights(quiet(Store(str(tmp_path))).url)
    for name, value in weights(exact_model).items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name].float() - value).abs().max() <= 0.02 * value.abs().max(), name


def test_a_gguf_file_beside_configuration_and_tokenizer_trains_to_the_very_same_losses(
    run_file: RunFile, exact_model: Path, tmp_path: Path
) -> None:
    folder = pickled(exact_model, tmp_path / "gguf")
    (folder / BIN).unlink()
    make_gguf(exact_model, folder / "model.gguf")
    said: list[str] = []
    found = trained(run_file("gguf", model={"name": str(folder)}), said)
    assert found == trained(run_file("plain", model={"name": str(exact_model)})) and len(found) == 3
    assert sum(f"{folder} holds GGUF weights: converted to safetensors for this run" in line for line in said) == 1
    assert said[-1] == plain_peft_note(Model(name=str(folder)))


def test_a_gguf_file_alone_brings_its_configuration_and_tokenizer(exact_model: Path, tmp_path: Path) -> None:
    make_gguf(exact_model, tmp_path / "model.gguf")
    model, storage = Model(name=str(tmp_path)), Storage(cache_dir=str(tmp_path / "cache"))
    folder, store = fetch(model, storage, lambda line: None)
    assert read_config(folder, model).to_dict()["hidden_size"] == 64
    text = "Count to three, ünd so weiter."
    expected, found = Tokenizer(str(exact_model)), Tokenizer(folder)
    assert found.text(text) == expected.text(text) and found.eos == expected.eos == 2
    assert same(weights(fetch_weights(model, store, storage).url), weights(exact_model))


def test_configuration_and_tokenizer_beside_a_gguf_file_win(exact_model: Path, tmp_path: Path) -> None:
    make_gguf(exact_model, tmp_path / "model.gguf")
    written = json.loads((exact_model / "config.json").read_text()) | {"max_position_embeddings": 77}
    (tmp_path / "config.json").write_text(json.dumps(written))
    folder, _ = fetch(Model(name=str(tmp_path)), Storage(), lambda line: None)
    assert folder != str(tmp_path)  # the tokenizer is in the file
    assert read_config(folder, Model(name=str(tmp_path))).max_position_embeddings == 77


def test_several_gguf_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.Q4.gguf", "a.Q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError) as refusal:
        fetch(Model(name=str(tmp_path)), Storage())
    assert str(refusal.value) == (
        f"{tmp_path} holds 2 GGUF files (a.Q4.gguf, a.Q8.gguf). Expected one: copy the one that is meant into a folder "
        "of its own; merge the parts of a split one first"
    )


def test_a_damaged_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=rf"{tmp_path}/a.gguf cannot be read \(.+\). Copy the file again, or give"):
        quiet(Store(str(tmp_path)))


def test_a_gguf_file_that_lacks_a_tensor_is_refused(
    exact_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {name: value for name, value in weights(exact_model).items() if "layers.1.mlp.up_proj" not in name}
    monkeypatch.setitem(globals(), "weights", lambda folder: lacking)
    make_gguf(exact_model, tmp_path / "a.gguf")
    with pytest.raises(ModelError, match=r"a.gguf lacks model.layers.1.mlp.up_proj.weight. Give the safetensors that"):
        quiet(Store(str(tmp_path)))


def test_without_the_package_gguf_the_refusal_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError) as refusal:
        quiet(Store(str(tmp_path)))
    assert str(refusal.value) == (
        f"{tmp_path}/a.gguf: GGUF files are read by the package gguf. Install it, or give safetensors"
    )
