"""The loop's own decisions, with an engine that says what a test wants it to have seen."""

import math
from collections.abc import Iterator, Mapping, Sequence
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
from job.progress import Progress
from job.saving import Point, Saver
from job.world import Hardware, World
from tests.test_config import LEAST

GOOD = Step(loss=2.0, grad_norm=1.0, applied=True)
OVERFLOW = Step(loss=2.0, grad_norm=math.inf, applied=False, scaled=True)
NOT_FINITE = Step(loss=math.nan, grad_norm=math.nan, applied=False)
NO_GRADIENTS = Step(loss=2.0, grad_norm=math.nan, applied=False)
NOT_FINITE_IN_FP16 = Step(loss=math.nan, grad_norm=math.nan, applied=False, scaled=True)


class Scripted:
    """An engine whose steps are as scripted, then always good; the evaluation loss is the number of evaluations."""

    def __init__(self, script: Sequence[Step]):
        self.script, self.evaluated = iter(script), 0

    def train_step(self, batch: GlobalBatch, micro_batches: Any, rate: float) -> Step:
        return next(self.script, GOOD)

    def evaluate(self, batch: Any, micro_batches: Any) -> float:
        self.evaluated += 1
        return float(self.evaluated)

    def gather(self) -> dict[str, Any]:
        return {}


class Endless:
    """Batches without rows, which remember from where they were asked for."""

    def __init__(self) -> None:
        self.asked: tuple[int, Mapping[str, Any]] | None = None

    def from_step(self, step: int, cursor: Mapping[str, Any]) -> Iterator[GlobalBatch]:
        self.asked = step, cursor
        while True:
            yield GlobalBatch(step, 0.0, [], learnt=1, tokens=1, rows=1, cursor={"place": 10 * step + 10})
            step += 1

    def in_order(self) -> None:
        return None

    def share(self, *arguments: Any) -> list[Any]:
        return []


class Saved:
    """A saver that remembers how it was called: ("after", step, cursor of the batch) or ("rescue", step)."""

    def __init__(self, cursor: Mapping[str, Any] | None = None) -> None:
        self.good = Point({"step": 0}, cursor or {}, None)
        self.calls: list[tuple[Any, ...]] = []

    def after_step(self, progress: Progress, batch: GlobalBatch) -> None:
        self.calls.append(("after", progress.step, batch.cursor["place"]))

    def rescue(self, progress: Progress) -> None:
        self.calls.append(("rescue", progress.step))


class Run:
    """A run of the loop, with all that it told others."""

    def __init__(self, script: Sequence[Step], progress: Progress | None = None, cursor: dict[str, Any] | None = None):
        self.engine, self.train, self.saver = Scripted(script), Endless(), Saved(cursor)
        self.progress = progress or Progress()
        self.rows: list[Any] = []

    def go(self, steps: int, *overrides: str, held_out: bool = False) -> list[dict[str, float]]:
        """Up to step `steps`; the rows of the steps."""
        config = parse_config(LEAST, overrides)
        plan = make_plan(config, World(), Hardware("cpu", "CPU", True, 8)).with_steps(steps)
        data = cast(Dataset, SimpleNamespace(train=self.train, held_out=Endless() if held_out else None))
        engine, saver = cast(Engine, self.engine), cast(Saver, self.saver)
        loop.run(engine, data, plan, config, World(), self.rows.append, lambda: None, self.progress, saver)
        return [row for row in self.rows if "loss" in row]


def left_out(rows: Sequence[Mapping[str, float]]) -> list[float]:
    return [row.get("left_out", 0) for row in rows]


@pytest.mark.parametrize("fault", [OVERFLOW, NOT_FINITE, NO_GRADIENTS, NOT_FINITE_IN_FP16], ids=repr)
def test_a_step_that_was_left_out_is_marked_in_the_metrics_and_the_run_goes_on(fault: Step) -> None:
    rows = Run([fault, GOOD, fault]).go(4)
    assert left_out(rows) == [1, 0, 1, 0]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_run_whose_every_step_is_left_out_fails_with_the_cure() -> None:
    message = r"the gradients of 25 steps in a row overflowed in fp16, the last of them step 27\. Use bf16 or fp32"
    run = Run([GOOD, GOOD, *[OVERFLOW] * 30])
    with pytest.raises(JobError, match=message):
        run.go(100)
    assert len(run.rows) == 27 and run.saver.calls[-1] == ("rescue", 27)
    assert len(Run([*[OVERFLOW] * 24, GOOD] * 2).go(60)) == 60


