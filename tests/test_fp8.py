"""Products with the frozen base in 8 bits: how far they are from 16, and that what is trained stays in 16."""

import copy
import math
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from torch import nn

from job import fp8, plan
from job.config import parse_config
from job.dropout import Places
from job.errors import ConfigError
from job.lora_linear import in_one_step
from job.lora_sums import Sums
from job.plan import make_plan
from job.train import train
from job.world import Hardware, World
from tests.test_config import LEAST
from tests.test_lora_together import Attention

H200 = Hardware("cuda", "NVIDIA H200", True, 140.0, 1)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def part(found: torch.Tensor, expected: torch.Tensor) -> float:
    """What part of the expected is in what is found, as least squares have it."""
    return float((found.double() * expected).sum() / (expected.double() ** 2).sum())


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantized", [True, False], ids=["4 bits", "whole"])
def test_products_are_within_what_three_bits_of_mantissa_give(quantized: bool) -> None:
    weight, x, dy = some(96, 128), some(32, 128, seed=1), some(32, 96, seed=2)
    weight[3] *= 1000  # a row's scale is its own
    packed, state = bnb.quantize_4bit(weight) if quantized else (weight, None)
    exact = bnb.dequantize_4bit(packed, state) if quantized else weight
    y, dx = torch.empty(32, 96, dtype=torch.bfloat16), torch.empty(32, 128, dtype=torch.bfloat16)
    fp8.forward(fp8.scaled(x), packed, state, y)
    fp8.backward(fp8.scaled(dy), packed, state, dx)
    for column in range(96):
        assert distance(y[:, column], (x @ exact.T)[:, column]) < 0.07
    assert distance(dx, dy @ exact) < 0.05
    assert distance(y, x @ exact.T) > 0.005, "nothing was rounded to 8 bits"


def test_scales_of_a_weight_are_made_once_and_are_no_less_than_its_largest() -> None:
    packed, state = bnb.quantize_4bit(some(64, 192), compress_statistics=True)
    exact = bnb.dequantize_4bit(packed, state)
    for turned in (False, True):
        scales = fp8._largest(state, turned)
        assert scales is fp8._largest(state, turned) and len(scales) == (192 if turned else 64)
        assert bool((exact.abs().amax(0 if turned else 1) / 448 <= scales[:, 0] * 1.000001).all())


def test_rows_of_nothing_stay_nothing() -> None:
    small, scales = fp8.scaled(torch.zeros(3, 16))
    assert not small.float().any() and bool((scales > 0).all())


@pytest.mark.parametrize("turned", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("quantized", [True, False], ids=["4 bits", "whole"])
def test_over_steps_the_errors_of_a_rounded_weight_cancel(quantized: bool, turned: bool) -> None:
    weight = some(64, 192)
    packed, state = bnb.quantize_4bit(weight) if quantized else (weight, None)
    exact = bnb.dequantize_4bit(packed, state) if quantized else weight
    product, sizes = (fp8.backward, (64, 192)) if turned else (fp8.forward, (192, 64))
    small, scales = fp8.scaled(torch.eye(sizes[0]))
    ones = small, scales / fp8.MENDED  # 8 bits hold them as they are
    found, total = [], torch.zeros(sizes)
    for step in range(200):
        seen = torch.empty(sizes)
        product(ones, packed, state, seen, fp8.widened(step * fp8.STEPS))
        found.append(distance(seen, exact if turned else exact.T))
        total += seen
    assert all(0.02 < one < 0.04 for one in found), "each step's are as large as they were"
    expected = exact if turned else exact.T
    assert distance(total / 200, expected) < 0.001, "as if by chance it would be 0.0019"
    assert abs(part(total / 200, expected) - 1) < 0.0003, "more is rounded down than up by 0.0007"


def test_as_much_of_an_input_is_rounded_up_as_down() -> None:
    x = some(2048, 512)
    small, scales = fp8.scaled(x)
    assert abs(part(small.float() * scales, x) - 1) < 0.0003, "more is rounded down than up by 0.0007"


def test_a_weight_is_rounded_anew_every_few_steps_wherever_they_begin() -> None:
    steps = range(1000 * fp8.STEPS, 1008 * fp8.STEPS)
    wide = [math.log2(fp8.widened(step)) for step in steps]
    assert len(set(wide)) == 8 and wide[0] == wide[fp8.STEPS - 1] != wide[fp8.STEPS]
    assert min(wide) >= 0 and max(wide) < 1
    spread = sorted({*wide, min(wide) + 1})
    assert max(after - before for before, after in pairwise(spread)) < 2 / 8, "chance leaves wider gaps"


def models() -> tuple[Any, Any, Any]:
    """peft's, ours in 16 bits and ours in 8."""
    torch.manual_seed(0)
    base = Attention().requires_grad_(False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q", "k", "v", "o"]))
    for name, value in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.3)
    theirs.to(torch.bfloat16)
    ours, small = copy.deepcopy(theirs), copy.deepcopy(theirs)
    in_one_step(ours)
    in_one_step(small, Places(0))
    return theirs, ours, small


def learnt(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x * 1.0)
    (y.float() ** 2).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {"y": y.detach(), "x": x.grad, **found}  # type: ignore[dict-item]


def test_a_model_learns_nearly_the_same_and_is_evaluated_as_before() -> None:
    _, ours, small = models()
    x = some(2, 16, 64).to(torch.bfloat16)
    expected, found = learnt(ours, x), learnt(small, x)
    for name, value in expected.items():
        assert distance(found[name], value) < 0.1, name
    assert not torch.equal(found["y"], expected["y"])
    with torch.no_grad():
        assert torch.equal(small(x), ours(x))


def test_weights_of_other_sizes_stay_in_16_bits() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 32)).requires_grad_(False),
        peft.LoraConfig(r=4, target_modules=["0", "1"]),
    )
    in_one_step(model, Places(0))
    output = model(some(2, 4, 32))
    assert type(output.grad_fn).__name__.startswith(Sums.__name__)
    assert all(module.in_fp8 is None for module in model.modules() if hasattr(module, "in_fp8"))


