"""Output layer and loss together: the value and the gradients of logits and cross entropy."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from job import loss_head
from job.loss_head import LossHead

HIDDEN, VOCABULARY, IGNORED = 16, 50, -100


def head_of(bias: bool = False, dtype: torch.dtype = torch.float32) -> LossHead:
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
    head = LossHead.of(SimpleNamespace(get_output_embeddings=lambda: linear))
    assert head is linear
    return head


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    maker = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 7, HIDDEN, generator=maker).mul(2).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (3, 7), generator=maker)
    targets[0, :5], targets[2, 6] = IGNORED, IGNORED
    return hidden, targets


def reference(head: LossHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden).float() if hidden.dtype != torch.float64 else head(hidden)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def chunked(head: LossHead, hidden: torch.Tensor, targets: torch.Tensor) -> Any:
    assert not head.took_loss
    with head.told(targets, IGNORED):
        assert head.took_loss, "under ZeRO-3 its weight goes before the backward pass"
        return head(hidden)


@pytest.mark.parametrize("rows", [1, 4, 7, 21, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_those_of_cross_entropy(monkeypatch: pytest.MonkeyPatch, rows: int, bias: bool) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", rows * VOCABULARY + 3)
    head, (hidden, targets) = head_of(bias), inputs()
    found, expected = chunked(head, hidden, targets), reference(head, hidden, targets)
    assert found.shape == (1, 1, 1) and found.dtype == torch.float32
    torch.testing.assert_close(found.squeeze(), expected, rtol=1e-6, atol=0)
    (one,) = torch.autograd.grad(0.25 * found.sum(), hidden)
    (other,) = torch.autograd.grad(0.25 * expected, hidden)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", 4 * VOCABULARY)
    head, (hidden, targets) = head_of(), inputs()
    (found,) = torch.autograd.grad(chunked(head, hidden, targets).sum(), hidden)
    double = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(head.double(), double, targets), double)  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_in_bf16_it_is_as_exact_as_whole_logits() -> None:
    head, (hidden, targets) = head_of(dtype=torch.bfloat16), inputs(torch.bfloat16)
    found, expected = chunked(head, hidden, targets), reference(head, hidden, targets)
    torch.testing.assert_close(found.squeeze(), expected, rtol=1e-6, atol=0)
    (one,) = torch.autograd.grad(found.sum(), hidden)
    (other,) = torch.autograd.grad(expected, hidden)
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


def test_nothing_learnt_is_no_loss_and_no_gradient() -> None:
    head, (hidden, targets) = head_of(), inputs()
    loss = chunked(head, hidden, torch.full_like(targets, IGNORED))
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    assert float(loss) == 0 and not gradient.any()


def test_what_is_not_learnt_may_be_anything() -> None:
    head, (hidden, targets) = head_of(), inputs()
    expected = reference(head, hidden, targets)
    spoilt = hidden.detach().clone()
    spoilt[targets == IGNORED] = torch.nan
    spoilt.requires_grad_()
    loss = chunked(head, spoilt, targets)
    torch.testing.assert_close(loss.squeeze(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), spoilt)
    assert gradient[targets != IGNORED].isfinite().all()


def test_values_beyond_fp16_overflow_nothing() -> None:
    head, (hidden, targets) = head_of(), inputs()
    found = chunked(head, 1e4 * hidden.detach(), targets)
    torch.testing.assert_close(found.squeeze(), reference(head, 1e4 * hidden.detach(), targets), rtol=1e-6, atol=0)


def test_afterwards_and_without_targets_it_gives_logits() -> None:
    head, (hidden, targets) = head_of(), inputs()
    logits = head(hidden)
    chunked(head, hidden, targets)
    assert torch.equal(head(hidden), logits) and logits.shape == (3, 7, VOCABULARY)
    with pytest.raises(RuntimeError), head.told(targets, IGNORED):
        raise RuntimeError
    assert torch.equal(head(hidden), logits)


def biased() -> nn.Linear:
    """Frozen but for its bias, as lora.bias all leaves it."""
    layer = nn.Linear(4, 5).requires_grad_(False)
    layer.bias.requires_grad_()
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 5),
        nn.Sequential(nn.Linear(4, 5)).requires_grad_(False),
        None,
        biased(),
        nn.Linear(4, 5, dtype=torch.float16).requires_grad_(False),
    ],
    ids=["trained", "more than a linear", "none", "a bias is trained", "fp16"],
)
def test_other_output_layers_are_left_alone(layer: nn.Module | None) -> None:
    assert LossHead.of(SimpleNamespace(get_output_embeddings=lambda: layer)) is None
    assert LossHead.of(SimpleNamespace()) is None
    assert type(layer) in (nn.Linear, nn.Sequential, type(None))


def test_logits_of_all_positions_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", 2 * VOCABULARY)
    head, (hidden, targets) = head_of(), inputs()
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            seen.extend(
                one.numel() for one in (result if isinstance(result, tuple) else [result]) if hasattr(one, "numel")
            )
            return result

    with Watch():
        chunked(head, hidden, targets).sum().backward()
    assert 2 * VOCABULARY in seen and max(seen) <= max(head.weight.numel(), hidden.numel())


def test_a_chunks_logits_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", 2 * VOCABULARY)
    head, (hidden, targets) = head_of(), inputs()
    made: list[weakref.ref[torch.Tensor]] = []
    linear = F.linear

    def watched(*given: Any) -> torch.Tensor:
        assert all(one() is None for one in made)
        logits = linear(*given)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(F, "linear", watched)
    chunked(head, hidden, targets)
    assert len(made) == -(-hidden.shape[0] * hidden.shape[1] // 2)
