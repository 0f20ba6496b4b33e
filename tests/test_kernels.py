"""Triton's kernels against the formulas in float64 and against torch's chains: on a GPU, or by Triton's interpreter."""

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

ON = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
from job import fp8  # noqa: E402
from job.dropout import kept, threshold  # noqa: E402
from job.kernels import dropout, eight_bits, four_bits, gates, losses, low_rank, norms, rotary  # noqa: E402

EXACT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of the norm of what is expected: how far a few roundings of the type lead."""


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(ON, dtype)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 2, 3, 8), (1, 1, 5000)], ids=str)
def test_a_norm_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy, weight = (some(*size, dtype=dtype, seed=seed) for seed, size in enumerate((shape, shape, shape[-1:])))
    exact = x.double().requires_grad_()
    expected = weight.double() * exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected.backward(dy.double())
    y, roots = norms.norm(x, weight, 1e-3)
    assert exact.grad is not None and y.dtype == dtype and roots.dtype == torch.float32
    assert distance(y, expected.detach()) < EXACT[dtype]
    assert distance(norms.norm_gradient(dy, x, weight, roots), exact.grad) < EXACT[dtype]


def test_a_norm_of_what_does_not_lie_in_order() -> None:
    x, weight = some(4, 6, 8).transpose(0, 1), some(8, seed=1)
    y, roots = norms.norm(x, weight, 1e-5)
    again, _ = norms.norm(x.contiguous(), weight, 1e-5)
    assert torch.equal(y, again)
    slope = some(6, 4, 8, seed=2)
    found = norms.norm_gradient(slope.transpose(0, 1).contiguous().transpose(0, 1), x, weight, roots)
    assert torch.equal(found, norms.norm_gradient(slope, x.contiguous(), weight, roots))


@pytest.mark.parametrize("dtype", EXACT)
def test_a_gate_and_its_gradients(dtype: torch.dtype) -> None:
    gate, up, dy = (some(7, 333, dtype=dtype, seed=seed) * 3 for seed in range(3))
    exact = [one.double().requires_grad_() for one in (gate, up)]
    expected = F.silu(exact[0]) * exact[1]
    expected.backward(dy.double())
    assert exact[0].grad is not None and exact[1].grad is not None
    assert distance(gates.gate_times_up(gate, up), expected.detach()) < EXACT[dtype]
    gates.gradients_in_place(dy, gate, up)
    assert distance(gate, exact[0].grad) < EXACT[dtype] and distance(up, exact[1].grad) < EXACT[dtype]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("heads", "kv_heads", "batches"), [(6, 6, 2), (20, 2, 2), (4, 1, 1)])
def test_a_rotation_and_its_gradient(heads: int, kv_heads: int, batches: int, dtype: torch.dtype) -> None:
    q = some(2, 5, heads, 12, dtype=dtype).transpose(1, 2)
    k = some(2, 5, kv_heads, 12, dtype=dtype, seed=1).transpose(1, 2)
    angle = some(batches, 5, 12, seed=2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    exact = [one.double().requires_grad_() for one in (q, k)]
    expected = apply_rotary_pos_emb(*exact, cos.double(), sin.double())
    found = rotary.rotate(q, k, cos, sin)
    slopes = [some(*one.shape, dtype=dtype, seed=3) for one in (q, k)]
    torch.autograd.backward(expected, [one.double() for one in slopes])
    back = rotary.rotate(slopes[0], slopes[1], cos, sin, back=True)
    for y, dx, truth, source in zip(found, back, expected, exact, strict=True):
        assert source.grad is not None and y.transpose(1, 2).is_contiguous()
        assert distance(y, truth.detach()) < EXACT[dtype] and distance(dx, source.grad) < EXACT[dtype]
    if dtype == torch.float32:
        plain = apply_rotary_pos_emb(q, k, cos, sin)
        assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("vocabulary", [31, 9000])
def test_losses_and_the_gradient_of_logits(vocabulary: int, dtype: torch.dtype) -> None:
    logits = some(9, vocabulary, dtype=dtype) * 4
    logits[3, : vocabulary // 2] = float("-inf")  # the first columns of a model may never be
    targets = torch.randint(vocabulary // 2, vocabulary, (9,), generator=torch.Generator().manual_seed(1)).to(ON)
    targets[2] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none")
    expected.sum().backward()
    before = logits.clone()
    alone = losses.losses_in_place(logits, targets, -100, slopes=False)
    assert torch.equal(logits, before)
    found = losses.losses_in_place(logits, targets, -100, slopes=True)
    assert torch.equal(found, alone) and found[2] == 0 and not logits[2].any()
    assert exact.grad is not None
    assert distance(found, expected.detach()) < 1e-6 and distance(logits, exact.grad) < EXACT[dtype]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["scales in 8 bits", "scales as they are"])
@pytest.mark.parametrize("shape", [(96, 192), (5, 64), (300, 64)], ids=str)
def test_four_bits_are_bitsandbytes_values(shape: tuple[int, int], nested: bool, kind: str) -> None:
    packed, state = bnb.quantize_4bit(some(*shape), compress_statistics=nested, quant_type=kind)
    assert four_bits.readable(state)
    expected = bnb.dequantize_4bit(packed, state)
    assert torch.equal(four_bits.dequantized(packed, state, torch.float32), expected)
    halved = packed.view(-1).view(torch.float16)  # as it is stored for ZeRO-3
    assert distance(four_bits.dequantized(halved, state, torch.bfloat16), expected) < EXACT[torch.bfloat16]


def test_dropout_drops_what_plain_torch_does() -> None:
    x, keys = some(2, 5, 70), torch.randint(-(2**31), 2**31, (80,), generator=torch.Generator().manual_seed(0))
    tokens, features = keys[:10].int().view(2, 5).to(ON), keys[10:].int().to(ON)
    found = dropout.drop_on_gpu(x, tokens, features, threshold(0.3), 1 / 0.7)
    expected: Any = torch.where(kept(tokens, features, 0.3), x * (1 / 0.7), 0)
    assert torch.equal(found, expected) and 0.15 < float((found == 0).float().mean()) < 0.45


CUT = 0.03 if ON == "cuda" else 0.1
"""Of the norm: what rounding to FP8's three bits costs. Triton's interpreter cuts the rest off, a GPU rounds."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 200, 5000])
def test_rows_in_eight_bits(width: int, dtype: torch.dtype) -> None:
    x = some(2 * 7, width, dtype=dtype)[::2] * torch.logspace(-6, 6, 7).to(ON)[:, None]
    x[2] = 0
    x = x.to(dtype)
    small, scales = eight_bits.rows_in_eight_bits(x, 1.0, 1.0)
    assert small.dtype == torch.float8_e4m3fn and scales.shape == (7, 1)
    for row, expected in zip(small.float() * scales, x.float(), strict=True):
        assert (not expected.any() and not row.any()) or distance(row, expected) < CUT
    expected = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-30)
    torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)
    small, wide = eight_bits.rows_in_eight_bits(x, 1.7, 1.25)
    torch.testing.assert_close(wide[x.any(1)], 1.25 * 1.7 * expected[x.any(1)], rtol=1e-6, atol=0)
    assert distance(small[0].float() * wide[0], 1.25 * x[0].float()) < CUT


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["scales in 8 bits", "scales as they are"])
@pytest.mark.parametrize("turned", [False, True], ids=["as it lies", "turned"])
@pytest.mark.parametrize("wider", [1.0, 1.7])
def test_four_bits_become_eight(wider: float, turned: bool, nested: bool, kind: str) -> None:
    weight = some(200, 192) * torch.logspace(-2, 2, 200).to(ON)[:, None]
    packed, state = bnb.quantize_4bit(weight, compress_statistics=nested, quant_type=kind)
    exact = bnb.dequantize_4bit(packed, state)
    exact = exact.T if turned else exact
    scales = fp8._largest(state, turned)
    found, wide = eight_bits.weight_in_eight_bits(packed, state, scales, wider, 1.25, turned)
    assert eight_bits.readable(state) and found.shape == exact.shape and bool((found.float().abs() <= 448).all())
    torch.testing.assert_close(wide, 1.25 * wider * scales, rtol=1e-6, atol=0)
    assert distance(found.float() * wide, 1.25 * exact) < CUT


