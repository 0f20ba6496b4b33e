"""The arithmetic that settings and machine imply."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from job.config import parse_config
from job.errors import ConfigError
from job.fit import SPARE_FOR_SPEED
from job.plan import Plan, make_plan
from job.shape import Linear, Shape
from job.world import Hardware, World
from tests.test_config import LEAST
from tests.test_memory import LLAMA_7B, LLAMA_70B

CPU = Hardware("cpu", "this CPU", bf16=True, memory_gib=8)
H200 = Hardware("cuda", "NVIDIA H200", bf16=True, memory_gib=140)
T4 = Hardware("cuda", "Tesla T4", bf16=False, memory_gib=15)


def plan(*overrides: str, hardware: Hardware = CPU, world: World | None = None, model_type: str = "llama") -> Plan:
    return make_plan(parse_config(LEAST, overrides), world or World(), hardware, model_type)


def rates(schedule: str, warmup: float, steps: int) -> list[float]:
    made = plan(f"train.schedule={schedule}", f"train.warmup_steps={warmup}", "train.learning_rate=0.5")
    return [made.with_steps(steps).learning_rate(step) for step in range(steps)]


def transformers_rates(schedule: str, warmup: int, steps: int) -> list[float]:
    """One rate for each scheduler step 0..steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    follow = transformers.get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule, optimizer, warmup, steps
    )
    found = []
    for _ in range(steps + 1):
        found.append(follow.get_last_lr()[0])
        optimizer.step()
        follow.step()
    return found


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_learning_rates_are_transformers_with_the_warm_up_one_step_ahead(schedule: str, warmup: int) -> None:
    ours, theirs = rates(schedule, warmup, 20), transformers_rates(schedule, warmup, 20)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1])
    assert ours[warmup:] == pytest.approx(theirs[warmup:20])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0.03, 10), (0.5, 7), (9, 5)])
def test_every_step_learns_something_and_none_more_than_the_peak(schedule: str, warmup: float, steps: int) -> None:
    assert all(0 < rate <= 0.5 for rate in rates(schedule, warmup, steps))


def test_the_peak_comes_at_the_end_of_the_warm_up_and_the_fall_goes_to_nothing() -> None:
    assert rates("constant", 4, 6) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert rates("linear", 0, 100)[-1] == pytest.approx(0.005)
    assert rates("cosine", 0, 100)[50] == pytest.approx(0.25)
    assert rates("cosine", 0, 100)[-1] < 0.001


@pytest.mark.parametrize(
    ("setting", "steps", "expected"), [(0, 100, 0), (0.03, 100, 3), (0.03, 10, 1), (1, 100, 1), (7, 100, 7)]
)
def test_warm_up_is_a_share_below_one_and_a_number_from_there(setting: float, steps: int, expected: int) -> None:
    assert plan(f"train.warmup_steps={setting}").with_steps(steps).warmup_steps == expected


@pytest.mark.parametrize(
    ("precision", "hardware", "chosen", "notes"),
    [
        ("auto", CPU, "bf16", ()),
        ("auto", H200, "bf16", ()),
        ("auto", T4, "fp16", ("Tesla T4 has no bf16: fp16 with loss scaling instead",)),
        ("fp16", H200, "fp16", ()),
        ("fp32", T4, "fp32", ()),
    ],
)
def test_precision_follows_the_machine_and_says_so(
    precision: str, hardware: Hardware, chosen: str, notes: tuple[str, ...]
) -> None:
    made = plan(f"train.precision={precision}", hardware=hardware)
    assert (made.precision, made.compute_dtype, made.notes) == (chosen, chosen, notes)


def test_the_compute_dtype_can_differ() -> None:
    made = plan("train.precision=bf16", "quantization.compute_dtype=fp32")
    assert (made.precision, made.compute_dtype) == ("bf16", "fp32")


