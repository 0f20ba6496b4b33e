"""Stage 3 with gradients as one tensor: DeepSpeed's numbers, over two ranks, and its own way where ours does not go."""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from job.stage3 import shard_at_once
from tests.test_layer_gathers import everywhere, ranks

__all__ = ["ranks"]
THEIRS = ("_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", "partition_grads", "_unflatten_partitioned_parameters")


class Model(nn.Module):
    """Linears, of which one is used by another one's name; `odd` has a parameter that two ranks cannot share evenly."""

    def __init__(self, odd: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
        self.odd = nn.Parameter(torch.ones(5 if odd else 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x @ self.layers[0].weight * self.odd.sum()


def engine(ours: bool, odd: bool = False, accumulated: int = 1, bucket: int = 1000, **changed: Any) -> Any:
    torch.manual_seed(0)
    model = Model(odd).to(torch.float32 if changed.get("wide") else torch.bfloat16)
    zero = {"stage": 3, "reduce_bucket_size": bucket, "stage3_param_persistence_threshold": 0}
    zero["contiguous_gradients"] = changed.get("contiguous", not ours)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": changed.get("clipping", 0.5),
        "bf16": {"enabled": not changed.get("wide")},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    made, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config=config)
    if ours:
        shard_at_once(made)
    return made


def stepped(made: Any, micro_batches: int, factor: float = 1.0) -> None:
    for _ in range(micro_batches):
        seed = 10 * made.micro_steps + torch.distributed.get_rank()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(made.module.odd.dtype)
        made.backward((made(x).float() ** 2).sum() * factor)
        made.step()


def _own(parameter: Any) -> slice:
    """This rank's part, without what fills it up."""
    part, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    return slice(part * rank, part * (rank + 1))


def watched() -> list[str]:
    """From now on, which of DeepSpeed's own ways were gone."""
    found: list[str] = []
    for name in THEIRS:
        original: Callable[..., Any] = getattr(DeepSpeedZeroOptimizer_Stage3, name)
        seen = lambda *given, name=name, original=original: (found.append(name), original(*given))[1]  # noqa: E731
        setattr(DeepSpeedZeroOptimizer_Stage3, name, seen)
    return found


def same(accumulated: int, bucket: int, odd: bool, changed: dict[str, Any]) -> None:
    theirs = engine(False, odd, accumulated, bucket, **changed | {"contiguous": True})
    ours = engine(True, odd, accumulated, bucket, **changed)
    kept = [getattr(DeepSpeedZeroOptimizer_Stage3, name) for name in THEIRS]
    for step in range(4):
        stepped(theirs, accumulated)
        gone = watched()
        try:
            stepped(ours, accumulated)
        finally:
            for name, original in zip(THEIRS, kept, strict=True):
                setattr(DeepSpeedZeroOptimizer_Stage3, name, original)
        assert ours.was_step_applied()
        assert float(ours.get_global_grad_norm()) == pytest.approx(float(theirs.get_global_grad_norm()), rel=1e-6)
        for one, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
            found, expected = (deepspeed.utils.safe_get_full_fp32_param(value) for value in (one, other))
            # norms are summed up in another order, which shows in what is clipped by them
            clips = "clipping" not in changed
            torch.testing.assert_close(found, expected, rtol=1e-6 * clips, atol=1e-6 * clips)
            expected = found.view(-1)[_own(one)].to(one.dtype)
            torch.testing.assert_close(one.ds_tensor[: expected.numel()], expected, rtol=0, atol=0)
            assert one.ds_tensor.any()
        # once, to find the parts where they are from then on
        assert gone == [THEIRS[2]] * (step == 0)
        assert not any(module._parameters._in_forward for module in ours.module.modules())


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize(
    ("bucket", "odd", "changed"),
    [
        (1000, False, {}),
        (1000, False, {"clipping": 1e9}),
        (130, False, {}),
        (60, False, {"clipping": 1e9}),
        (130, True, {}),
        (1000, True, {"clipping": 1e9}),
        (1000, False, {"contiguous": True}),
        (60, True, {"contiguous": True}),
        (1000, True, {"wide": True}),
    ],
    ids=str,
)
def test_steps_are_deepspeeds(
    ranks: list[Executor], accumulated: int, bucket: int, odd: bool, changed: dict[str, Any]
) -> None:
    everywhere(ranks, same, accumulated, bucket, odd, changed)


def left_out(factor: float) -> None:
    made = engine(ours=True)
    stepped(made, 1)
    before = [value.ds_tensor.clone() for value in made.module.parameters()]
    stepped(made, 1, factor)
    assert not made.was_step_applied()
    assert all(torch.equal(one, value.ds_tensor) for one, value in zip(before, made.module.parameters(), strict=True))
    stepped(made, 1)
    assert made.was_step_applied()


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_are_left_out(ranks: list[Executor], factor: float) -> None:
    everywhere(ranks, left_out, factor)


def marked() -> None:
    made = engine(ours=True)
    seen: list[set[bool]] = []
    marks = lambda: {module._parameters._in_forward for module in made.module.modules()}  # noqa: E731
    made.module.layers[2].register_forward_pre_hook(lambda *_: seen.append(marks()))
    for _ in range(3):
        stepped(made, 1)
        seen.append(marks())
    assert seen == [{True}, {False}] * 3


def test_modules_are_told_of_every_forward_pass(ranks: list[Executor]) -> None:
    """By this DeepSpeed finds parameters that another module uses."""
    everywhere(ranks, marked)
