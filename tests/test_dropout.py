"""Dropout masks: functions of seed, step, row, position, module and feature alone."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from job.config.learning import Model, Quantization
from job.dropout import Places, RowDropout
from job.model import build

ROWS = np.repeat(np.arange(4)[:, None], 32, axis=1)
POSITIONS = np.tile(np.arange(32), (4, 1))


def dropped(name: str = "a", seed: int = 1, step: int = 0, rows: np.ndarray = ROWS, p: float = 0.3) -> torch.Tensor:
    places = Places(seed)
    places.move(step, rows, POSITIONS[: len(rows)], "cpu")
    return RowDropout(p, name, places).train()(torch.ones(*rows.shape, 64))


def test_masks_repeat_for_the_same_place_and_differ_for_any_other() -> None:
    same = dropped()
    assert torch.equal(same, dropped())
    for other in (dropped(name="b"), dropped(seed=2), dropped(step=1), dropped(rows=ROWS + 4)):
        assert not torch.equal(same, other)
    assert not torch.equal(same[0], same[1])
    assert not torch.equal(same[0, 0], same[0, 1])


def test_a_row_keeps_its_mask_wherever_the_micro_batch_cuts() -> None:
    whole = dropped()
    assert torch.equal(torch.cat([dropped(rows=ROWS[:1]), dropped(rows=ROWS[1:3]), dropped(rows=ROWS[3:])]), whole)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_share_of_zeros_is_p_and_the_mean_stays(p: float) -> None:
    rows = np.repeat(np.arange(256)[:, None], 32, axis=1)
    places = Places(3)
    places.move(7, rows, np.tile(np.arange(32), (256, 1)), "cpu")
    first, second = (RowDropout(p, name, places).train()(torch.ones(256, 32, 128)) for name in "ab")
    zeros, n = first == 0, first.numel()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(zeros.float().mean().item() - p) < 5 * sigma
    assert abs(first.mean().item() - 1) < 5 * sigma / (1 - p)
    both = (zeros & (second == 0)).float().mean().item()
    assert abs(both - p * p) < 5 * p / n**0.5  # modules are independent
    neighbours = (zeros[..., 1:] & zeros[..., :-1]).float().mean().item()
    assert abs(neighbours - p * p) < 5 * p / n**0.5  # features are


def test_gradients_pass_where_the_values_did() -> None:
    places = Places(1)
    places.move(0, ROWS, POSITIONS, "cpu")
    x = torch.randn(4, 32, 64, requires_grad=True)
    y = RowDropout(0.3, "a", places).train()(x)
    y.sum().backward()
    assert torch.allclose(x.grad * x.detach(), y.detach())  # type: ignore[operator]


def test_evaluation_changes_nothing_and_unplaced_tokens_are_a_fault() -> None:
    dropout = RowDropout(0.3, "a", Places(1))
    x = torch.ones(2, 3, 4)
    assert dropout.eval()(x) is x
    with pytest.raises(RuntimeError, match=r"tokens \(2, 3\) whose places were not given"):
        dropout.train()(x)


@pytest.mark.parametrize(
    "architecture",
    [
        transformers.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, attn_pdrop=0.4, resid_pdrop=0.4),
        transformers.SeedOssConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=64, residual_dropout=0.4, attention_dropout=0.4,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_frozen_base_drops_nothing_whatever_it_calls_that(architecture: Any) -> None:
    base = (
        build(architecture, Model(name="m"), Quantization(type="none"), "fp32", "fp32").to_empty(device="cpu").train()
    )
    for value in [*base.parameters(), *base.buffers()]:
        if value.is_floating_point():
            torch.nn.init.normal_(value.data, std=0.1)
    ids = torch.arange(16)[None]
    assert torch.equal(base(ids, use_cache=False).logits, base(ids, use_cache=False).logits)
