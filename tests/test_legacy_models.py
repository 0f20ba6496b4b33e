"""ChatGLM2, ChatGLM3 and first-generation Qwen: what the authors' own code computed, from their files as they are."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import job
from job.activations import Job, kept_bytes
from job.config.learning import Model, Quantization
from job.headers import INDEX, read_headers
from job.pretrained import plain_peft_note, read_tensors
from job.store import Store
from job.tensors import Tensor
from job.weights import Share, split, stream
from tests.originals import VECTORS
from tests.test_memory import saved_bytes
from tests.test_shape import assert_counts_are_those_of_the_module, shape_of

LEGACY = Path(__file__).parent / "legacy_models"
NAMES = ("chatglm2", "chatglm3", "qwen1")
LENGTHS = ("len1", "len2", "len7", "len19", "leftpad")
Weights = dict[str, torch.Tensor]


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_greedy_answers_are_those_of_the_authors_code(name: str) -> None:
    model, tokenizer = job.load_base(str(LEGACY / name))
    expected, about = (
        load_file(LEGACY / name / "expected.safetensors"),
        json.loads((LEGACY / name / "meta.json").read_text()),
    )
    for case in LENGTHS:
        given = {key: expected[f"{case}.{key}"] for key in ("input_ids", "attention_mask", "position_ids")
                 if f"{case}.{key}" in expected}  # fmt: skip
        with torch.no_grad():
            found = model(**given).logits
        seen = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        assert (found - expected[f"{case}.logits"])[seen].abs().max() < 5e-5, case
    with torch.no_grad():
        loss = model(expected["len7.input_ids"], labels=expected["loss.labels"]).loss
    assert loss.item() == pytest.approx(expected["loss.value"].item(), abs=1e-5)
    prompt = torch.tensor([about["greedy"]["prompt"]])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert answer[0, prompt.shape[1] :].tolist() == about["greedy"]["continuation"]
    ids = VECTORS[name]["no_special_ids" if name == "qwen1" else "plain_ids"][1]
    assert tokenizer.encode(VECTORS[name]["strings"][1], add_special_tokens=False) == ids


def test_training_on_texts_beyond_seq_length_is_that_of_qwen_s_authors() -> None:
    model, _ = job.load_base(str(LEGACY / "qwen1"))
    expected = load_file(LEGACY / "qwen1/expected.safetensors")
    with torch.no_grad():
        found = model(expected["long.input_ids"]).logits
    assert (found - expected["long_train.logits"]).abs().max() < 5e-5


def glm(tied: bool, layers: int) -> tuple[dict[str, Any], Any]:
    """config.json of a ChatGLM of odd sizes, and a native model of the same with random weights."""
    written = json.loads((LEGACY / "chatglm3/config.json").read_text()) | {
        "padded_vocab_size": 77, "hidden_size": 44, "ffn_hidden_size": 37, "num_layers": layers,
        "num_attention_heads": 9, "multi_query_group_num": 3, "kv_channels": 12,
    }  # fmt: skip
    return written, transformers.GlmForCausalLM(
        transformers.GlmConfig(
            vocab_size=77, hidden_size=44, intermediate_size=37, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, head_dim=12, attention_bias=True, tie_word_embeddings=tied, pad_token_id=0,
            rms_norm_eps=1e-5,
        )
    )  # fmt: skip


def qwen(tied: bool, layers: int) -> tuple[dict[str, Any], Any]:
    """config.json of a Qwen of odd sizes, and a native model of the same with random weights."""
    written = json.loads((LEGACY / "qwen1/config.json").read_text()) | {
        "vocab_size": 77, "hidden_size": 42, "intermediate_size": 2 * 29, "num_hidden_layers": layers,
        "num_attention_heads": 3, "kv_channels": 14, "tie_word_embeddings": tied,
    }  # fmt: skip
    return written, transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=77, hidden_size=42, intermediate_size=29, num_hidden_layers=layers, num_attention_heads=3,
            num_key_value_heads=3, tie_word_embeddings=tied, rms_norm_eps=1e-6,
        )
    )  # fmt: skip


def as_chatglm(native: Weights, layers: int) -> Weights:
    """Native weights under the authors' names, with what only their code has."""
    found = {
        "transformer.embedding.word_embeddings.weight": native["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": native["model.norm.weight"],
        "transformer.output_layer.weight": native["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(3),
    }
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}", f"transformer.encoder.layers.{layer}"
        for leaf in ("weight", "bias"):
            fused = [native[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            found[f"{theirs}.self_attention.query_key_value.{leaf}"] = torch.cat(fused)
        for one, other in {
            "self_attn.o_proj": "self_attention.dense",
            "mlp.gate_up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
        }.items():
            found[f"{theirs}.{other}.weight"] = native[f"{ours}.{one}.weight"]
    return found


def as_qwen(native: Weights, layers: int) -> Weights:
    """Native weights under the authors' names, with what only their code has."""
    found = {
        "transformer.wte.weight": native["model.embed_tokens.weight"],
        "transformer.ln_f.weight": native["model.norm.weight"],
    }
    found |= {"lm_head.weight": native["lm_head.weight"]} if "lm_head.weight" in native else {}
    found["transformer.rotary_emb.inv_freq"] = torch.ones(3)
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}", f"transformer.h.{layer}"
        for leaf in ("weight", "bias"):
            found[f"{theirs}.attn.c_attn.{leaf}"] = torch.cat(
                [native[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            )
        for one, other in {
            "self_attn.o_proj": "attn.c_proj",
            "mlp.gate_proj": "mlp.w2",
            "mlp.up_proj": "mlp.w1",
            "mlp.down_proj": "mlp.c_proj",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
        }.items():
            found[f"{theirs}.{other}.weight"] = native[f"{ours}.{one}.weight"]
        found[f"{theirs}.attn.masked_bias"] = torch.ones(())
    return found


Make = Callable[[bool, int], tuple[dict[str, Any], Any]]
ODD: list[tuple[Make, Callable[[Weights, int], Weights], bool, int]] = [
    (glm, as_chatglm, False, 1),
    (glm, as_chatglm, False, 3),
    (qwen, as_qwen, False, 3),
    (qwen, as_qwen, True, 2),
]


def odd_checkpoint(folder: Path, make: Make, rename: Callable[[Weights, int], Weights], tied: bool, layers: int) -> Any:
    """Write a checkpoint of odd sizes in three files, under the authors' names; returns the native model."""
    torch.manual_seed(0)
    written, model = make(tied, layers)
    native = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    if tied:
        native["lm_head.weight"] = native["model.embed_tokens.weight"]
    model.load_state_dict(native)
    if tied:
        del native["lm_head.weight"]
    tensors = {name: tensor.clone() for name, tensor in rename(native, layers).items()}
    parts = [f"model-{part:05}-of-00003.safetensors" for part in (1, 2, 3)]
    places = {name: parts[number % 3] for number, name in enumerate(tensors)}
    for part in parts:
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == part}, folder / part)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(written))
    return model


@pytest.mark.parametrize(("make", "rename", "tied", "layers"), ODD)
def test_any_shape_is_read_whole_and_in_parts_and_every_row_once(
    tmp_path: Path, make: Make, rename: Callable[[Weights, int], Weights], tied: bool, layers: int
) -> None:
    native = odd_checkpoint(tmp_path, make, rename, tied, layers)
    expected = dict(native.named_parameters())
    loaded, _ = job.load_base(str(tmp_path))
    found = dict(loaded.named_parameters())
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    store = Store(str(tmp_path))
    tensors = read_tensors(str(tmp_path), store, Model(name=str(tmp_path)))
    assert rows_used(tensors.values()) == rows_used(
        tensor for name, tensor in read_headers(store).items() if not name.endswith(("inv_freq", "masked_bias"))
    )
    for ranks in (2, 5):
        assert_parts_join(store, tensors, expected, ranks)


def rows_used(tensors: Any) -> dict[str, list[tuple[int, int]]]:
    """Bytes of each file that tensors lie in, joined where one follows the other; refuses any that overlap."""
    joined: dict[str, list[tuple[int, int]]] = {}
    for tensor in sorted(tensors, key=lambda tensor: (tensor.file, tensor.start)):
        spans = joined.setdefault(tensor.file, [])
        start, stop = tensor.start, tensor.start + tensor.nbytes
        assert not spans or start >= spans[-1][1], f"{tensor.name} overlaps"
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, stop))
    return joined