def test_overflows_of_fp16_are_no_faults_of_the_run_unless_they_stay() -> None:
    run = Run([OVERFLOW] * 16)
    run.go(16, "train.max_skipped_steps=1")
    assert (run.progress.skipped, run.progress.skipped_in_all) == (0, 0)
    assert run.progress.left_out == 16


@pytest.mark.parametrize("fault", [NOT_FINITE, NO_GRADIENTS, NOT_FINITE_IN_FP16], ids=repr)
def test_so_many_steps_in_a_row_that_are_not_finite_fail_the_run_after_a_checkpoint_from_before_them(
    fault: Step,
) -> None:
    run = Run([GOOD, GOOD, *[fault] * 30])
    with pytest.raises(JobError) as raised:
        run.go(100)
    assert str(raised.value) == (
        "loss or gradients of 10 steps in a row were not finite, the last of them step 12 with the loss "
        f"{fault.loss}; all were left out. Lower train.learning_rate, or look at the rows with `qlora data`"
    )
    assert run.progress.step == len(run.rows) == 12 and sum(left_out(run.rows)) == 10
    assert run.saver.calls == [*(("after", step, 10 * step) for step in range(1, 12)), ("rescue", 12)]


def test_max_skipped_steps_is_how_many_in_a_row_a_run_bears() -> None:
    script = [GOOD, *[NOT_FINITE] * 3, GOOD, *[NOT_FINITE] * 3, GOOD]
    run = Run(script)
    assert left_out(run.go(9, "train.max_skipped_steps=4")) == [0, 1, 1, 1, 0, 1, 1, 1, 0]
    assert run.progress.skipped_in_all == 6 and ("rescue", 4) not in run.saver.calls
    failing = Run(script)
    with pytest.raises(
        JobError, match="loss or gradients of 3 steps in a row were not finite, the last of them step 4"
    ):
        failing.go(9, "train.max_skipped_steps=3")
    assert len(failing.rows) == 4


def test_steps_before_a_checkpoint_count_among_those_in_a_row() -> None:
    continued = Progress(step=5, skipped=2)
    with pytest.raises(JobError, match="of 3 steps in a row were not finite, the last of them step 6"):
        Run([NOT_FINITE], continued).go(9, "train.max_skipped_steps=3")


def test_a_run_may_end_with_one_step_that_is_not_finite_but_not_with_two() -> None:
    assert left_out(Run([GOOD, GOOD, NOT_FINITE]).go(3)) == [0, 0, 1]
    run = Run([GOOD, NOT_FINITE, NOT_FINITE])
    with pytest.raises(JobError, match="the last 2 steps were not finite, and the run ends with them"):
        run.go(3)
    assert len(run.rows) == 3


def test_a_loss_that_is_not_finite_and_was_learnt_from_fails_at_once() -> None:
    spoilt = Step(loss=math.inf, grad_norm=1.0, applied=True)
    run = Run([GOOD, spoilt])
    with pytest.raises(JobError, match=r"the loss of step 2 is inf\. Lower train.learning_rate, or use bf16 or fp32"):
        run.go(5)
    assert ("rescue", 2) not in run.saver.calls, "the weights are spoilt: no checkpoint may be made of them"


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_an_adapter_that_no_gradient_reaches_ends_the_run_after_its_first_step(norm: float) -> None:
    with pytest.raises(JobError, match=rf"the gradients of the adapter have the norm {norm} in the first step"):
        Run([Step(2.0, norm, True)]).go(5)
    assert len(Run([GOOD, Step(2.0, norm, True)]).go(5)) == 5, "later steps may have no gradient"


def test_a_continued_run_takes_the_steps_that_are_left_from_where_its_data_stands() -> None:
    run = Run([], Progress(step=3, first_eval=9.0, last_eval=8.0, best_eval=8.0, evaluated_at=3), {"place": 30})
    assert [row["step"] for row in run.go(5, held_out=True)] == [4, 5]
    assert run.train.asked == (3, {"place": 30})
    assert [row["step"] for row in run.rows if "eval_loss" in row] == [5], "no evaluation before the first step again"
    assert run.progress.first_eval == 9.0
    assert run.saver.calls == [("after", 4, 40), ("after", 5, 50)]


def test_a_checkpoint_is_thought_of_after_the_evaluation_of_its_step() -> None:
    run = Run([])
    evaluations: list[int] = []
    run.saver.after_step = lambda progress, batch: evaluations.append(progress.evaluated_at)  # type: ignore[method-assign]
    run.go(4, "evaluation.share=0.5", "evaluation.every_steps=2", held_out=True)
    assert evaluations == [0, 2, 2, 4]
