"""What DeepSpeed's optimizer does for each parameter, done for all: the same numbers."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from job.all_at_once import step_all_at_once
from tests.ranks import free_port


@pytest.fixture(scope="module")
def alone() -> Iterator[Executor]:
    """A process of its own, in which DeepSpeed is one rank: it never forgets its process group."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (names,)) as process:
        yield process


def _begin(names: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")


def engine(ours: bool, contiguous: bool = False) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5))).bfloat16()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1, "contiguous_gradients": contiguous, "overlap_comm": True},
    }
    made, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config=config)
    if ours:
        step_all_at_once(made.optimizer)
    return made


def stepped(made: Any, factor: float = 1.0) -> tuple[float, bool, list[torch.Tensor]]:
    """The norm of a step's gradients, whether it was applied, and the weights after it."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    made.backward((made(x).float() ** 2).sum() * factor)
    made.step()
    weights = [value.detach().clone() for value in made.module.parameters()]
    return float(made.get_global_grad_norm()), bool(made.was_step_applied()), weights


def same(contiguous: bool) -> None:
    theirs, ours = engine(ours=False, contiguous=True), engine(ours=True, contiguous=contiguous)
    for _ in range(4):
        expected, found = stepped(theirs), stepped(ours)
        assert found[0] == pytest.approx(expected[0], rel=1e-6) and found[0] > 0
        assert found[1] and all(torch.equal(one, other) for one, other in zip(found[2], expected[2], strict=True))


@pytest.mark.parametrize("contiguous", [False, True])
def test_norms_and_steps_are_deepspeeds(alone: Executor, contiguous: bool) -> None:
    alone.submit(same, contiguous).result()


def left_out(factor: float) -> None:
    made = engine(ours=True)
    _, _, before = stepped(made)
    _, applied, after = stepped(made, factor)
    assert not applied and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert stepped(made)[1]


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_are_left_out(alone: Executor, factor: float) -> None:
    alone.submit(left_out, factor).result()


def back() -> None:
    made = engine(ours=True)
    stepped(made)
    moved = next(iter(made.module.parameters()))
    moved.data = moved.data.clone()
    _, _, weights = stepped(made)
    flat = made.optimizer.bit16_groups_flat[0]
    assert moved.data_ptr() == flat.data_ptr() and torch.equal(flat[: moved.numel()].view_as(moved), weights[0])


def test_parameters_put_elsewhere_come_back_to_the_copy_that_is_stepped(alone: Executor) -> None:
    alone.submit(back).result()
