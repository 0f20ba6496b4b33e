"""Memory before anything is loaded, against what autograd keeps here and what an H200 measured."""

import importlib
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from job.activations import kept_bytes, layer_bytes
from job.config import parse_config
from job.fit import choose, fits
from job.lora_linear import in_one_step
from job.matching import shares
from job.memory import GIB, Item, Job, Memory, memory
from job.model import add_adapter, build, place
from job.norm_and_gate import _in_place_of
from job.pretrained import read_config, read_tensors
from job.recompute import recompute_activations
from job.shape import GATES, NORMS, Shape, read_shape
from job.store import Store
from job.trained import largest_trained, trained_elements
from job.weights import stream
from tests.conftest import make_llama
from tests.test_shape import LLAMA, llama_headers, shape_of

LLAMA_7B = read_shape(llama_headers(LLAMA), LLAMA)
BIG = LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
BIG |= {"num_attention_heads": 64, "num_key_value_heads": 8}
LLAMA_70B = read_shape(llama_headers(BIG), BIG)
MEASURED = Job(fused=False, optimizer="paged_adamw_8bit", bucket=500_000_000, overlap_comm=False)
MEASURED = replace(MEASURED, contiguous_gradients=True)
"""What the first runs in bench/RESULTS.md were; their DeepSpeed had a bucket of its default size."""

TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@pytest.mark.parametrize(
    ("micro_batch", "length", "recompute", "dropout", "peak_gib"),
    [
        (4, 2048, "full", 0.0, 9.0),
        (4, 2048, "full", 0.05, 9.0),
        (4, 2048, "none", 0.0, 48.4),
        (4, 2048, "none", 0.05, 56.4),
        (1, 512, "none", 0.0, 7.6),
        (1, 8192, "full", 0.0, 9.0),
        (1, 8192, "none", 0.0, 48.4),
    ],
)
def test_peaks_are_those_measured_on_an_h200(
    micro_batch: int, length: int, recompute: Any, dropout: float, peak_gib: float
) -> None:
    job = replace(MEASURED, micro_batch=micro_batch, length=length, recompute=recompute, dropout=dropout)
    assert memory(LLAMA_7B, job).allocated_gib == pytest.approx(peak_gib, rel=0.04)


@pytest.mark.parametrize(
    ("micro_batch", "length", "recompute", "peak_gib"),
    [(4, 2048, "full", 7.09), (4, 2048, "none", 31.09), (1, 512, "none", 5.72), (1, 8192, "full", 7.09)],
)
def test_peaks_in_one_step_are_those_measured_on_an_h200(
    micro_batch: int, length: int, recompute: Any, peak_gib: float
) -> None:
    job = Job(optimizer="paged_adamw_8bit", micro_batch=micro_batch, length=length, recompute=recompute)
    assert memory(LLAMA_7B, job).allocated_gib == pytest.approx(peak_gib, rel=0.03)


