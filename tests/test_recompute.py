"""Layers computed again: gradients bit for bit, and no product that nobody reads."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from job import lora_sums
from job.attention_out import KERNELS, AttentionOutputs
from job.host_inputs import HostInputs
from job.lora_linear import in_one_step
from job.recompute import recompute_activations, recomputing
from job.row_attention import attend_by_rows
from tests.native_models import seeing

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[Any, int]] = {
    "Llama": (transformers.LlamaConfig(**SMALL), 1),
    "Qwen3": (transformers.Qwen3Config(**SMALL, head_dim=8), 1),
    "Gemma2, a norm behind the MLP": (transformers.Gemma2Config(**SMALL, head_dim=8), 0),
    "Granite, which scales what it adds": (transformers.GraniteConfig(**SMALL), 0),
}
"""A configuration of each kind, and how many products of a layer are not made again."""


def adapted(config: Any) -> Any:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.3)
    in_one_step(model)
    return model.train()


def learnt(model: Any) -> dict[str, Any]:
    """The loss and gradients by name."""
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert len(found) == len(model.get_base_model().model.layers) * 7 * 2 and all(
        value is not None and value.any() for value in found.values()
    )
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_and_what_nobody_reads_is_not_made(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, spared = FAMILIES[family]
    kept = adapted(config)
    again = copy.deepcopy(kept)
    recompute_activations(again)
    made = {False: 0, True: 0}
    plain = lora_sums._fill

    def count(*given: Any) -> None:
        made[recomputing()] += 1
        plain(*given)

    monkeypatch.setattr(lora_sums, "_fill", count)
    expected = learnt(kept)
    assert made == {False: 14, True: 0}
    found = learnt(again)
    assert made == {False: 28, True: 14 - 2 * spared} and not recomputing()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_so_many_layers_are_computed_again_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = adapted(FAMILIES["Llama"][0])
    again = copy.deepcopy(kept)
    recompute_activations(again, layers=1)
    ran = []
    for place, layer in enumerate(again.get_base_model().model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, place=place: ran.append((place, recomputing())))
    expected, found = learnt(kept), learnt(again)
    assert ran == [(0, False), (1, False), (0, True)]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_evaluation_between_is_no_recomputation() -> None:
    model = adapted(FAMILIES["Llama"][0])
    expected = model(input_ids=torch.arange(8)[None]).logits
    recompute_activations(model)
    learnt(model)
    with torch.no_grad():
        found = model.eval()(input_ids=torch.arange(8)[None]).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_that_were_on_the_host_give_the_same_gradients(family: str) -> None:
    kept = adapted(FAMILIES[family][0])
    away, leaving = copy.deepcopy(kept), []

    def leaves(tensor: torch.Tensor) -> bool:
        leaving.append(tuple(tensor.shape))
        return True

    on_host = HostInputs(leaves)
    recompute_activations(away, on_host)
    expected = learnt(kept)
    for _ in range(2):
        found = learnt(away)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        away.zero_grad()
    assert leaving == [(2, 9, 32)] * 2 * 2, "something else than each layer's input went"
    assert len(on_host.free) == 2, "buffers were made anew, or are not free"


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often a kernel of attention runs."""

    ran = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran += func in KERNELS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [None, 1])
def test_what_attention_gave_comes_back_from_the_host_and_is_not_computed_again(layers: int | None) -> None:
    kept = adapted(transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 3}))
    away, on_host, again = copy.deepcopy(kept), HostInputs(lambda tensor: True), layers or 3
    rows = attend_by_rows(away)
    assert rows is not None
    rows.outputs = AttentionOutputs(on_host)
    recompute_activations(away, on_host, layers)
    expected = learnt(kept)
    for _ in range(2):
        rows.move(np.tile(np.arange(9), (2, 1)), "cpu")
        with Counted() as counted:  # type: ignore[no-untyped-call]
            found = learnt(away)
        assert counted.ran == 3, "attention ran again"
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        away.zero_grad()
    assert len(on_host.free) == 2 * again
    rows.outputs = None
    with Counted() as counted:  # type: ignore[no-untyped-call]
        learnt(away)
    assert counted.ran == 3 + again


def test_a_layer_that_attends_twice_gets_both_back_in_order() -> None:
    kept = adapted(transformers.DiffLlamaConfig(**SMALL))
    away, on_host = copy.deepcopy(kept), HostInputs(lambda tensor: True)
    rows = attend_by_rows(away)
    assert rows is not None
    rows.outputs = AttentionOutputs(on_host)
    recompute_activations(away, on_host)
    expected = learnt(kept)
    with Counted() as counted:  # type: ignore[no-untyped-call]
        found = learnt(away)
    assert counted.ran == 4
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_so_many_layers_are_the_texts_where_a_model_sees_too(tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(seeing(tmp_path))
    layers = model.model.language_model.layers
    recompute_activations(model, layers=1)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]


def test_buffers_of_two_sizes_are_each_their_own() -> None:
    on_host = HostInputs(lambda tensor: True)
    for _ in range(2):
        held = [on_host.put(torch.zeros(size)) for size in (1024, 2048) * 3]
        assert all(len(on_host.get(one)) for one in reversed(held))
    assert sorted(map(len, on_host.free)) == [4096] * 3 + [8192] * 3


def test_tensors_come_back_as_they_lay_in_memory() -> None:
    on_host = HostInputs(lambda tensor: True)
    values = [torch.randn(2, 3, 4, 5).transpose(1, 2), torch.randn(6)[::2], torch.randn(3, 1, 4)]
    held = [on_host.put(value) for value in values]
    for value, packed in zip(reversed(values), reversed(held), strict=True):
        found = on_host.get(packed)
        assert torch.equal(found, value) and found.stride() == torch.empty_like(value).stride()


def test_buffers_of_the_host_serve_rows_of_all_lengths() -> None:
    on_host = HostInputs(lambda tensor: True)
    for length in (3, 5, 4, 7, 2, 7):
        values = [torch.randn(length, 8, requires_grad=True) * 1.0 for _ in range(3)]
        with on_host.away():
            total = sum((value.exp() * 1.0).sum() for value in values)
        for value in values:
            value.retain_grad()
        total.backward()  # type: ignore[union-attr]
        assert all(torch.equal(value.grad, value.exp()) for value in values)
    assert len(on_host.free) == 3, "every length has buffers of its own"
    assert {len(buffer) for buffer in on_host.free} == {256}


def test_what_is_on_the_host_is_another_memory() -> None:
    on_host = HostInputs(lambda tensor: True)
    x = torch.randn(4, 8, requires_grad=True) * 1.0
    with on_host.away():
        y = (x * x).sum()
    kept = x.detach().clone()
    with torch.no_grad():
        x.zero_()  # torch would refuse a saved tensor that was changed; the copy is not
    y.backward()
    assert torch.equal(on_host.free[0].view(torch.float32)[: 4 * 8].view(4, 8), kept)
