"""Families as data: what is refused, under which names settings are found, and that every row has one place."""

import json
from pathlib import Path
from typing import Any

import pytest

import job
from job.errors import ModelError
from job.families import FAMILIES, adapted
from job.families.family import Family
from job.families.native import native_config, native_tensors
from job.shape import read_shape
from job.tensors import Tensor
from tests.test_shape import headers

LEGACY = Path(__file__).parent / "legacy_models"
GLM_CURE = "Give a checkpoint with the settings of the published ChatGLM2 or ChatGLM3"
QWEN_CURE = "Give a checkpoint with the settings of the published Qwen-1.8B, 7B, 14B or 72B"


def written(name: str, **changed: Any) -> dict[str, Any]:
    """A legacy model's config.json with some settings changed; ... takes one out."""
    settings = json.loads((LEGACY / name / "config.json").read_text()) | changed
    return {key: value for key, value in settings.items() if value is not ...}


GLM = [
    ("quantization_bit", 4, "expected null or 0: its weights are packed"),
    ("pre_seq_len", 128, "expected null: Glm has no place for a trained prefix before the keys of every layer"),
    ("add_bias_linear", True, "expected false: Glm's linears other than query, key and value have no bias"),
    ("rmsnorm", False, "expected true: Glm has RMS norms alone"),
    ("post_layer_norm", False, "expected true: Glm always ends with a norm"),
    ("apply_residual_connection_post_layernorm", True, "expected false: Glm takes residuals before its norms"),
    ("original_rope", False, "expected true: other rotary positions were never published"),
    ("multi_query_attention", False, "expected true: query, key and value then lie in another order"),
    ("fp32_residual_connection", True, "expected false: Glm has residuals in the type of its weights"),
    ("position_encoding_2d", True, "expected false: this is ChatGLM-6B of March 2023, another architecture"),
    ("inner_hidden_size", 8, "expected null: this is ChatGLM-6B of March 2023, another architecture"),
    ("vision_config", {}, "expected null: Glm sees no images"),
    ("kv_channels", "8", "expected a whole number, 1 or more"),
    ("add_qkv_bias", 1, "expected true or false"),
    ("layernorm_epsilon", 0, "expected a number above 0"),
    ("pad_token_id", -1, "expected a token id"),
]
QWEN = [
    ("visual", {}, "expected null: Qwen2 sees no images"),
    ("audio", {}, "expected null: Qwen2 hears no sound"),
    ("no_bias", False, "expected true: Qwen2's linears other than query, key and value have no bias"),
    ("rotary_pct", 0.5, "expected 1: Qwen2's rotary positions turn whole heads"),
    ("pos_emb", "learned", 'expected "rotary": Qwen2 has rotary positions alone'),
    ("scale_attn_weights", False, "expected true: Qwen2 always scales its attention"),
    ("apply_residual_connection_post_layernorm", True, "expected false: Qwen2 takes residuals before its norms"),
    ("use_cache_quantization", True, "expected false: Qwen2 keeps keys and values as they are"),
    ("num_hidden_layers", 0, "expected a whole number, 1 or more"),
]
AGAIN = "Copy the checkpoint again"
CURES = {"quantization_bit": "Give the 16-bit checkpoint it was made from", "vision_config": "Give the language model"}
CURES |= dict.fromkeys(["position_encoding_2d", "inner_hidden_size"], "Use ChatGLM2 or ChatGLM3")
CURES |= dict.fromkeys(["visual", "audio"], "Give Qwen's language model")
CURES |= dict.fromkeys(["kv_channels", "add_qkv_bias", "layernorm_epsilon", "pad_token_id", "num_hidden_layers"], AGAIN)


def refusal_of(folder: Path, config: dict[str, Any]) -> str:
    """What is said to a folder that holds this config.json and no weights."""
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as refusal:
        job.load_base(str(folder))
    return str(refusal.value)


@pytest.mark.parametrize(
    ("name", "setting", "value", "said"),
    [*(("chatglm2", *case) for case in GLM), *(("qwen1", *case) for case in QWEN)],
)
def test_a_setting_that_the_native_class_cannot_represent_is_refused_before_any_weight_is_looked_for(
    tmp_path: Path, name: str, setting: str, value: Any, said: str
) -> None:
    cure = CURES.get(setting, QWEN_CURE if name == "qwen1" else GLM_CURE)
    config = written(name, **{setting: value})
    expected = f"{config['model_type']}: config.json has {setting} {json.dumps(value)}, {said}. {cure}"
    assert refusal_of(tmp_path, config) == expected


