"""Does it fit? And if not, what is missing and what helps."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Literal

from job.memory import Job, Memory, memory
from job.shape import Shape
from job.zero import Strategy

SPARE = 0.06
"""Share of a device that stays free: torch's allocator holds blocks that it cannot reuse, and the formulas are not
exact (within 4% of one GPU's peaks in bench/RESULTS.md; under ZeRO-3 from 0.2% below them to 6% above)."""


SPARE_FOR_SPEED = 0.15
"""The same where more memory is taken than is needed, in order to be faster."""


@dataclass(frozen=True)
class Choice:
    """A strategy, or None when nothing fits, with the reason in one line and the memory it was judged by."""

    strategy: Strategy | None
    reason: str
    memory: Memory


def fits(memory: Memory, device_gib: float) -> bool:
    """Whether a device of so many GiB holds it and `SPARE` stays free."""
    return memory.total_gib <= device_gib * (1 - SPARE)


def least_recompute(shape: Shape, job: Job, device_gib: float) -> Literal["none", "full"] | int:
    """As few layers to be computed again as a device of so many GiB can do with while `SPARE_FOR_SPEED` stays free."""

    def holds(again: int) -> bool:
        need = memory(shape, replace(job, recompute=again or "none"))
        return need.total_gib <= device_gib * (1 - SPARE_FOR_SPEED)

    fewest = bisect_left(range(shape.layers), True, key=holds)
    return "none" if fewest == 0 else "full" if fewest == shape.layers else fewest


def keeps_values(shape: Shape, job: Job, device_gib: float) -> bool:
    """Whether a device of so many GiB holds the values of the 4-bit base too and `SPARE_FOR_SPEED` stays free."""
    need = memory(shape, replace(job, values_kept=True))
    return need.total_gib <= device_gib * (1 - SPARE_FOR_SPEED)


def choose(shape: Shape, job: Job, device_gib: float) -> Choice:
    """The simplest strategy that fits: replicate, else zero3, which int8 and DoRA do not go with; a base that is to be
    offloaded leaves zero3 alone.

    Args:
        job: what to run; its strategy is not looked at.
        device_gib: memory of one device, GiB.
    """
    candidates: list[Strategy] = ["replicate", "zero3"] if job.ranks > 1 and _shardable(job) else ["replicate"]
    if job.offload_parameters != "none":
        candidates = ["zero3"]
    needs = {strategy: memory(shape, replace(job, strategy=strategy)) for strategy in candidates}
    for strategy, need in needs.items():
        if fits(need, device_gib):
            reason = f"{need.total_gib:.1f} GiB of {device_gib:.1f} GiB a GPU"
            if "replicate" in needs and strategy != "replicate":
                reason += f" (replicate takes {needs['replicate'].total_gib:.1f})"
            return Choice(strategy, reason, need)
    strategy = min(needs, key=lambda name: needs[name].total_gib)
    need, usable = needs[strategy], device_gib * (1 - SPARE)
    reason = (
        f"nothing fits: {strategy} takes {need.total_gib:.1f} GiB of {device_gib:.1f} GiB a GPU, of which "
        f"{SPARE:.0%} stay free: {need.total_gib - usable:.1f} GiB are missing. "
    )
    return Choice(None, reason + _cures(shape, replace(job, strategy=strategy), device_gib), need)


def _cures(shape: Shape, job: Job, device_gib: float) -> str:
    """What to change, in this order, each on top of those before, with what it comes to, until it fits."""
    steps: list[tuple[str, Job]] = []
    if job.recompute != "full":
        job = replace(job, recompute="full")
        steps.append(("train.recompute: full", job))
    away = replace(job, offload_activations=True)
    if memory(shape, away).total_gib < memory(shape, job).total_gib:  # not where the peak is elsewhere
        job = away
        steps.append(("train.offload_activations: true", job))
    if job.micro_batch > 1:
        job = replace(job, micro_batch=1, evaluation_micro_batch=1)
        steps.append(("train.micro_batch_size: 1", job))
    if job.length > 512:
        job = replace(job, length=max(job.length // 2, 512))
        steps.append((f"data.max_length: {job.length}", job))
    if _shardable(job):
        job = replace(job, ranks=2 * job.ranks, strategy="zero3")
        steps.append((f"{job.ranks} GPUs under zero3", job))
        steps.append(("parallel.offload_parameters: cpu", replace(job, offload_parameters="cpu")))
    if not steps:
        return "Take GPUs with more memory"
    said = []
    for cure, then in steps:
        need = memory(shape, then)
        said.append(f"{cure} ({need.total_gib:.1f} GiB)")
        if fits(need, device_gib):
            return f"Set {', then '.join(said)}"
    return f"Even {', then '.join(said)} is not enough: take GPUs with more memory"


def _shardable(job: Job) -> bool:
    return job.quantization != "int8" and not job.dora
