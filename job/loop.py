"""The training loop and nothing else."""

import math
import time
from collections.abc import Callable, Sequence
from itertools import islice

from job.config import RunConfig
from job.data.batches import GlobalBatch, MicroBatch
from job.data.load import Dataset
from job.engine import Engine, Step
from job.errors import JobError
from job.hardware import peak_memory_gib
from job.plan import Plan
from job.progress import Progress
from job.saving import Saver
from job.sinks import Metrics
from job.world import World

OnRow = Callable[[Metrics], None]
LEFT_OUT = 25
"""Steps in a row whose fp16 gradients overflow: the loss scale starts at 2^16 and is halved at each, so after 16 of
them nothing is scaled any more."""


def run(
    engine: Engine,
    data: Dataset,
    plan: Plan,
    config: RunConfig,
    world: World,
    on_row: OnRow,
    stop: Callable[[], str | None],
    progress: Progress,
    saver: Saver,
) -> None:
    """Train up to step `plan.steps`, from where `progress` stands.

    Args:
        on_row: gets every row of metrics, on every rank equally often.
        stop: asked between steps; a text ends the training there, with no further evaluation.
        progress: kept up to date, so that the caller knows the step whatever happens.
        saver: takes checkpoints between steps.

    Raises:
        JobError: the loss is not finite, for several steps in a row.
    """
    evaluate = _evaluator(engine, data, plan, config, world, on_row)
    if progress.first_eval is None and not stop():
        evaluate(progress)
    every = config.evaluation.every_steps
    left = max(plan.steps - progress.step, 0)
    for batch in islice(data.train.from_step(progress.step, saver.good.cursor), left):
        progress.stopped = _enough(progress, config)
        progress.interrupted = stop()
        if progress.stopped or progress.interrupted:
            break
        begun = time.perf_counter()
        rate = plan.learning_rate(batch.step)
        micro_batches = data.train.share(batch, world.rank, world.world_size, plan.micro_batch_size)
        step = engine.train_step(batch, micro_batches, rate)
        seconds = time.perf_counter() - begun
        why = _watch(step, batch, progress, config.train.max_skipped_steps)
        progress.step = batch.step + 1
        on_row(_row(step, batch, rate, seconds, peak_memory_gib(plan.device)))
        if why:
            saver.rescue(progress)
            raise JobError(why)
        if progress.step == plan.steps or (every and progress.step % every == 0):
            evaluate(progress)
        saver.after_step(progress, batch)
    if progress.evaluated_at != progress.step and not progress.interrupted:
        evaluate(progress)
    if progress.skipped > 1 and not progress.interrupted:
        saver.rescue(progress)
        raise JobError(
            f"loss or gradients of the last {progress.skipped} steps were not finite, and the run ends with them. "
            "Lower train.learning_rate, or look at the rows with `qlora data`"
        )
    progress.adapter = progress.adapter or engine.gather()


def _row(step: Step, batch: GlobalBatch, rate: float, seconds: float, memory_gib: float) -> Metrics:
    return {
        "step": batch.step + 1,
        "epoch": round(batch.epoch, 4),
        "loss": step.loss,
        "learning_rate": rate,
        "grad_norm": step.grad_norm,
        "tokens": batch.tokens,
        "tokens_per_s": round(batch.tokens / seconds, 1),
        "samples_per_s": round(batch.rows / seconds, 3),
        "memory_gib": round(memory_gib, 3),
        **({} if step.applied else {"left_out": 1}),
    }


def _evaluator(
    engine: Engine, data: Dataset, plan: Plan, config: RunConfig, world: World, on_row: OnRow
) -> Callable[[Progress], None]:
    held_out = data.held_out
    if held_out is None:
        return lambda progress: None
    everything = held_out.in_order()
    mine: Sequence[MicroBatch] = held_out.share(
        everything, world.rank, world.world_size, config.evaluation.micro_batch_size
    )

    def evaluate(progress: Progress) -> None:
        loss = engine.evaluate(everything, mine)
        if not math.isfinite(loss):
            cure = "Lower train.learning_rate" if progress.step else "Nothing is trained yet: use bf16 or fp32"
            raise JobError(f"the evaluation loss after step {progress.step} is {loss}. {cure}")
        on_row({"step": progress.step, "eval_loss": loss})
        progress.first_eval = loss if progress.first_eval is None else progress.first_eval
        progress.last_eval, progress.evaluated_at = loss, progress.step
        better = loss < progress.best_eval
        progress.worse = 0 if better else progress.worse + 1
        progress.best_eval = min(loss, progress.best_eval)
        lowest = progress.kept_eval is None or loss < progress.kept_eval
        if lowest and config.evaluation.keep_best and progress.step:
            progress.adapter, progress.kept_eval = engine.gather(), loss

    return evaluate


def _enough(progress: Progress, config: RunConfig) -> str | None:
    patience = config.evaluation.patience
    if patience and progress.worse >= patience:
        return f"early: {patience} evaluations without a lower loss than {progress.best_eval:.4f}"
    return None


def _watch(step: Step, batch: GlobalBatch, progress: Progress, most: int) -> str | None:
    """Count steps that were left out; why to go on no longer when nothing is learnt, from the first step on or any
    more.

    Raises:
        JobError: what was learnt is spoilt.
    """
    number = batch.step + 1
    finite = math.isfinite(step.loss)
    if step.applied and not finite:
        raise JobError(f"the loss of step {number} is {step.loss}. Lower train.learning_rate, or use bf16 or fp32")
    if number == 1 and step.applied and batch.learnt and not 0 < step.grad_norm < math.inf:
        raise JobError(
            f"the gradients of the adapter have the norm {step.grad_norm} in the first step: nothing reaches it. "
            "Choose other lora.targets, or report this architecture"
        )
    overflows = not step.applied and step.scaled and finite
    progress.left_out = progress.left_out + 1 if overflows else 0
    progress.skipped = 0 if step.applied or overflows else progress.skipped + 1
    progress.skipped_in_all += not (step.applied or overflows)
    if progress.left_out == LEFT_OUT:
        return (
            f"the gradients of {LEFT_OUT} steps in a row overflowed in fp16, the last of them step {number}. "
            "Use bf16 or fp32, or lower train.learning_rate"
        )
    if progress.skipped == most:
        return (
            f"loss or gradients of {most} steps in a row were not finite, the last of them step {number} with the loss "
            f"{step.loss}; all were left out. Lower train.learning_rate, or look at the rows with `qlora data`"
        )
    return None