def assert_parts_join(store: Store, tensors: dict[str, Tensor], expected: Any, ranks: int) -> None:
    """What ranks read for themselves, cut anywhere, is the whole."""
    wholes = [Share(name, tensor, 0, tensor.numel, False) for name, tensor in tensors.items() if name in expected]
    cuts = [split(share, ranks) for share in wholes]
    read: Sequence[Sequence[Any]] = [
        list(stream(store, [parts[rank] for parts in cuts], Quantization(type="none"), torch.float32, "cpu"))
        for rank in range(ranks)
    ]
    for place, share in enumerate(wholes):
        pieces = torch.cat([read[rank][place].data.flatten() for rank in range(ranks)])
        assert torch.equal(pieces, expected[share.name].flatten()), share.name


def test_pickled_checkpoints_of_the_authors_are_read_too(tmp_path: Path) -> None:
    tensors = load_file(LEGACY / "chatglm2/model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((LEGACY / "chatglm2/config.json").read_bytes())
    pickled, safe = (job.load_base(str(folder))[0] for folder in (tmp_path, LEGACY / "chatglm2"))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(pickled(ids).logits, safe(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_legacy_models_are_counted_as_their_native_modules(name: str) -> None:
    assert_counts_are_those_of_the_module(LEGACY / name)
    memory = Job(rank=8, micro_batch=2, length=128, recompute="none")
    assert kept_bytes(shape_of(LEGACY / name), memory) == pytest.approx(saved_bytes(LEGACY / name, memory), rel=0.02)


def test_the_adapter_of_a_legacy_model_says_how_its_base_is_loaded() -> None:
    folder = str(LEGACY / "qwen1")
    assert plain_peft_note(Model(name=folder)) == (
        f"plain peft cannot load the base from {folder} as the class that was trained: job.load_base gives it the base"
    )
    assert plain_peft_note(Model(name="Qwen/Qwen-7B"), folder) == (
        "plain peft cannot load the base from Qwen/Qwen-7B as the class that was trained: job.load_base gives it the "
        "base"
    )
