"""Linears with the same input together: the values of each alone, and one place for the input's gradient."""

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from job import fp8, linear
from job.dropout import Places, RowDropout
from job.forward_code import called_alike
from job.linear import FrozenLinear4bit
from job.lora_linear import in_one_step
from tests.test_lora_linear import four_bit

WIDTH, RANK, TOKENS = 64, 4, (2, 7)


class Attention(nn.Module):
    """Three linears that get the same, and one that gets another."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.changes = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        if self.changes:
            x.mul_(2.0)
        mixed = torch.tanh(q) * torch.cat([self.k(x), self.v(x)], -1)
        return self.o(mixed)  # type: ignore[no-any-return]


class Chain(nn.Module):
    """Two linears that are given the same name, but not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.last(torch.tanh(x))
        return x * 1.0


def both(kind: Any = Attention, quantized: bool = False, dropout: float = 0.0, targets: str = "qkvo") -> Any:
    """peft's model, and the same in one step."""
    torch.manual_seed(0)
    base = kind().requires_grad_(False)
    if quantized:
        for name, linear in list(base.named_children()):
            setattr(base, name, four_bit(linear, "nf4"))
    base.is_loaded_in_4bit = quantized
    names = list(targets) if kind is Attention else ["first", "last"]
    config = peft.LoraConfig(r=RANK, lora_alpha=6, lora_dropout=dropout, target_modules=names)
    model, places = peft.get_peft_model(base, config), Places(3)
    places.move(4, np.arange(2)[:, None].repeat(7, 1), np.arange(7)[None].repeat(2, 0), "cpu")
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            nn.init.normal_(module.lora_B["default"].weight, std=0.3)
            if dropout:
                module.lora_dropout["default"] = RowDropout(dropout, name, places)
    ours = copy.deepcopy(model)
    in_one_step(ours)
    return model, ours


def learnt(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    x = x.clone().requires_grad_()
    y = model(x * 1.0)
    (y**2).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert x.grad is not None and all(value is not None for value in found.values())
    return {"y": y.detach(), "x": x.grad, **found}


def calls(model: Any, x: torch.Tensor) -> list[int]:
    """How many outputs each product makes that the output comes from."""
    seen, found, open_nodes = set(), [], [model(x).grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Sums" in type(node).__name__:
            found.append(len(node.layers))
        open_nodes += [following for following, _ in node.next_functions]
    return sorted(found)


@pytest.mark.parametrize("quantized", [False, True], ids=["whole", "4 bits"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_values_and_gradients_are_those_of_each_alone(quantized: bool, dropout: float) -> None:
    theirs, ours = both(quantized=quantized, dropout=dropout)
    x = torch.randn(*TOKENS, WIDTH)
    expected, found = learnt(theirs, x), learnt(ours, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < 1e-5, name
    assert calls(ours, x) == [1, 3]


def test_only_those_that_have_an_adapter_are_together() -> None:
    theirs, ours = both(targets="qvo")
    x = torch.randn(*TOKENS, WIDTH)
    assert calls(ours, x) == [1, 2]
    torch.testing.assert_close(learnt(ours, x)["x"], learnt(theirs, x)["x"])


def test_those_whose_adapter_is_more_than_plain_go_alone() -> None:
    theirs, ours = both()
    for model in (theirs, ours):
        model.base_model.model.k.merge()
    x = torch.randn(*TOKENS, WIDTH)
    assert calls(ours, x) == [1, 2]
    torch.testing.assert_close(ours(x), theirs(x))


def test_an_input_that_was_changed_in_between_is_computed_with_anew() -> None:
    theirs, ours = both()
    for model in (theirs, ours):
        model.base_model.model.changes = True
    x = torch.randn(*TOKENS, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))


def test_nothing_waits_when_all_were_asked_and_another_input_is_never_mistaken() -> None:
    _, ours = both()
    attention, x = ours.base_model.model, torch.randn(*TOKENS, WIDTH)
    ours(x)
    together = attention.q.together
    assert together is attention.k.together and together.x is None and not together.made
    attention.q(x)
    assert len(together.made) == 2
    other = attention.k(2 * x)
    torch.testing.assert_close(other, attention.k.base_layer(2 * x) + _low(attention.k, 2 * x))


def _low(lora: Any, x: torch.Tensor) -> Any:
    return lora.lora_B["default"](lora.lora_A["default"](x)) * lora.scaling["default"]


def test_names_that_are_set_in_between_are_not_the_same_input() -> None:
    assert called_alike(Chain) == [] and sorted(called_alike(Attention)[0]) == ["k", "q", "v"]
    theirs, ours = both(Chain)
    x = torch.randn(*TOKENS, WIDTH)
    assert calls(ours, x) == [1, 1]
    torch.testing.assert_close(ours(x), theirs(x))


def test_values_of_4_bits_are_made_once_and_kept_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, _ = both(quantized=True)
    always, once = copy.deepcopy(theirs), copy.deepcopy(theirs)
    in_one_step(always)
    in_one_step(once, values_kept=True)
    made = []
    plain = linear.dequantized_anew
    monkeypatch.setattr(linear, "dequantized_anew", lambda *given: made.append(given[2]) or plain(*given))
    x = torch.randn(*TOKENS, WIDTH)
    expected = learnt(always, x)
    assert len(made) == 8, "four products forward and four back"
    for _ in range(2):
        once.zero_grad()
        found = learnt(once, x)
        assert len(made) == 8 + 4
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_values_in_8_bits_are_kept_in_8_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = both(quantized=True)
    in_one_step(plain)
    small, kept, places = copy.deepcopy(plain.bfloat16()), plain.bfloat16(), Places(0)
    for model in (small, kept):
        for module in model.modules():
            if isinstance(module, FrozenLinear4bit):
                module.compute_dtype = torch.bfloat16
                module.weight.quant_state.dtype = torch.bfloat16
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.in_fp8 = places
    for module in kept.modules():
        if isinstance(module, FrozenLinear4bit):
            linear.keep_values(module.weight.quant_state)
    made: list[Any] = []
    plainly = fp8.dequantized_anew
    monkeypatch.setattr(fp8, "dequantized_anew", lambda *given: made.append(places.step) or plainly(*given))
    x, outputs = torch.randn(2, 8, WIDTH).bfloat16(), []
    for step in (3, 3, 4):
        places.step = step
        expected, count = learnt(small, x), len(made)
        found = learnt(kept, x)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        assert len(made) - count == (0 if step == 3 and outputs else 8), "four products forward and four back"
        outputs.append(found["y"])
        small.zero_grad()
        kept.zero_grad()
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    states = [one.weight.quant_state for one in kept.modules() if isinstance(one, FrozenLinear4bit)]
    held = [numbers for state in states for _, (numbers, _) in state.kept_values.values()]
    assert len(held) == 8 and all(numbers.dtype == torch.float8_e4m3fn for numbers in held)
