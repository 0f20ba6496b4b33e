"""An adapter's tensors, counted before there are any."""

from collections.abc import Sequence

from job.activations import Job
from job.families import adapted, fused
from job.shape import Linear, Shape


def trained_elements(
    shape: Shape, rank: int, targets: str | Sequence[str], dora: bool = False, share_a: bool = False
) -> int:
    """Elements of an adapter; targets that are a text are the family's."""
    names = adapted(targets, shape.model_type)
    return sum(trained_tensors(shape, Job(rank=rank, targets=names, dora=dora, share_a=share_a)))


def trained_tensors(shape: Shape, job: Job) -> list[int]:
    """Elements of each trained tensor."""
    there = [linear for linear in shape.linears if job.adapts(linear)]
    later = _with_another_s_a(shape, job)
    pairs = [(_pair(linear, job)[linear.name in later :], linear.count) for linear in there]
    return [numel for pair, count in pairs for numel in pair * count]


def largest_trained(shape: Shape, job: Job) -> int:
    """Elements of the adapter's largest tensor."""
    return max(trained_tensors(shape, job), default=0)


def _with_another_s_a(shape: Shape, job: Job) -> set[str]:
    """Adapted linears whose A is that of the first adapted part of the same fused linear."""
    groups = fused(shape.model_type) if job.share_a else ()
    return {part for parts in groups for part in [part for part in parts if not job.targets or part in job.targets][1:]}


def _pair(linear: Linear, job: Job) -> list[int]:
    return [job.rank * linear.inputs, job.rank * linear.outputs] + [linear.outputs] * job.dora
