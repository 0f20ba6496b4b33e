"""What ZeRO-3 has whole of a sharded base, before there is one: bytes, moment by moment."""

from typing import Literal

from job.activations import Job, in_chunks
from job.shape import Shape
from job.trained import largest_trained
from job.zero import STAGE

Moment = Literal["taking the loss", "in the backward pass", "in the optimizer's step", "in the evaluation"]
"""Of a run, in each of which other things lie on the GPU."""


def shards(job: Job) -> bool:
    """Whether the base is sharded."""
    return STAGE[job.strategy] == 3


def stored_width(job: Job) -> float:
    """Bytes of a quantized element."""
    return {"nf4": 0.5, "fp4": 0.5, "int8": 1.0, "none": float(job.item)}[job.quantization]


def gathers_layers(shape: Shape, job: Job) -> bool:
    """Whether `job.layer_gathers` takes the layers: DeepSpeed keeps them where an adapter's tensor is cut too."""
    plain = job.strategy == "zero3" and job.offload_parameters == "none" and job.ranks > 1
    return job.layer_gathers and plain and largest_trained(shape, job) <= job.persistence


def whole_bytes(shape: Shape, job: Job) -> float:
    """Frozen weights that ZeRO-3 leaves whole beside their parts: those of at most `job.persistence` stored elements.
    Norms and biases, a few MiB, are left out."""
    width = stored_width(job)
    linears = sum(
        width * linear.numel * linear.count
        for linear in shape.linears
        if (width * linear.numel / job.storage_bytes if width < 1 else linear.numel) <= job.persistence
    )
    return linears + job.item * shape.kept * (shape.largest_kept <= job.persistence)


def gathered_bytes(shape: Shape, job: Job, moment: Moment) -> float:
    """Weights that are whole at once, but for those that stay so.

    In layers that `job.layer_gathers` takes: a layer and the one ahead, in an evaluation the output layer in its place;
    while the loss is taken the output layer alone, unless the backward pass is to read it, and with it the layer that
    it sends for. An output layer that is the embedding too is DeepSpeed's, and where that or a small one is whole the
    last layer does not go. Left to DeepSpeed: as many as may live, what is ahead of use included, at least one layer or
    the largest tensor that is not quantized, at most all.
    """
    width = stored_width(job)
    layer = width * shape.layer_quantized + job.item * (shape.layer - shape.layer_quantized)
    largest = job.item * shape.largest_kept * (shape.largest_kept > job.persistence)
    if not gathers_layers(shape, job):
        limit = job.max_live * (job.storage_bytes if width < 1 else job.item)
        return min(width * shape.quantized + job.item * shape.kept, max(limit, layer, largest))
    ahead = layer if job.gathers_ahead and shape.layers > 1 else 0.0
    if shape.tied or not largest:
        return layer + ahead + largest
    whole: dict[Moment, float] = {
        "taking the loss": largest + (0.0 if in_chunks(shape, job) else ahead),
        "in the backward pass": layer + ahead,
        "in the optimizer's step": 0.0,
        "in the evaluation": layer + max(layer, largest) if job.gathers_ahead else max(layer, largest),
    }
    return whole[moment]
