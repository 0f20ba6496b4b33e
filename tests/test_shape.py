"""What headers say about a model, against the modules that transformers and bitsandbytes make of it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import transformers

from job.config import parse_config
from job.config.learning import Model
from job.config.running import Storage
from job.errors import ModelError
from job.model import build
from job.pretrained import read_config
from job.published import published
from job.shape import Shape, read_shape
from job.tensors import Tensor
from tests.conftest import make_llama

LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA |= {"num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False}


def headers(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Tensor]:
    return {name: Tensor(name, dtype, shape, "model.safetensors", 0) for name, shape in shapes.items()}


def llama_headers(config: dict[str, Any], head: bool = True) -> dict[str, Tensor]:
    """The tensors of a Llama checkpoint of these sizes."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config.get("num_key_value_heads", config["num_attention_heads"])
    inside = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes |= {"lm_head.weight": (vocabulary, hidden)} if head else {}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in inside.items()}
    return headers(shapes)


def shape_of(folder: Path) -> Shape:
    config, tensors = published(Model(name=str(folder)), Storage())
    return read_shape(tensors, config)


def built(folder: Path, **quantization: Any) -> Any:
    values = {
        "model": {"name": str(folder)},
        "data": {"train": "rows.jsonl"},
        "quantization": quantization,
        "output": {"url": "out"},
    }
    run = parse_config(json.dumps(values), [])
    return build(read_config(str(folder), run.model), run.model, run.quantization, "bf16", "bf16")


