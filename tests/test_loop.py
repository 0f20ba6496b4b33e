"""The loop's own decisions, with an engine that says what a test wants it to have seen."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from job import loop
from job.config import parse_config
from job.data.batches import GlobalBatch
from job.data.load import Dataset
from job.engine import Engine, Step
from job.errors import JobError
from job.plan import make_plan
from job.world import Hardware, World
from tests.test_config import LEAST


class Scripted:
    """An engine whose steps were applied or not as scripted, then always."""

    def __init__(self, applied: list[bool], grad_norm: float):
        self.applied, self.grad_norm = iter(applied), grad_norm

    def train_step(self, batch: GlobalBatch, micro_batches: Any, rate: float) -> Step:
        return Step(loss=2.0, grad_norm=self.grad_norm, applied=next(self.applied, True))

    def gather(self) -> dict[str, Any]:
        return {}


class Endless:
    """Batches without rows."""

    def from_step(self, step: int) -> Iterator[GlobalBatch]:
        while True:
            yield GlobalBatch(step, 0.0, [], learnt=1, tokens=1, rows=1)
            step += 1

    def share(self, *arguments: Any) -> list[Any]:
        return []


def go(applied: list[bool], steps: int, grad_norm: float = 1.0) -> list[dict[str, float]]:
    config = parse_config(LEAST)
    plan = make_plan(config, World(), Hardware("cpu", "CPU", True, 8)).with_steps(steps)
    data = cast(Dataset, SimpleNamespace(train=Endless(), held_out=None))
    rows: list[Any] = []
    engine = cast(Engine, Scripted(applied, grad_norm))
    loop.run(engine, data, plan, config, World(), rows.append, lambda: None, loop.Progress())
    return rows


def test_a_step_that_fp16_left_out_is_marked_in_the_metrics() -> None:
    rows = go([False, True, False], 4)
    assert [row.get("left_out", 0) for row in rows] == [1, 0, 1, 0]


def test_a_run_whose_every_step_is_left_out_fails_with_the_cure() -> None:
    message = r"the gradients of 25 steps in a row overflowed in fp16, the last of them step 27\. Use bf16 or fp32"
    with pytest.raises(JobError, match=message):
        go([True, True, *[False] * 30], 100)
    assert len(go([*[False] * 24, True] * 2, 60)) == 60


@pytest.mark.parametrize("norm", [0.0, float("inf"), float("nan")])
def test_an_adapter_that_no_gradient_reaches_ends_the_run_after_its_first_step(norm: float) -> None:
    with pytest.raises(JobError, match=rf"the gradients of the adapter have the norm {norm} in the first step"):
        go([], 5, norm)