def saved_bytes(folder: Path, job: Job) -> int:
    """Bytes of all distinct storages that autograd saves in one forward of the layers, besides parameters."""
    values = {
        "model": {"name": str(folder)},
        "data": {"train": "rows.jsonl"},
        "lora": {"rank": job.rank, "dropout": job.dropout, "dora": job.dora, "targets": job.targets or "all"},
        "quantization": {"type": job.quantization},
        "output": {"url": "out"},
    }
    run, store, dtype = parse_config(json.dumps(values), []), Store(str(folder)), getattr(torch, TORCH[job.precision])
    config = read_config(str(folder), run.model)
    skeleton = build(config, run.model, run.quantization, job.precision, job.precision)
    wanted = shares(skeleton, read_tensors(str(folder), store, run.model), "it")
    place(skeleton, stream(store, wanted, run.quantization, dtype, "cpu"), "cpu")
    model, places = add_adapter(skeleton, run.lora, 0, "it", dtype)
    if job.fused:
        in_one_step(model)
    if job.recompute != "none":
        recompute_activations(model, layers=None if job.recompute == "full" else job.recompute)
    model.train()
    positions = torch.arange(job.length).repeat(job.micro_batch, 1)
    if job.masked:
        positions = positions % (job.length // 2)
    places.move(0, np.zeros(positions.shape, np.int64), positions.numpy(), "cpu")
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}  # holds them, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in ours:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    base = model.get_base_model()
    layers = getattr(base, base.base_model_prefix)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layers(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


SHAPES: dict[str, dict[str, int]] = {
    "grouped": {},
    "deep, every head its key": {"num_hidden_layers": 5, "num_key_value_heads": 4},
    "wide": {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 6, "num_key_value_heads": 1},
}
JOBS = {
    "plain": Job(),
    "dropout": Job(dropout=0.1),
    "some targets": Job(targets=("q_proj", "v_proj")),
    "some targets, dropout": Job(targets=("q_proj", "down_proj"), dropout=0.1),
    "packed": Job(masked=True),
    "fp32": Job(precision="fp32"),
    "not quantized": Job(quantization="none"),
    "DoRA": Job(dora=True),
    "DoRA, dropout": Job(dora=True, dropout=0.1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", JOBS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_kept_activations_are_those_that_autograd_saves(shape: str, what: str, fused: bool, tmp_path: Path) -> None:
    make_llama(tmp_path, **SHAPES[shape])
    job = replace(JOBS[what], rank=8, micro_batch=2, length=128, recompute="none", fused=fused)
    assert kept_bytes(shape_of(tmp_path), job) == pytest.approx(saved_bytes(tmp_path, job), rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_recompute_full_each_layer_keeps_its_input_alone(shape: str, tmp_path: Path) -> None:
    make_llama(tmp_path, **SHAPES[shape])
    job = Job(rank=8, micro_batch=2, length=128, dropout=0.1, recompute="full")
    made = shape_of(tmp_path)
    tables = 2 * 2 * made.head_size * job.tokens  # arguments of every layer, which no hook is told of
    assert kept_bytes(made, job) == saved_bytes(tmp_path, job) + tables


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_the_first_layers_may_keep_their_input_and_the_others_all(layers: int, tmp_path: Path) -> None:
    make_llama(tmp_path, **SHAPES["deep, every head its key"])
    job = Job(rank=8, micro_batch=2, length=128, dropout=0.1, recompute=layers)
    assert kept_bytes(shape_of(tmp_path), job) == pytest.approx(saved_bytes(tmp_path, job), rel=0.05)


def test_a_layer_that_is_computed_again_needs_room_only_where_none_is_kept() -> None:
    full, most, few = (memory(LLAMA_7B, Job(recompute=layers)) for layers in ("full", 31, 1))
    assert gib(full, "one layer again") * GIB == layer_bytes(LLAMA_7B, Job())
    assert gib(most, "one layer again") == gib(few, "one layer again") == 0
    assert memory(LLAMA_7B, Job(recompute=32)) == memory(LLAMA_7B, Job(recompute=99)) == full
    grown = few.total_gib - most.total_gib
    assert grown == pytest.approx(30 * (layer_bytes(LLAMA_7B, Job()) - 2 * 2048 * 4096) / GIB)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
GATED = SMALL | {"intermediate_size": 160, "num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES = {
    "plain MLP between layer norms": transformers.OPTConfig(**SMALL, ffn_dim=256, word_embed_proj_dim=64, dropout=0.0),
    "norms of heads": transformers.Qwen3Config(**GATED, head_dim=32),
    "four norms a layer": transformers.Glm4Config(**GATED, head_dim=32, hidden_act="silu"),
    "experts": transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
    "gates between layer norms": transformers.StableLmConfig(**GATED),
    "capped scores": transformers.Gemma2Config(**GATED, head_dim=32),
    "fused projections": transformers.Phi3Config(**GATED),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_counted_too(family: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    job = Job(rank=8, micro_batch=2, length=128, recompute="none")
    assert kept_bytes(shape_of(tmp_path), job) == pytest.approx(saved_bytes(tmp_path, job), rel=0.05)


@pytest.mark.parametrize("kind", sorted({*NORMS, *GATES}))
def test_the_types_that_the_plan_takes_for_llamas_have_its_code(kind: str) -> None:
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    there = vars(importlib.import_module(model.__module__)).values()
    classes = [one for one in there if inspect.isclass(one) and one.__module__ == model.__module__]
    ours = {end: [_in_place_of(one) for one in classes if one.__name__.endswith(end)] for end in ("RMSNorm", "MLP")}
    assert bool(ours["RMSNorm"] and all(ours["RMSNorm"])) == (kind in NORMS)
    assert all(ours["MLP"]) == (kind in GATES)  # of Mixtral none: its experts are ours


def test_what_attention_gave_waits_on_the_host_beside_inputs() -> None:
    away = Job(micro_batch=4, offload_activations=True)
    both = replace(away, attention_away=True)
    assert memory(LLAMA_7B, both).host_gib - memory(LLAMA_7B, away).host_gib == 32 * 8192 * 4096 * 2 / GIB
    # two on their way, and the logarithm of a sum for each head of 32 and token in each of 32 layers
    assert kept_bytes(LLAMA_7B, both) - kept_bytes(LLAMA_7B, away) == 2 * 8192 * 4096 * 2 + 32 * 8192 * 32 * 4
    here = Job(micro_batch=4, attention_away=True)
    assert kept_bytes(LLAMA_7B, here) == kept_bytes(LLAMA_7B, replace(here, attention_away=False))


def test_attention_written_out_keeps_a_score_for_each_pair_of_tokens() -> None:
    kernel, written_out = (kept_bytes(LLAMA_7B, Job(recompute="none", eager=eager)) for eager in (False, True))
    assert written_out - kernel == 32 * 32 * 2048**2 * (4 + 2)


def gib(memory: Memory, name: str) -> float:
    """An item of any moment by the start of its name; 0 when there is none."""
    items = [*memory.held, *memory.host, *(item for moment in memory.moments.values() for item in moment)]
    return next((item.gib for item in items if item.name.startswith(name)), 0.0)


def eight(strategy: Any, **changed: Any) -> Memory:
    return memory(LLAMA_70B, replace(Job(strategy=strategy, ranks=8, ranks_per_node=4), **changed))


def test_zero3_shards_the_base_but_not_its_scales() -> None:
    whole, sharded = eight("replicate"), eight("zero3")
    assert gib(whole, "base in 4 bits") * GIB == LLAMA_70B.quantized / 2
    assert gib(sharded, "base in 4 bits") == gib(whole, "base in 4 bits") / 8
    assert gib(sharded, "base kept in bf16") == gib(whole, "base kept in bf16") / 8
    assert gib(sharded, "scales") == gib(whole, "scales") > 0


def test_double_quantization_saves_three_eighths_of_a_bit_a_weight() -> None:
    single, double = eight("replicate", double_quant=False), eight("replicate")
    assert gib(single, "scales") * GIB * 8 == LLAMA_70B.quantized * 0.5
    assert gib(double, "scales") * GIB * 8 == pytest.approx(LLAMA_70B.quantized * 0.127, rel=1e-3)


def test_hpz_holds_the_base_a_second_time_in_each_node() -> None:
    sharded, twice = eight("zero3", layer_gathers=False), eight("hpz")
    stored = LLAMA_70B.quantized / 2 + 2 * LLAMA_70B.kept
    assert gib(twice, "base again") * GIB == stored / 4
    assert twice.total_gib - sharded.total_gib == pytest.approx(gib(twice, "base again"))


def test_gathered_weights_are_limited_but_never_less_than_a_layer_or_the_embedding() -> None:
    layer = LLAMA_70B.layer_quantized / 2 + 2 * (LLAMA_70B.layer - LLAMA_70B.layer_quantized)
    deepspeeds = {"strategy": "zero3", "layer_gathers": False}
    assert gib(eight(**deepspeeds, max_live=10**9), "gathered") * GIB == 10**9
    assert gib(eight(**deepspeeds, max_live=0), "gathered") * GIB == max(layer, 2 * 32000 * 8192)
    everything = LLAMA_70B.quantized / 2 + 2 * LLAMA_70B.kept
    assert gib(eight(**deepspeeds, max_live=10**12), "gathered") * GIB == everything


def test_gradients_of_zero3_wait_and_are_joined_in_buffers() -> None:
    trained, largest = trained_elements(LLAMA_70B, 16, "all"), largest_trained(LLAMA_70B, Job())
    expected = [(10**9, None, 2 * trained), (10**9, True, trained), (10**7, None, 4 * 10**7), (100, None, 4 * largest)]
    for bucket, contiguous, elements in expected:
        found = gib(eight("zero3", bucket=bucket, contiguous_gradients=contiguous), "gradients on their way") * GIB
        assert found == 2 * elements


def whole(memory: Memory) -> dict[str, int]:
    """Bytes that are gathered at each moment."""
    return {
        name: round(gib(replace(memory, moments={name: items}), "gathered") * GIB)
        for name, items in memory.moments.items()
    }


def test_of_layers_gathered_at_once_two_are_whole_and_the_output_layer_alone_while_it_takes_the_loss() -> None:
    layer = round(LLAMA_70B.layer_quantized / 2 + 2 * (LLAMA_70B.layer - LLAMA_70B.layer_quantized))
    embedding = 2 * 32000 * 8192
    loss, back, step, tried = (
        "taking the loss",
        "in the backward pass",
        "in the optimizer's step",
        "in the evaluation",
    )
    ahead = {loss: embedding, back: 2 * layer, step: 0, tried: layer + embedding}
    assert embedding > layer and whole(eight("zero3", max_live=0)) == whole(eight("zero3", max_live=10**9)) == ahead
    one = {loss: embedding, back: layer, step: 0, tried: embedding}
    assert whole(eight("zero3", gathers_ahead=False)) == one
    assert whole(eight("zero3", fused=False)) == {**ahead, loss: embedding + layer}, "its gradient is made later"
    tied = memory(replace(LLAMA_70B, tied=True), Job(strategy="zero3", ranks=8, ranks_per_node=4))
    assert set(whole(tied).values()) == {2 * layer + embedding}, "DeepSpeed's"


def test_where_layers_are_left_to_deepspeed_as_many_are_whole_as_may_live() -> None:
    for left in (
        eight("zero3", rank=64, max_live=10**9),  # w2's A is cut, above 1e6 elements
        eight("hpz", max_live=10**9),
        eight("zero3", offload_parameters="cpu", max_live=10**9),
    ):
        assert set(whole(left).values()) == {10**9}


def llama_3(hidden: int, intermediate: int, layers: int) -> Shape:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": 8, "vocab_size": 128256}
    config = LLAMA | sizes | heads
    return read_shape(llama_headers(config), config)


@pytest.mark.parametrize(
    ("shape", "micro_batch", "recompute", "peak_gib"),
    [
        (LLAMA_7B, 4, "full", 5.57),
        (LLAMA_7B, 4, "none", 29.69),
        (llama_3(8192, 28672, 80), 4, "full", 34.36),
        (llama_3(8192, 28672, 80), 4, 33, 105.69),
        (llama_3(16384, 53248, 126), 1, "full", 122.74),
    ],
    ids=["7B", "7B, none", "70B", "70B, 33 layers", "405B"],
)
def test_what_is_foreseen_is_what_two_h200s_took_under_zero3(
    shape: Shape, micro_batch: int, recompute: Any, peak_gib: float
) -> None:
    job = Job("zero3", ranks=2, ranks_per_node=2, micro_batch=micro_batch, recompute=recompute, storage_bytes=2)
    assert 0.998 * peak_gib <= memory(shape, job).allocated_gib <= 1.06 * peak_gib


def test_small_weights_stay_whole_under_zero3_and_so_does_the_last_layer_behind_a_small_output_layer() -> None:
    keys = sum(linear.numel * linear.count for linear in LLAMA_70B.linears if linear.name in ("k_proj", "v_proj")) / 2
    stays = {
        limit: gib(eight("zero3", persistence=limit, storage_bytes=2), "small") * GIB for limit in (10**6, 3 * 10**6)
    }
    assert stays == {10**6: 0, 3 * 10**6: keys} and keys == 80 * 1024 * 8192
    assert gib(eight("replicate", persistence=10**9), "small") == 0
    kept = 2 * LLAMA_70B.kept + LLAMA_70B.quantized / 2
    assert gib(eight("zero3", persistence=10**9), "small") * GIB == kept
    layer = LLAMA_70B.layer_quantized / 2 + 2 * (LLAMA_70B.layer - LLAMA_70B.layer_quantized)
    assert set(whole(eight("zero3", persistence=10**9)).values()) == {round(2 * layer)}, "beside the small ones"


def test_inputs_of_layers_that_are_on_the_host_are_two_on_the_gpu() -> None:
    here, there = (Job(micro_batch=4, offload_activations=away) for away in (False, True))
    one = 2 * 4 * 2048 * 4096 / GIB
    kept = [gib(memory(LLAMA_7B, job), "activations kept") for job in (here, there)]
    assert kept[0] - kept[1] == pytest.approx(30 * one)
    pinned = memory(LLAMA_7B, replace(there, ranks=16, ranks_per_node=8))
    assert gib(pinned, "layers' inputs") == pytest.approx(8 * 32 * one)
    assert pinned.host_gib == pytest.approx(memory(LLAMA_7B, replace(here, ranks_per_node=8)).host_gib + 8 * 32 * one)
    odd = memory(LLAMA_7B, replace(there, micro_batch=3))
    assert gib(odd, "layers' inputs") == pytest.approx(32 * one), "torch pins powers of two"
    for job in (here, replace(there, recompute="none"), replace(there, device="cpu")):
        assert gib(memory(LLAMA_7B, job), "layers' inputs") == 0


def test_the_optimizer_is_sharded_under_every_strategy_and_gradients_under_zero2() -> None:
    alone = memory(LLAMA_70B, Job())
    trained = gib(alone, "fp32 masters") * GIB / 4
    assert trained == 80 * 16 * (2 * 8192 * 2 + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    for strategy in ("replicate", "zero2", "zero3", "hpz"):
        assert gib(eight(strategy), "fp32 masters") == gib(alone, "fp32 masters") / 8
        assert gib(eight(strategy), "optimizer moments") * GIB == trained
    assert gib(eight("replicate"), "gradients") == gib(alone, "gradients")
    assert gib(eight("zero2"), "gradients") == gib(alone, "gradients") / 8


def test_moments_in_8_bits_take_a_quarter_and_pages_are_not_what_torch_counts() -> None:
    full, small, paged = (memory(LLAMA_7B, Job(optimizer=name)) for name in ("adamw", "adamw_8bit", "paged_adamw_8bit"))
    assert gib(small, "optimizer moments") == gib(full, "optimizer moments") / 4
    assert gib(paged, "optimizer moments") == gib(small, "optimizer moments")
    assert paged.total_gib == small.total_gib
    assert small.allocated_gib - paged.allocated_gib == pytest.approx(gib(paged, "optimizer moments"))


def test_what_is_offloaded_moves_to_the_host() -> None:
    here, there = eight("zero3"), eight("zero3", offload_parameters="cpu", offload_optimizer="cpu")
    stored = LLAMA_70B.quantized / 2 + 2 * LLAMA_70B.kept
    assert gib(there, "base in 4 bits") == gib(there, "fp32 masters") == 0
    assert gib(there, "base, pinned") * GIB == stored / 8 * 4
    trained = gib(here, "fp32 masters") * 8 / 4
    assert gib(there, "optimizer") == pytest.approx(4 * 16 * trained / 8)
    assert there.host_gib == pytest.approx(here.host_gib + gib(there, "base, pinned") + gib(there, "optimizer"))


def test_small_adapters_stay_whole_beside_their_part_under_zero3() -> None:
    whole, sharded = eight("zero3"), eight("zero3", persistence=0)
    assert gib(sharded, "adapter weights") == pytest.approx(gib(eight("replicate"), "adapter weights") / 8)
    assert gib(whole, "adapter weights") == pytest.approx(gib(eight("replicate"), "adapter weights") * 9 / 8)


def test_the_peak_is_the_largest_moment_and_the_lines_add_up() -> None:
    need = memory(LLAMA_7B, Job(micro_batch=4, fused=False))
    assert need.peak == "taking the loss"
    held = sum(item.gib for item in need.held)
    assert need.total_gib == pytest.approx(held + 12 * 8192 * 32000 / GIB + gib(need, "activations kept"))
    lines = need.lines()
    shown = [float(line.split()[0]) for line in lines[: lines.index(next(x for x in lines if "at its peak" in x))]]
    assert sum(shown) == pytest.approx(need.total_gib, abs=0.05)
    assert lines[-1] == "    2.15 GiB  host memory of a node: processes 1.90, reading 0.25"
    assert any("one layer again" in item.name for item in memory(LLAMA_7B, Job(micro_batch=4)).items)


def test_logits_are_those_of_learnt_positions() -> None:
    plain = Job(micro_batch=4, fused=False)
    all_of_them, half = (memory(LLAMA_7B, replace(plain, learnt_share=share)) for share in (1.0, 0.5))
    assert gib(half, "logits and gradients") == gib(all_of_them, "logits and gradients") / 2


def test_in_chunks_logits_take_as_much_for_any_number_of_positions() -> None:
    short, long = (memory(LLAMA_7B, Job(micro_batch=count)) for count in (4, 8))
    states = 2 * 4 * 2048 * 4096 / GIB
    assert gib(short, "logits and gradients") == pytest.approx(0.25 + states, rel=0.01)
    assert gib(long, "logits and gradients") == pytest.approx(0.25 + 2 * states, rel=0.01)
    few = memory(LLAMA_7B, Job(length=8))
    assert gib(few, "logits and gradients") == pytest.approx(8 * (8 * 32000 + 2 * 4096) / GIB, abs=1e-3)
    capped = read_shape(llama_headers(LLAMA), LLAMA | {"final_logit_softcapping": 30.0})
    assert gib(memory(capped, Job()), "logits and gradients") == pytest.approx(12 * 2048 * 32000 / GIB)


def test_on_a_cpu_there_is_neither_context_nor_second_process() -> None:
    need = memory(LLAMA_7B, Job(device="cpu"))
    assert gib(need, "CUDA context") == gib(need, "cuBLAS") == 0
    assert gib(need, "process") == 1.9
    assert need.host_gib == 0.25


def test_experts_are_named_in_the_notes() -> None:
    experts = replace(LLAMA_7B, experts_per_token=2)
    note = "activations are those of 2 experts a token, evenly spread"
    assert memory(experts, Job()).lines()[-1] == f"note: {note}"


def test_six_hundredths_of_a_device_stay_free() -> None:
    need = Memory((Item("all", 94.0),), {"always": ()}, ())
    assert fits(need, 100.01)
    assert not fits(need, 99.99)


def test_replicate_is_chosen_when_it_fits_and_zero3_when_only_that_does() -> None:
    small = choose(LLAMA_7B, Job(ranks=8, ranks_per_node=8), 139.8)
    assert (small.strategy, small.reason) == ("replicate", "5.4 GiB of 139.8 GiB a GPU")
    large = choose(LLAMA_70B, Job(ranks=8, ranks_per_node=8, length=1024), 24)
    assert (large.strategy, large.reason) == ("zero3", "9.7 GiB of 24.0 GiB a GPU (replicate takes 37.6)")
    assert large.memory == memory(LLAMA_70B, Job(strategy="zero3", ranks=8, ranks_per_node=8, length=1024))


def test_what_does_not_go_with_zero3_is_not_sent_there() -> None:
    job = Job(ranks=8, ranks_per_node=8, length=1024)
    for changed in (replace(job, quantization="int8"), replace(job, dora=True)):
        assert choose(LLAMA_70B, changed, 24).strategy is None
    assert choose(LLAMA_7B, replace(job, offload_parameters="cpu"), 139.8).strategy == "zero3"


def test_what_fits_nowhere_is_told_what_is_missing_and_what_helps_in_order() -> None:
    job = Job(recompute="none", micro_batch=4)
    assert choose(LLAMA_7B, job, 24).reason == (
        "nothing fits: replicate takes 32.1 GiB of 24.0 GiB a GPU, of which 6% stay free: 9.5 GiB are missing. "
        "Set train.recompute: full (8.1 GiB)"
    )
    refused = choose(LLAMA_70B, replace(job, recompute="full", micro_batch=1), 16)
    assert refused.strategy is None
    assert refused.reason == (
        "nothing fits: replicate takes 41.2 GiB of 16.0 GiB a GPU, of which 6% stay free: 26.1 GiB are missing. "
        "Set train.offload_activations: true (39.2 GiB), then data.max_length: 1024 (39.2 GiB), then "
        "2 GPUs under zero3 (22.0 GiB), then parallel.offload_parameters: cpu (5.2 GiB)"
    )
    hopeless = choose(LLAMA_70B, replace(job, recompute="full", micro_batch=1), 4).reason
    assert hopeless.endswith("parallel.offload_parameters: cpu (5.2 GiB) is not enough: take GPUs with more memory")
    tiny = choose(LLAMA_70B, Job(quantization="int8", length=512), 24).reason
    assert tiny.endswith("are missing. Take GPUs with more memory")


def test_a_shape_without_linears_of_a_target_has_no_adapter() -> None:
    need = memory(LLAMA_7B, Job(targets=("query_key_value",)))
    assert gib(need, "fp32 masters") == 0