def assert_counts_are_those_of_the_module(folder: Path) -> None:
    shape, model = shape_of(folder), built(folder)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    sizes = Counter((name.rpartition(".")[2], module.in_features, module.out_features) for name, module in linears)
    quantized = sum(module.in_features * module.out_features for _, module in linears)
    weights = {module.weight for _, module in linears}
    kept = [parameter for parameter in model.parameters() if parameter not in weights]
    assert {(linear.name, linear.inputs, linear.outputs): linear.count for linear in shape.linears} == sizes
    assert shape.quantized == quantized
    assert shape.kept == sum(parameter.numel() for parameter in kept)
    assert shape.largest_kept == max(parameter.numel() for parameter in kept)
    assert shape.parameters == sum(value.numel() for value in built(folder, type="none").parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_a_llama_is_counted_as_its_module(tied: bool, biases: bool, tmp_path: Path) -> None:
    make_llama(tmp_path, tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    assert_counts_are_those_of_the_module(tmp_path)
    assert shape_of(tmp_path).tied == tied


def test_a_real_model_is_counted_as_its_module(smollm2: Path) -> None:
    assert_counts_are_those_of_the_module(smollm2)
    shape = shape_of(smollm2)
    assert shape.parameters == 134_515_008
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.intermediate) == (30, 576, 49152, 1536)
    assert (shape.heads, shape.kv_heads, shape.head_size, shape.tied) == (9, 3, 64, True)
    assert shape.layer == 576 * (576 * 2 + 192 * 2 + 1536 * 3 + 2)


def test_the_linears_of_gpt2_are_stored_the_other_way_round(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_positions=128)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert_counts_are_those_of_the_module(tmp_path)
    by_path = {linear.path: (linear.inputs, linear.outputs) for linear in shape_of(tmp_path).linears}
    assert by_path == {
        "attn.c_attn": (64, 192),
        "attn.c_proj": (64, 64),
        "mlp.c_fc": (64, 256),
        "mlp.c_proj": (256, 64),
    }


@pytest.mark.parametrize(
    ("changed", "parameters"),
    [
        ({}, 6_738_415_616),
        (
            {
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
            },
            68_976_648_192,
        ),
    ],
    ids=["Llama-2-7B", "Llama-2-70B"],
)
def test_llama_2_has_as_many_parameters_as_published(changed: dict[str, int], parameters: int) -> None:
    config = LLAMA | changed
    shape = read_shape(llama_headers(config), config)
    assert shape.parameters == parameters
    vocabulary, norms = 2 * 32000 * shape.hidden, (2 * shape.layers + 1) * shape.hidden
    assert shape.kept == vocabulary + norms
    assert (shape.norms, shape.rms, shape.head_norms) == (2, True, 0)


def test_mixtral_s_experts_are_counted_each_and_those_of_a_token_known() -> None:
    config = LLAMA | {"model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8}
    config |= {"num_experts_per_tok": 2, "num_local_experts": 8}
    tensors = {name: tensor for name, tensor in llama_headers(config).items() if ".mlp." not in name}
    for layer in range(32):
        place = f"model.layers.{layer}.block_sparse_moe"
        experts = {f"{place}.gate.weight": (8, 4096)}
        for expert in range(8):
            sizes = {"w1": (14336, 4096), "w2": (4096, 14336), "w3": (14336, 4096)}
            experts |= {f"{place}.experts.{expert}.{name}.weight": size for name, size in sizes.items()}
        tensors |= headers(experts)
    shape = read_shape(tensors, config)
    assert shape.parameters == 46_702_792_704  # Mixtral 8x7B
    assert shape.experts_per_token == 2
    counts = {linear.path: linear.count for linear in shape.linears}
    assert counts["block_sparse_moe.experts.*.w1"] == 8 * 32
    assert "block_sparse_moe.gate" not in counts, "the router is no linear"


def test_experts_in_one_tensor_stay_in_16_bits_and_are_named() -> None:
    config = LLAMA | {"num_hidden_layers": 1}
    fused = headers({"model.layers.0.mlp.experts.gate_up_proj": (4, 64, 32)})
    shape = read_shape(llama_headers(config) | fused, config)
    assert shape.kept == 2 * 32000 * 4096 + 3 * 4096 + 4 * 64 * 32
    assert shape.notes == ("8,192 elements of the layers are no matrices and stay in 16 bits",)


def test_a_nested_text_model_and_its_second_stack_are_told_apart() -> None:
    text = LLAMA | {"num_hidden_layers": 2}
    vision = headers({"vision_tower.blocks.0.attn.qkv.weight": (96, 32)})
    shape = read_shape(llama_headers(text) | vision, {"model_type": "both", "text_config": text})
    assert (shape.hidden, shape.layers, shape.model_type) == (4096, 2, "llama")
    assert shape.notes == ("2 stacks of layers: sizes are those of the largest, model.layers",)


def test_an_output_layer_that_is_stored_though_tied_counts_once() -> None:
    config = LLAMA | {"num_hidden_layers": 1}
    apart = read_shape(llama_headers(config), config)
    tied = read_shape(llama_headers(config), config | {"tie_word_embeddings": True})
    assert apart.kept - tied.kept == 32000 * 4096


def test_more_layers_than_config_json_says_are_named() -> None:
    config = LLAMA | {"num_hidden_layers": 2}
    shape = read_shape(llama_headers(config), config | {"num_hidden_layers": 1})
    assert shape.notes == ("2 layers in the checkpoint, 1 in config.json",)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            headers({"encoder.weight": (4, 4)}),
            LLAMA,
            "llama: no numbered layers in the checkpoint, such as model.layers.0. It is not read",
        ),
        (
            llama_headers(LLAMA | {"num_hidden_layers": 2}),
            LLAMA,
            "llama: config.json says 32 layers, the checkpoint has 2. Copy the checkpoint again",
        ),
        (
            llama_headers(LLAMA | {"num_hidden_layers": 1}),
            {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 8},
            "llama: config.json has no hidden_size, num_attention_heads. Expected the config.json of a decoder model",
        ),
        (
            headers({"model.layers.0.mlp.up_proj.weight": (4, 1)}, "U8"),
            LLAMA | {"num_hidden_layers": 1},
            "llama: model.layers.0.mlp.up_proj.weight is U8, expected floats. Give the 16-bit checkpoint it was made "
            "from",
        ),
        (
            headers({"model.layers.0.mlp.up_proj.qweight": (4, 1)}, "I32"),
            LLAMA | {"num_hidden_layers": 1},
            "llama: no 2-D weights in the layers of the checkpoint. Packed checkpoints (GPTQ, AWQ) are not read: give "
            "the 16-bit checkpoint it was made from",
        ),
    ],
    ids=["no layers", "too few layers", "no sizes", "8 bits", "packed"],
)
def test_what_is_no_plain_decoder_is_refused(tensors: dict[str, Tensor], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as refusal:
        read_shape(tensors, config)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("text_config", "x", "an object"),
        ("text_config", [1], "an object"),
        ("num_attention_heads", -4, "a whole number, 1 or more"),
        ("num_attention_heads", 0, "a whole number, 1 or more"),
        ("num_attention_heads", True, "a whole number, 1 or more"),
        ("hidden_size", "4096", "a whole number, 1 or more"),
        ("vocab_size", [8], "a whole number, 1 or more"),
        ("num_key_value_heads", -1, "a whole number, 1 or more"),
        ("head_dim", -64, "a whole number, 1 or more"),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_its_name(name: str, value: Any, expected: str) -> None:
    config = LLAMA | {"num_hidden_layers": 1}
    with pytest.raises(ModelError) as refusal:
        read_shape(llama_headers(config), config | {name: value})
    said = f"llama: config.json has {name} {json.dumps(value)}, expected {expected}. Copy the checkpoint again"
    assert str(refusal.value) == said


def test_sizes_that_may_be_off_or_differ_by_layer_are_left_to_the_defaults() -> None:
    config = LLAMA | {"num_hidden_layers": 1}
    plain = {name: value for name, value in config.items() if name != "intermediate_size"}
    off = {"num_experts_per_tok": 0, "head_dim": None, "intermediate_size": [11008], "num_key_value_heads": 0}
    assert read_shape(llama_headers(config), config | off) == read_shape(llama_headers(config), plain)
