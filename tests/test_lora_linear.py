"""LoRA and its linear in one step: the values and gradients of peft's five."""

import copy
from typing import Any

import bitsandbytes as bnb
import numpy as np
import peft
import pytest
import torch
from torch import nn

from job.dropout import Places, RowDropout
from job.linear import FrozenLinear4bit
from job.lora_linear import in_one_step

IN, OUT, RANK, TOKENS = 64, 96, 5, (2, 7)


def four_bit(linear: nn.Linear, kind: str) -> nn.Module:
    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_type=kind,
        compute_dtype=torch.float32,
    )
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
    made.bias = linear.bias
    made = made.to("cpu")
    made.support_avx512bf16_for_cpu = False
    made.__class__ = FrozenLinear4bit
    return made


class Model(nn.Module):
    """Two linears that get an adapter each."""

    def __init__(self, quantized: str | None, bias: bool):
        super().__init__()
        first, last = nn.Linear(IN, OUT, bias=bias), nn.Linear(OUT, IN, bias=bias)
        self.first, self.last = (four_bit(one, quantized) if quantized else one for one in (first, last))
        self.is_loaded_in_4bit = quantized is not None
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(torch.tanh(self.first(x)))


def adapted(
    quantized: str | None = None, bias: bool = False, dropout: float = 0.0, trained: str = "none", **how: Any
) -> tuple[Any, Places]:
    torch.manual_seed(0)
    targets = ["first", "last"]
    config = peft.LoraConfig(r=RANK, lora_alpha=7, lora_dropout=dropout, target_modules=targets, bias=trained, **how)
    model, places = peft.get_peft_model(Model(quantized, bias), config), Places(3)
    places.move(4, np.arange(2)[:, None].repeat(7, 1), np.arange(7)[None].repeat(2, 0), "cpu")
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            nn.init.normal_(module.lora_B["default"].weight, std=0.3)
            if dropout:
                module.lora_dropout["default"] = RowDropout(dropout, name, places)
    return model, places


def both(model: Any) -> tuple[Any, Any]:
    """peft's model, and the same in one step."""
    ours = copy.deepcopy(model)
    in_one_step(ours)
    return model, ours


def learnt(model: Any, x: torch.Tensor, with_gradient: bool = True) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    x = x.clone().requires_grad_(with_gradient)
    y = model(x)
    (y.float() ** 2).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert all(value is not None for value in found.values())
    return {"y": y.detach(), **({"x": x.grad} if with_gradient else {}), **found}  # type: ignore[dict-item]