RATIO = (
    "rope_ratio 50, expected 1: ChatGLM2-32k divides positions by it, which was not compared with the authors' code, "
    'and nothing says that this is a later one. Use ChatGLM3-6B-32k; if it is that, write "_name_or_path": '
    '"THUDM/chatglm3-6b-32k" into its config.json'
)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (written("chatglm3", multi_query_group_num=3), "num_attention_heads 8, expected a multiple of "
         f"multi_query_group_num 3. {GLM_CURE}"),
        (written("qwen1", num_attention_heads=5), "hidden_size 64, expected a multiple of num_attention_heads 5. "
         f"{QWEN_CURE}"),
        (written("qwen1", kv_channels=20), "hidden_size 64, expected num_attention_heads 4 x kv_channels 20. "
         f"{QWEN_CURE}"),
        (written("chatglm2", rope_ratio=50), RATIO),
        (written("chatglm3", rope_ratio=50, _name_or_path="/models/base"), RATIO),
        (written("chatglm2", multi_query_attention=...), "multi_query_attention false, expected true: query, key and "
         f"value then lie in another order. {GLM_CURE}"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    assert refusal_of(tmp_path, config) == f"{config['model_type']}: config.json has {said}"


def test_a_size_that_is_missing_is_named() -> None:
    with pytest.raises(ModelError) as refusal:
        native_config(written("chatglm2", padded_vocab_size=...))
    assert str(refusal.value) == "chatglm: config.json has no padded_vocab_size. Copy the checkpoint again"


def test_packed_weights_are_refused_by_the_name_of_the_setting(tmp_path: Path) -> None:
    assert refusal_of(tmp_path, written("qwen1", quantization_config={"quant_method": "gptq"})) == (
        f"model.name: {tmp_path} has a quantization_config, so it is quantized already. Give the 16-bit checkpoint it "
        "was made from"
    )


def test_rope_ratio_multiplies_the_base_of_chatglm3_32k() -> None:
    assert native_config(written("chatglm3"))["rope_parameters"]["rope_theta"] == 10_000
    named = {"_name_or_path": "THUDM/chatglm3-6b-32k"}
    assert native_config(written("chatglm3", rope_ratio=50, **named))["rope_parameters"]["rope_theta"] == 500_000
    named = {"_name_or_path": "/base", "auto_map": {"AutoConfig": "THUDM/glm-4-9b--configuration_chatglm.GLM"}}
    assert native_config(written("chatglm3", rope_ratio=500, **named))["rope_parameters"]["rope_theta"] == 5_000_000


def test_the_settings_of_early_qwen_checkpoints_are_found_under_their_names() -> None:
    early = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    early |= {"ffn_hidden_size": "intermediate_size", "padded_vocab_size": "vocab_size"}
    now = written("qwen1")
    then = {key: value for key, value in now.items() if key not in early.values()}
    then |= {old: now[new] for old, new in early.items()}
    assert native_config(then) == native_config(now)


def test_qwen_is_trained_on_all_its_positions_and_answers_where_its_attention_is_plain() -> None:
    native = native_config(written("qwen1"))
    assert (native["max_position_embeddings"], native["seq_length"]) == (256, 24)
    early = native_config(written("qwen1", max_position_embeddings=..., n_positions=...))
    assert early["max_position_embeddings"] == 24


def chatglm_headers(layers: int, hidden: int, inner: int, vocabulary: int, queries: int) -> dict[str, Tensor]:
    """Tensors of a published ChatGLM, whose query, key and value have `queries` rows."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (vocabulary, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocabulary, hidden),
        "transformer.rotary_pos_emb.inv_freq": (32,),
    }
    for layer in range(layers):
        place = f"transformer.encoder.layers.{layer}"
        shapes |= {
            f"{place}.input_layernorm.weight": (hidden,),
            f"{place}.post_attention_layernorm.weight": (hidden,),
            f"{place}.self_attention.query_key_value.weight": (queries, hidden),
            f"{place}.self_attention.query_key_value.bias": (queries,),
            f"{place}.self_attention.dense.weight": (hidden, hidden),
            f"{place}.mlp.dense_h_to_4h.weight": (2 * inner, hidden),
            f"{place}.mlp.dense_4h_to_h.weight": (hidden, inner),
        }
    return headers(shapes, "F16")


def qwen_headers(layers: int, hidden: int, inner: int, vocabulary: int) -> dict[str, Tensor]:
    """Tensors of a published Qwen."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        place = f"transformer.h.{layer}"
        shapes |= {
            f"{place}.ln_1.weight": (hidden,),
            f"{place}.ln_2.weight": (hidden,),
            f"{place}.attn.c_attn.weight": (3 * hidden, hidden),
            f"{place}.attn.c_attn.bias": (3 * hidden,),
            f"{place}.attn.c_proj.weight": (hidden, hidden),
            f"{place}.mlp.w1.weight": (inner // 2, hidden),
            f"{place}.mlp.w2.weight": (inner // 2, hidden),
            f"{place}.mlp.c_proj.weight": (hidden, inner // 2),
        }
    return headers(shapes)


def test_chatglm_6b_has_as_many_parameters_as_published() -> None:
    sizes = {"num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696, "padded_vocab_size": 65024}
    config = written("chatglm3", **sizes, num_attention_heads=32, kv_channels=128)
    tensors = native_tensors(chatglm_headers(*sizes.values(), queries=4608), config)
    shape = read_shape(tensors, native_config(config))
    assert shape.parameters == 6_243_584_000
    assert (shape.heads, shape.kv_heads, shape.head_size) == (32, 2, 128)


@pytest.mark.parametrize(
    ("layers", "hidden", "inner", "vocabulary", "heads", "parameters"),
    [
        (24, 2048, 11008, 151936, 16, 1_836_828_672),
        (32, 4096, 22016, 151936, 32, 7_721_324_544),
        (40, 5120, 27392, 152064, 40, 14_167_290_880),
        (80, 8192, 49152, 152064, 64, 72_287_920_128),
    ],
    ids=["1.8B", "7B", "14B", "72B"],
)
def test_qwen_has_as_many_parameters_as_published(
    layers: int, hidden: int, inner: int, vocabulary: int, heads: int, parameters: int
) -> None:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary}
    config = written("qwen1", **sizes, num_attention_heads=heads, kv_channels=128)
    tensors = native_tensors(qwen_headers(layers, hidden, inner, vocabulary), config)
    assert read_shape(tensors, native_config(config)).parameters == parameters


def test_settings_and_tensors_that_have_transformers_own_names_are_left_alone() -> None:
    config = {"model_type": "llama", "rmsnorm": False}
    tensors = {"a.b": Tensor("a.b", "F16", (2, 2), "model.safetensors", 0)}
    assert native_config(config) == config and native_tensors(tensors, config) == tensors


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_native_module_comes_from_two_places(family: Family) -> None:
    places = {source: [place] if isinstance(place, str) else [rows.module for rows in place]
              for source, place in family.weights.items()}  # fmt: skip
    modules = [module for each in places.values() for module in each]
    assert len(modules) == len(set(modules))
    assert all(source.count("*") == module.count("*") for source, each in places.items() for module in each)


@pytest.mark.parametrize(
    ("model_type", "targets", "native"),
    [
        ("glm", ["query_key_value"], ("q_proj", "k_proj", "v_proj")),
        ("glm", ["dense", "dense_h_to_4h", "dense_4h_to_h"], ("o_proj", "gate_up_proj", "down_proj")),
        ("glm", ["k_proj", "query_key_value"], ("k_proj", "q_proj", "v_proj")),
        ("qwen2", ["c_attn", "w1", "w2"], ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")),
        ("qwen2", ["c_proj"], ("o_proj", "down_proj")),
        ("gpt2", ["c_attn"], ("c_attn",)),
        ("unknown", ["query_key_value"], ("query_key_value",)),
        ("opt", "all", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
        ("unknown", "all", None),
    ],
)
def test_lora_s_targets_may_have_the_names_of_the_authors(
    model_type: str, targets: str | list[str], native: tuple[str, ...] | None
) -> None:
    assert adapted(targets, model_type) == native


def test_every_model_type_is_in_one_family_alone() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("transformer.h.0.attn.c_attn.weight", (191, 64), "has 191 rows, config.json says 64 + 64 + 64"),
        ("transformer.h.0.attn.c_attn.bias", (), "has 0 rows, config.json says 64 + 64 + 64"),
        ("transformer.h.0.attn.rotary.weight", (4,), "is in the checkpoint but not in the model"),
        ("lm_head", (4,), "is in the checkpoint but not in the model"),
    ],
)
def test_tensors_without_a_place_or_with_other_rows_are_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ModelError) as refusal:
        native_tensors({name: Tensor(name, "BF16", shape, "model.safetensors", 0)}, written("qwen1"))
    assert str(refusal.value) == f"qwen: {name} {said}. Copy the checkpoint again"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"quantization": "int4"}, "load_base: quantization is int4, expected none, nf4"),
        ({"dtype": "float8"}, "load_base: dtype is float8, expected float32, bfloat16, float16"),
    ],
)
def test_other_ways_to_load_are_refused_with_those_that_there_are(arguments: dict[str, str], said: str) -> None:
    with pytest.raises(job.errors.InputError) as refusal:
        job.load_base(str(LEGACY / "qwen1"), **arguments)
    assert str(refusal.value) == said