@pytest.mark.parametrize(
    ("hardware", "overrides", "fault"),
    [
        (
            Hardware("cuda", "NVIDIA A100", True, 80.0, 1, fp8=False),
            [],
            "train.base_compute: NVIDIA A100 has no FP8 units, as GPUs from Hopper on have. Use bf16",
        ),
        (
            Hardware("cpu", "2 CPU cores", True, 8.0),
            [],
            "train.base_compute: 2 CPU cores has no FP8 units, as GPUs from Hopper on have. Use bf16",
        ),
        (
            H200,
            ["train.precision=fp16"],
            "train.base_compute: fp8 goes with train.precision bf16, and here it is fp16. Use bf16",
        ),
        (
            H200,
            ["train.fused=false"],
            "train.fused: false has products that are not in FP8. Use another value, or train.base_compute: bf16",
        ),
        (
            H200,
            ["lora.dora=true"],
            "lora.dora: true has products that are not in FP8. Use another value, or train.base_compute: bf16",
        ),
        (
            H200,
            ["quantization.type=int8"],
            "quantization.type: int8 has products that are not in FP8. Use another value, or train.base_compute: bf16",
        ),
    ],
    ids=["Ampere", "CPU", "fp16", "unfused", "DoRA", "int8"],
)
def test_what_does_not_go_with_it_is_refused(hardware: Hardware, overrides: list[str], fault: str) -> None:
    config = parse_config(LEAST, ["train.base_compute=fp8", *overrides])
    with pytest.raises(ConfigError) as refused:
        make_plan(config, World(), hardware)
    assert fault in refused.value.faults


def test_on_hopper_it_goes() -> None:
    assert make_plan(parse_config(LEAST, ["train.base_compute=fp8"]), World(), H200).precision == "bf16"


def test_a_run_rounds_by_its_steps_and_goes_on_so(
    run_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "fp8_faults", lambda *_: [])
    rounded: dict[str, list[float]] = {"forward": [], "backward": []}
    for name, seen in rounded.items():
        product = getattr(fp8, name)
        monkeypatch.setattr(
            fp8, name, lambda *given, product=product, seen=seen: (seen.append(given[-1]), product(*given))
        )
    ways = [fp8.widened(step) for step in (0, 4, 8)]
    common = {"base_compute": "fp8", "precision": "bf16", "global_batch_size": 2, "micro_batch_size": 1}
    for steps, expected in ((6, ways[:2]), (10, ways[1:])):
        path = run_file("run", lora={"dropout": 0.0}, train=common | {"max_steps": steps})
        train(parse_config(path.read_text()), World(), lambda line: None)
        for seen in rounded.values():
            assert [wider for wider, _ in groupby(seen)] == expected
            seen.clear()