def used(model: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the output comes from the one step."""
    return "Sums" in type(model(torch.ones(*TOKENS, IN, dtype=dtype)).grad_fn).__name__


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm of what is expected."""
    return float((found.to(expected.dtype) - expected).norm() / expected.norm())


CASES = [
    {},
    {"quantized": "nf4"},
    {"quantized": "fp4", "bias": True},
    {"bias": True},
    {"quantized": "nf4", "dropout": 0.3},
    {"dropout": 0.5},
    {"use_rslora": True},
    {"quantized": "nf4", "bias": True, "trained": "all"},
    {"bias": True, "trained": "lora_only"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_gradient", [True, False], ids=["inside", "first layer"])
def test_values_and_gradients_are_those_of_peft(case: dict[str, Any], with_gradient: bool) -> None:
    model, _ = adapted(**case)
    theirs, ours = both(model)
    assert used(ours) and not used(theirs)
    x = torch.randn(*TOKENS, IN, generator=torch.Generator().manual_seed(1))
    expected, found = learnt(theirs, x, with_gradient), learnt(ours, x, with_gradient)
    assert found.keys() == expected.keys() and len(found) >= 5
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-6, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_formula_in_float64(dropout: float) -> None:
    (_, ours), x = both(adapted(dropout=dropout)[0]), torch.randn(*TOKENS, IN)
    found = learnt(ours, x)
    double = copy.deepcopy(ours).double()
    expected = learnt(double, x.double())
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-6, name
    module = double.base_model.model.first
    inputs = (torch.randn(*TOKENS, IN, dtype=torch.float64, requires_grad=True),)
    assert torch.autograd.gradcheck(module, inputs)


def test_in_bf16_it_is_no_further_from_float64_than_peft() -> None:
    model, _ = adapted("nf4")
    x = torch.randn(*TOKENS, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = learnt(copy.deepcopy(model), x.float())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    theirs, ours = both(model)
    assert used(ours, torch.bfloat16)
    found, other = (learnt(one, x) for one in (ours, theirs))
    for name, value in expected.items():
        assert distance(found[name], value) <= 1.1 * distance(other[name], value) + 1e-3, name


def test_what_is_kept_for_the_backward_pass_is_x_and_what_is_narrow() -> None:
    kept: list[torch.Tensor] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    (_, ours), x = both(adapted("nf4", dropout=0.3)[0]), torch.randn(*TOKENS, IN, requires_grad=True)
    layer = ours.base_model.model.first
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(x)
    weights = {id(value) for value in layer.parameters()}
    sizes = sorted(value.numel() for value in kept if id(value) not in weights)
    tokens = x[..., 0].numel()
    assert sizes == sorted([x.numel(), tokens * RANK, tokens, IN])


def other_ways() -> dict[str, Any]:
    dora = adapted(use_dora=True)[0]
    two = adapted()[0]
    two.add_adapter("second", peft.LoraConfig(r=2, target_modules=["first"]))
    two.base_model.set_adapter(["default", "second"])
    merged = adapted()[0]
    merged.merge_adapter()
    off = adapted()[0]
    off.base_model.disable_adapter_layers()
    plain_dropout = adapted(dropout=0.3)[0]
    for module in plain_dropout.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(0.0)
    return {"dora": dora, "two": two, "merged": merged, "off": off, "another dropout": plain_dropout}


@pytest.mark.parametrize("kind", ["dora", "two", "merged", "off", "another dropout"])
def test_adapters_that_are_more_than_plain_go_peft_s_way(kind: str) -> None:
    theirs, ours = both(other_ways()[kind])
    x = torch.randn(*TOKENS, IN)
    assert not used(ours) and torch.equal(ours(x), theirs(x))


def test_it_stays_a_layer_of_peft_that_can_be_merged_and_saved() -> None:
    theirs, ours = both(adapted()[0])
    x = torch.randn(*TOKENS, IN)
    expected = ours(x)
    saved, kept = peft.get_peft_model_state_dict(theirs), peft.get_peft_model_state_dict(ours)
    assert all(torch.equal(kept[name], value) for name, value in saved.items()) and kept.keys() == saved.keys()
    torch.testing.assert_close(ours.merge_and_unload()(x), expected)


def test_dropout_without_places_is_an_error_here_too() -> None:
    (_, ours), _ = both(adapted(dropout=0.3)[0]), None
    with pytest.raises(RuntimeError, match="whose places were not given"):
        ours(torch.randn(3, 4, IN))
    ours.eval()
    assert ours(torch.randn(3, 4, IN)).shape == (3, 4, IN)


@pytest.mark.parametrize("quantized", ["nf4", None])
def test_its_output_may_be_changed_in_place_and_its_input_be_empty(quantized: str | None) -> None:
    """Falcon adds its attention to the MLP's output, OLMo clamps its queries."""
    theirs, ours = both(adapted(quantized)[0])
    results = []
    for model in (theirs, ours):
        layer, x = model.base_model.model.first, torch.ones(*TOKENS, IN, requires_grad=True)
        y = layer(x)
        y += 1.0
        y.clamp_(-0.5, 0.5).sum().backward()
        results.append((y.detach(), x.grad))
        assert layer(torch.ones(0, IN)).shape == (0, OUT) and layer(torch.ones(1, 0, IN)).shape == (1, 0, OUT)
    torch.testing.assert_close(results[1], results[0])
