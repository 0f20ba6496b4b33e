"""The model: equal to transformers' own quantized loading, frozen parts as they are, clear refusals."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers

from job.config import RunConfig
from job.errors import ConfigError, ModelError
from job.headers import read_headers
from job.matching import shares
from job.model import add_adapter, build, lora_targets, place, refuse_leaking_packs
from job.pretrained import fetch, read_config
from job.weights import stream
from tests.conftest import make_llama, settings

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load(folder: Path, precision: str = "bf16", **sections: Any) -> Any:
    """The streamed, quantized base, in evaluation mode."""
    run = RunConfig.model_validate(settings(folder, "rows.jsonl", "out", **sections))
    files, store = fetch(run.model, run.storage)
    model = build(read_config(files, run.model), run.model, run.quantization, precision, precision)
    wanted = shares(model, read_headers(store), run.model.name)
    place(model, stream(store, wanted, run.quantization, DTYPES[precision], "cpu"), "cpu")
    return model.eval()


def stock(folder: Path, precision: str, kind: str, double: bool) -> Any:
    """The same model through transformers and bitsandbytes alone."""
    config = None
    if kind == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif kind != "none":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=DTYPES[precision],
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], quantization_config=config
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("none", True)]
)
def test_logits_equal_those_of_transformers_own_loading(
    tiny_model: Path, precision: str, kind: str, double: bool
) -> None:
    ours = load(tiny_model, precision, quantization={"type": kind, "double_quant": double})
    theirs = stock(tiny_model, precision, kind, double)
    ids = torch.arange(40)[None] % 500
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_every_parameter_and_buffer_equals_transformers_own(tiny_model: Path) -> None:
    ours, theirs = load(tiny_model), stock(tiny_model, "bf16", "nf4", True)
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    found = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_tied_embeddings_are_one_tensor_and_are_read_once(tmp_path: Path) -> None:
    make_llama(tmp_path, tie_word_embeddings=True)
    model = load(tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(
            model(torch.arange(9)[None]).logits, stock(tmp_path, "bf16", "nf4", True)(torch.arange(9)[None]).logits
        )


def test_checkpoints_in_several_files_are_read(tmp_path: Path, tiny_model: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids).logits, load(tiny_model)(ids).logits)


def test_all_linears_but_the_head_get_an_adapter_and_nothing_else_trains(tiny_model: Path) -> None:
    run = RunConfig.model_validate(settings(tiny_model, "rows.jsonl", "out"))
    model, _ = add_adapter(load(tiny_model), run.lora, 1, "base", torch.bfloat16)
    assert set(model.peft_config["default"].target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16, torch.uint8}


def test_initial_adapters_depend_on_seed_and_name_alone(tiny_model: Path) -> None:
    def first(seed: int, targets: list[str]) -> torch.Tensor:
        run = RunConfig.model_validate(settings(tiny_model, "r", "o", lora={"targets": targets}))
        torch.manual_seed(len(targets))
        model, _ = add_adapter(load(tiny_model), run.lora, seed, "base", torch.float32)
        return next(value.detach() for name, value in model.named_parameters() if "q_proj.lora_A" in name)

    assert torch.equal(first(1, ["q_proj"]), first(1, ["k_proj", "q_proj"]))
    assert not torch.equal(first(1, ["q_proj"]), first(2, ["q_proj"]))


def test_targets_that_do_not_exist_are_refused_with_those_that_do(tiny_model: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        lora_targets(load(tiny_model), ["q_proj", "query_key_value"])
    assert str(refused.value).endswith(
        "lora.targets: query_key_value: no such linear in this model. "
        "It has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def broken(folder: Path, tiny_model: Path, **config: Any) -> Path:
    """A copy of the tiny model with another config."""
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_hidden_layers": 3},
            "model.layers.2.self_attn.q_proj.weight is missing, expected [64, 64] of 16- or 32-bit floats",
        ),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is in the checkpoint but not in the model"),
        ({"intermediate_size": 96}, "gate_proj.weight has shape [160, 64] of BF16, expected [96, 64] of"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    tmp_path: Path, tiny_model: Path, config: dict[str, int], message: str
) -> None:
    with pytest.raises(ModelError) as refused:
        load(broken(tmp_path, tiny_model, **config))
    assert message in str(refused.value)


def test_a_checkpoint_that_is_quantized_already_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = broken(tmp_path, tiny_model, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is quantized already. Give the 16-bit checkpoint it was made from"):
        load(folder)


def test_remote_code_is_refused_unless_asked_for(tmp_path: Path, tiny_model: Path) -> None:
    folder = broken(tmp_path, tiny_model, model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(
        ModelError,
        match=r"has the architecture own, which transformers does not know, .* Set model.trust_remote_code: true",
    ):
        load(folder)


def test_dropout_of_the_frozen_base_is_off(tmp_path: Path, tiny_model: Path) -> None:
    model = load(broken(tmp_path, tiny_model, attention_dropout=0.5)).train()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_experts_that_are_fused_in_the_files_too_are_refused(tmp_path: Path) -> None:
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    config = transformers.GptOssConfig(**size, intermediate_size=64, num_local_experts=4, num_key_value_heads=2)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as refused:
        load(tmp_path)
    assert str(refused.value) == (
        f"model.name: {tmp_path}: model.layers.0.mlp.experts.gate_up_proj holds all experts in one tensor, which "
        "bitsandbytes does not quantize: most of the model would stay in 16 bits. Use a dense model, or "
        "quantization.type: none"
    )
    assert torch.equal(
        *(
            found(torch.arange(9)[None]).logits
            for found in (load(tmp_path, quantization={"type": "none"}), stock(tmp_path, "bf16", "none", False))
        )
    )


def test_dropout_written_as_a_number_is_off_too(tmp_path: Path, tiny_model: Path) -> None:
    size = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5)
    transformers.OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path, "fp32").train()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
    run = RunConfig.model_validate(settings(tmp_path, "rows.jsonl", "out", lora={"dropout": 0.5}))
    adapted, places = add_adapter(model, run.lora, 1, "base", torch.float32)
    places.move(0, np.zeros((1, 9), int), np.arange(9)[None], "cpu")
    assert adapted.train()(ids).logits.isfinite().all(), "its MLP sees all tokens in one dimension"


def test_architectures_whose_packed_rows_see_each_other_are_refused() -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = transformers.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0)
    llama = transformers.LlamaConfig(**size, intermediate_size=64)
    refuse_leaking_packs(logits_of(transformers.AutoModelForCausalLM.from_config(llama)), "Llama")
    leaking = transformers.AutoModelForCausalLM.from_config(opt).eval()
    with pytest.raises(ConfigError, match=r"OPTForCausalLM lets packed rows see each other. Set data.packing: false"):
        refuse_leaking_packs(logits_of(leaking), "OPTForCausalLM")


def logits_of(model: Any) -> Any:
    @torch.no_grad()
    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(ids, position_ids=positions, use_cache=False).logits
        return found

    return logits