@pytest.mark.parametrize("wider", [1.0, 1.7])
def test_a_product_with_four_bits_that_became_eight(wider: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "eight_bits", eight_bits, raising=False)
    monkeypatch.setattr(fp8, "_by_kernel", lambda weight, state: eight_bits.readable(state))
    monkeypatch.setattr(fp8, "_has_kernel", lambda x: True)
    given: list[tuple[float, ...]] = []
    weights, rows = eight_bits.weight_in_eight_bits, eight_bits.rows_in_eight_bits
    monkeypatch.setattr(eight_bits, "weight_in_eight_bits", lambda *all_: given.append(all_[3:5]) or weights(*all_))
    monkeypatch.setattr(eight_bits, "rows_in_eight_bits", lambda *all_: given.append(all_[1:]) or rows(*all_))
    packed, state = bnb.quantize_4bit(some(96, 128), compress_statistics=True)
    exact = bnb.dequantize_4bit(packed, state)
    x, dy = some(32, 128, seed=1), some(32, 96, seed=2)
    y, dx = (torch.empty(32, width, dtype=torch.bfloat16, device=ON) for width in (96, 128))
    fp8.forward(fp8.scaled(x), packed, state, y, wider)
    fp8.backward(fp8.scaled(dy), packed, state, dx, wider)
    assert distance(y, x @ exact.T) < 2 * CUT and distance(dx, dy @ exact) < 2 * CUT
    assert given == [(1.0, fp8.MENDED), (wider, fp8.MENDED)] * 2, "rows and weight, forward and backward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_sum_and_a_product_of_low_rank(parts: int, dtype: torch.dtype) -> None:
    given = [some(70, 300, dtype=dtype, seed=seed) for seed in range(parts)]
    left, right = some(70, 45, dtype=dtype)[:, 3:43], some(300, 40, dtype=dtype, seed=5).T
    expected = sum(one.double() for one in given) + 0.7 * (left.double() @ right.double())
    found = low_rank.add_low_rank(given, left, right, 0.7)
    assert found is given[0] and isinstance(expected, torch.Tensor)
    assert distance(found, expected) < EXACT[dtype]