@pytest.mark.parametrize(
    ("overrides", "where", "fault"),
    [
        (
            ["train.precision=fp16"],
            {"hardware": CPU},
            "train.precision: fp16 does not train on a CPU. Use auto, bf16 or fp32",
        ),
        (
            ["train.precision=bf16"],
            {"hardware": T4},
            "train.precision: Tesla T4 has no bf16. Use auto or fp16",
        ),
        (
            ["train.precision=fp16"],
            {"hardware": H200, "model_type": "gemma2"},
            "train.precision: gemma2 overflows in fp16. Use bf16 on a GPU that has it, or fp32",
        ),
        (
            [],
            {"hardware": T4, "model_type": "gemma3_text"},
            "train.precision: gemma3_text overflows in fp16. Use bf16 on a GPU that has it, or fp32",
        ),
        (
            ["train.global_batch_size=100", "train.micro_batch_size=2"],
            {"world": World(0, 8)},
            "train.global_batch_size: 100 is not a multiple of 16 (2 per rank x 8 ranks). Try 96 or 112",
        ),
        (
            ["train.global_batch_size=2"],
            {"world": World(0, 4)},
            "train.global_batch_size: 2 is not a multiple of 4 (1 per rank x 4 ranks). Try 4 or 8",
        ),
        (
            ["model.attention=flash_attention_2"],
            {"hardware": CPU},
            "model.attention: flash_attention_2 needs a GPU. Use sdpa",
        ),
        (
            ["train.offload_activations=true"],
            {"hardware": CPU},
            "train.offload_activations: here is no GPU whose memory it would spare. Use false",
        ),
        (
            ["train.offload_activations=true", "train.recompute=none"],
            {"hardware": H200},
            "train.offload_activations: recompute none keeps all on the GPU. Use train.recompute: full",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_refused(overrides: list[str], where: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(*overrides, **where)
    assert refused.value.faults == (fault,)


def test_faults_of_settings_and_machine_come_together() -> None:
    with pytest.raises(ConfigError) as refused:
        plan("train.precision=fp16", "train.global_batch_size=3", world=World(0, 2))
    assert str(refused.value).splitlines() == [
        "2 problems in the settings for this machine",
        "  train.precision: fp16 does not train on a CPU. Use auto, bf16 or fp32",
        "  train.global_batch_size: 3 is not a multiple of 2 (1 per rank x 2 ranks). Try 2 or 4",
    ]


def test_accumulation_follows_from_the_batch_sizes() -> None:
    made = plan("train.global_batch_size=48", "train.micro_batch_size=2", world=World(1, 3))
    assert (made.global_batch_size, made.micro_batch_size, made.accumulation) == (48, 2, 8)


@pytest.mark.parametrize(("precision", "hardware"), [("bf16", CPU), ("fp16", T4), ("fp32", CPU)])
def test_deepspeed_gets_these_numbers(precision: str, hardware: Hardware) -> None:
    made = plan(f"train.precision={precision}", "train.max_grad_norm=0.3", "parallel.bucket=1000", hardware=hardware)
    config = made.deepspeed()
    numbers = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 16}
    assert numbers.items() <= config.items()
    assert config["gradient_clipping"] == 0.3
    assert config["zero_optimization"]["stage"] == 1
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert {name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")} == {precision} - {"fp32"}
    if precision == "fp16":
        assert config["fp16"]["loss_scale"] == 0, "dynamic loss scaling"


def test_flash_attention_with_several_sequences_a_forward_is_refused_for_it_would_mix_packed_rows() -> None:
    message = "keeps packed rows apart only at train.micro_batch_size and evaluation.micro_batch_size 1"
    with pytest.raises(ConfigError, match=message):
        plan("model.attention=flash_attention_2", "train.micro_batch_size=2", hardware=H200)
    assert plan("model.attention=flash_attention_2", hardware=H200).micro_batch_size == 1


def test_experts_that_quantization_does_not_reach_are_refused_before_anything_is_loaded() -> None:
    shape = replace(LLAMA_70B, model_type="gpt_oss", experts_per_token=2)
    with pytest.raises(ConfigError, match=r"quantization.type: nf4 does not reach the experts of gpt_oss"):
        make_plan(parse_config(LEAST), World(), H200, "gpt_oss", shape)
    make_plan(parse_config(LEAST, ["quantization.type=none"]), World(), H200, "gpt_oss", shape)


def test_experts_that_lie_apart_in_the_files_of_another_family_are_refused_for_what_they_are() -> None:
    apart = (Linear("mlp.experts.*.gate_proj", 64, 32, 8),)
    shape = replace(LLAMA_70B, model_type="deepseek_v3", experts_per_token=2, linears=apart)
    with pytest.raises(
        ConfigError, match=r"model.name: transformers makes the fused experts of deepseek_v3 of other t"
    ):
        make_plan(parse_config(LEAST), World(), H200, "deepseek_v3", shape)


def test_auto_is_replicate_where_it_fits_and_zero3_where_only_that_does() -> None:
    pair = World(0, 2, local_world_size=2)
    shape = LLAMA_70B
    for memory, expected, said in (
        (139.8, "replicate", r"[\d.]+ GiB of 139.8 GiB a GPU"),
        (40.0, "zero3", r"[\d.]+ GiB of 40.0 GiB a GPU \(replicate takes [\d.]+\)"),
    ):
        hardware = Hardware("cuda", "GPU", True, memory, 2)
        made = make_plan(parse_config(LEAST), pair, hardware, "llama", shape)
        assert made.zero.strategy == expected
        assert re.fullmatch(said, made.reason)
    with pytest.raises(ConfigError, match=r"parallel.strategy: nothing fits: zero3 takes [\d.]+ GiB of 16.0 GiB"):
        make_plan(parse_config(LEAST), pair, Hardware("cuda", "GPU", True, 16.0, 2), "llama", shape)
    forced = make_plan(
        parse_config(LEAST, ["parallel.strategy=replicate"]),
        pair,
        Hardware("cuda", "GPU", True, 30.0, 2),
        "llama",
        shape,
    )
    assert forced.zero.strategy == "replicate" and forced.reason.endswith(", which will hardly do")


def with_memory(gib: float, *overrides: str) -> Plan:
    hardware = Hardware("cuda", "GPU", bf16=True, memory_gib=gib)
    return make_plan(parse_config(LEAST, [*overrides, "data.max_length=2048"]), World(), hardware, "llama", LLAMA_7B)


def test_activations_are_kept_where_a_gpu_holds_them_with_room_to_spare() -> None:
    always = "train.dequantize=always"
    kept, again = (with_memory(140, f"train.recompute={how}", always).memory for how in ("none", "full"))
    assert kept and again and kept.total_gib > again.total_gib + 5
    room = kept.total_gib / (1 - SPARE_FOR_SPEED)
    roomy, tight = with_memory(room + 0.01, always), with_memory(room - 0.01, always)
    tightest = with_memory(again.total_gib / (1 - SPARE_FOR_SPEED) + 0.01, always)
    assert (roomy.recompute, tight.recompute, tightest.recompute) == ("none", 1, "full")
    assert roomy.memory == kept and tightest.memory == again
    assert roomy.reason == f"{kept.total_gib:.1f} GiB of {room + 0.01:.1f} GiB a GPU"
    assert tightest.reason.startswith(f"{again.total_gib:.1f} GiB of ")
    assert with_memory(room + 0.01, "parallel.strategy=replicate").recompute == "none"


def test_a_mask_is_planned_where_attention_takes_one() -> None:
    fixed = ["data.max_length=2048", "train.recompute=none", "train.dequantize=always", "train.micro_batch_size=4"]

    def bytes_of(shape: Shape, *more: str, bf16: bool = True) -> float:
        hardware = Hardware("cuda", "GPU", bf16=bf16, memory_gib=140)
        found = make_plan(parse_config(LEAST, [*fixed, *more]), World(), hardware, "llama", shape).memory
        assert found
        return found.total_gib * 2**30

    packed, masks = bytes_of(LLAMA_7B), 32 * 4 * 2048**2 * 2  # one in bf16 for every layer
    assert bytes_of(LLAMA_7B, "model.attention=sdpa") == pytest.approx(packed + masks)
    assert bytes_of(replace(LLAMA_7B, causal=False)) == pytest.approx(packed + masks)
    before_ampere = [bytes_of(LLAMA_7B, f"model.attention={how}", bf16=False) for how in ("auto", "sdpa")]
    assert before_ampere[0] == before_ampere[1]  # torch has no kernel for it there
    assert bytes_of(LLAMA_7B, "data.packing=false", "train.micro_batch_size=1") < packed


@pytest.mark.parametrize(
    ("rows", "shape", "overrides", "taken"),
    [
        ("grouped", LLAMA_7B, [], True),
        ("grouped", LLAMA_70B, [], True),
        ("plain", LLAMA_7B, [], True),
        ("plain", LLAMA_70B, [], False),  # fewer keys than queries
        ("none", LLAMA_7B, [], False),
        ("grouped", LLAMA_7B, ["train.precision=fp32"], False),
        ("grouped", LLAMA_7B, ["model.attention=eager"], False),
        ("grouped", replace(LLAMA_7B, causal=False), [], False),
    ],
)
def test_attention_is_told_rows_where_torch_and_model_take_them(
    rows: Any, shape: Shape, overrides: list[str], taken: bool
) -> None:
    hardware = Hardware("cuda", "GPU", bf16=True, memory_gib=140, rows=rows)
    assert make_plan(parse_config(LEAST, overrides), World(), hardware, "llama", shape).by_rows == taken
    assert not make_plan(parse_config(LEAST, overrides), World(), replace(CPU, rows=rows), "llama", shape).by_rows


def test_as_few_layers_are_computed_again_as_a_gpu_can_do_with() -> None:
    always = "train.dequantize=always"
    found = [with_memory(gib, always) for gib in range(7, 24)]
    layers = [int({"full": 32, "none": 0}.get(str(one.recompute), one.recompute)) for one in found]
    assert layers == sorted(layers, reverse=True) and layers[0] > 24 and layers[-1] == 0 and len(set(layers)) > 6
    for one in found:
        if isinstance(one.recompute, int):
            left = with_memory(140, f"train.recompute={one.recompute - 1 or 'none'}", always)
            assert one.memory and left.memory
            size = float(one.reason.split()[3])
            assert one.memory.total_gib <= size * (1 - SPARE_FOR_SPEED) < left.memory.total_gib
            assert with_memory(140, f"train.recompute={one.recompute}", always).memory == one.memory


def test_adapters_too_large_to_stay_whole_are_told_what_they_cost() -> None:
    def notes(*overrides: str) -> str:
        config = parse_config(LEAST, ["parallel.strategy=zero3", "train.global_batch_size=8", *overrides])
        return "\n".join(make_plan(config, World(0, 8), H200, "llama", LLAMA_7B).notes)

    told = "more than stay whole: DeepSpeed gathers layers its own, slower way. Set parallel.persistence: 1409024"
    assert told in notes("lora.rank=128")
    for fine in ("lora.rank=64", "parallel.layer_gathers=false", "parallel.strategy=zero2"):
        assert "gathers layers" not in notes(fine if "rank" in fine else "lora.rank=128", fine)
    assert "gathers layers" not in notes("lora.rank=128", "parallel.persistence=1409024")


def test_inputs_go_to_the_host_where_layers_are_computed_again() -> None:
    away = "train.offload_activations=true"
    assert with_memory(140, away, "train.recompute=full").inputs_on_host
    assert with_memory(7, away, "train.dequantize=always").inputs_on_host, "auto comes to full here"
    assert with_memory(14, away, "train.dequantize=always", "train.recompute=4").inputs_on_host, "and here four layers'"
    assert not with_memory(140, away).inputs_on_host, "and here to none"
    assert not with_memory(140, "train.recompute=full").inputs_on_host


def test_values_of_the_base_are_kept_where_a_gpu_holds_them_with_room_to_spare() -> None:
    kept, made = (with_memory(140, f"train.dequantize={how}") for how in ("once", "always"))
    assert kept.memory and made.memory
    # 32 layers of 4 x 4096 x 4096 and 3 x 4096 x 11008 values of 2 bytes
    assert kept.memory.total_gib - made.memory.total_gib == pytest.approx(32 * 202375168 * 2 / 2**30, rel=1e-6)
    room = kept.memory.total_gib / (1 - SPARE_FOR_SPEED)
    roomy, tight = with_memory(room + 0.01), with_memory(room - 0.01)
    assert (roomy.dequantize, tight.dequantize) == ("once", "always")
    assert (roomy.recompute, tight.recompute) == ("none", "none")
    assert roomy.memory == kept.memory and tight.memory == made.memory
    for changed in ("train.fused=false", "quantization.type=none", "parallel.strategy=zero3"):
        assert with_memory(140, changed).dequantize == "always"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["train.fused=false"], "once is for 4-bit weights, train.fused: true and no DoRA. Use auto, or set these"),
        (["lora.dora=true"], "once is for 4-bit weights, train.fused: true and no DoRA. Use auto, or set these"),
        (
            ["quantization.type=none"],
            "once is for 4-bit weights, train.fused: true and no DoRA. Use auto, or set these",
        ),
        (
            ["parallel.strategy=zero3"],
            "once keeps the values of a whole base, and here it is sharded. Use auto, or always",
        ),
    ],
)
def test_values_that_cannot_be_kept_are_refused(overrides: list[str], fault: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan("train.dequantize=once", *overrides)
    assert f"train.dequantize: {fault}" in refused.value.faults


def test_activations_are_made_again_as_set_on_a_cpu_and_where_the_model_is_not_known() -> None:
    assert with_memory(140, "train.recompute=full").recompute == "full"
    assert with_memory(12, "train.recompute=none", "parallel.strategy=replicate").recompute == "none"
    assert plan().recompute == plan(hardware=H200).recompute == "full"
    assert make_plan(parse_config(LEAST), World(), CPU, "llama", LLAMA_7B).recompute == "full"
