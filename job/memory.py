"""Memory of one rank, item by item, before anything is loaded.

Some things are held all the time, others only at a moment of the step: while the loss is taken, in the backward pass,
in the optimizer's step, in an evaluation. The peak is what is held plus the largest moment.
"""

import math
from dataclasses import dataclass

from job.activations import (
    CHUNK,
    Job,
    in_chunks,
    kept_bytes,
    layer_bytes,
    layers_again,
    on_host_bytes,
    working_bytes,
)
from job.gathered import Moment, gathered_bytes, shards, stored_width, whole_bytes
from job.shape import Shape
from job.trained import largest_trained, trained_tensors
from job.zero import copies_gradients, swap_buffers

__all__ = ["GIB", "Item", "Job", "Memory", "memory"]

GIB = 2**30
CONTEXT_GIB = 0.6
"""CUDA's context and the kernels of the libraries on each GPU, outside torch's own count: 0.5 to 0.7 GiB on Hopper."""
CUBLAS_BYTES = 2 * (32 << 20)
"""cuBLAS's workspace, for the forward's thread and for the backward's: 32 MiB each on Hopper, 8 MiB before it."""
BLOCK_BITS = 32 / 64
"""Bits of fp32 scales for each 4-bit weight."""
NESTED_BITS = 8 / 64 + 32 / (64 * 256)
"""The same with double quantization (arXiv:2305.14314, section 3)."""
PROCESS_GIB = 1.9
"""Resident memory of a rank's process: Python, torch and the libraries of CUDA; 1.5 to 2 GiB."""
READ_GIB = 0.25
"""Buffers of a checkpoint that is read ahead."""
MOMENT_BYTES = {"adamw": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes a trained element of Adam's two moments."""


@dataclass(frozen=True)
class Item:
    """A part of the memory, GiB. `counted` when torch.cuda.max_memory_allocated sees it."""

    name: str
    gib: float
    counted: bool = True


@dataclass(frozen=True)
class Memory:
    """Memory of a rank: `held` all the time, `moments` by name and only then; `host` is that of a whole node."""

    held: tuple[Item, ...]
    moments: dict[Moment, tuple[Item, ...]]
    host: tuple[Item, ...]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: _sum(self.moments[moment]))

    @property
    def items(self) -> tuple[Item, ...]:
        """What is there at the peak."""
        return (*self.held, *self.moments[self.peak])

    @property
    def total_gib(self) -> float:
        """Peak on the device, GiB."""
        return _sum(self.items)

    @property
    def allocated_gib(self) -> float:
        """Of these what torch.cuda.max_memory_allocated will show."""
        return _sum(tuple(item for item in self.items if item.counted))

    @property
    def host_gib(self) -> float:
        """Host memory of a node, GiB."""
        return _sum(self.host)

    def lines(self) -> list[str]:
        """For printing: the items at the peak, their sum, other moments, the host and what is not known."""
        rows = [f"{item.gib:8.2f} GiB  {item.name}" for item in self.items if item.gib >= 0.005]
        rows.append(f"{self.total_gib:8.2f} GiB  a rank at its peak, {self.peak}")
        base = _sum(self.held)
        others = [f"{base + _sum(items):.2f} {name}" for name, items in self.moments.items() if name != self.peak]
        rows.append(f"              at other moments: {', '.join(others)}")
        rows.append(f"{self.host_gib:8.2f} GiB  host memory of a node: " + _named(self.host))
        return rows + [f"note: {note}" for note in self.notes]


def memory(shape: Shape, job: Job) -> Memory:
    """The memory of one rank of a job on a model of this shape."""
    adapter = trained_tensors(shape, job)
    trained = sum(adapter)
    held = [
        *_base(shape, job),
        Item("adapter weights", job.item * _stored(adapter, job) / GIB),
        Item("gradients", job.item * trained / (1 if job.strategy == "replicate" else job.ranks) / GIB),
        *_optimizer(trained, job),
    ]
    if shards(job):
        held.append(Item("small weights, whole", whole_bytes(shape, job) / GIB))
        # buckets for the whole run; stages 1 and 2 make them at each backward's first gradient (deepspeed 0.19.8)
        held.append(_buckets(job))
    if job.device == "cuda":
        held += [Item("cuBLAS workspace", CUBLAS_BYTES / GIB), Item("CUDA context", CONTEXT_GIB, counted=False)]
    else:
        held.append(Item("process", PROCESS_GIB, counted=False))
    return Memory(tuple(held), _moments(shape, job, trained), tuple(_host(shape, job, trained)), _notes(shape, job))


def _moments(shape: Shape, job: Job, trained: int) -> dict[Moment, tuple[Item, ...]]:
    """What each moment of a step takes besides what is held."""
    kept = Item("activations kept", kept_bytes(shape, job) / GIB)
    layer = Item("one layer again", layer_bytes(shape, job) / GIB * (layers_again(shape, job) == shape.layers))
    seen = job.evaluation_micro_batch * job.length
    # fp32 gradients, and torch's root of the second moment, of this rank's part
    step = 0.0 if _on_host(job) else (8 if job.optimizer == "adamw" else 4) * trained / job.ranks
    # stage 3 joins gradients that wait, or lie in a bucket, in a buffer, of which three may be on their way
    buffers = (3 if trained > job.bucket else 1) + (not copies_gradients(job.contiguous_gradients, job.strategy))
    joined = buffers * max(min(job.bucket, trained), largest_trained(shape, job)) * job.item
    moments: dict[Moment, tuple[Item, ...]] = {
        "taking the loss": (kept, Item("logits and gradients", _loss_bytes(shape, job, job.tokens, True) / GIB)),
        "in the backward pass": (
            kept,
            layer,
            Item("a layer's gradients and weights", working_bytes(shape, job, job.tokens) / GIB),
            Item("gradients on their way", joined / GIB) if shards(job) else _buckets(job),
        ),
        "in the optimizer's step": (Item("fp32 gradients", step / GIB),),
        "in the evaluation": (
            Item("logits", _loss_bytes(shape, job, seen, False) / GIB),
            Item("a layer's tensors", working_bytes(shape, job, seen) / GIB),
        ),
    }
    if shards(job):
        for name, items in moments.items():
            moments[name] = (Item("gathered weights", gathered_bytes(shape, job, name) / GIB), *items)
    return moments


def _loss_bytes(shape: Shape, job: Job, tokens: int, learns: bool) -> float:
    """Logits with what is made of them. Whole: log-probabilities, their gradient and that of the logits, all in fp32;
    in the evaluation logits as they come, in fp32, and log-probabilities. In chunks: one of them in fp32 with its
    exponentials, and the gradient of the hidden states."""
    learnt = tokens * job.learnt_share
    if not in_chunks(shape, job):
        return (12 if learns else job.item + 8) * learnt * shape.vocabulary
    rows = min(learnt, max(CHUNK // shape.vocabulary, 1))
    return 8 * rows * shape.vocabulary + learns * learnt * job.item * shape.hidden


def _base(shape: Shape, job: Job) -> list[Item]:
    """The frozen base on this GPU: stored weights, scales (which ZeRO-3 never shards), and what stays in 16 bits.
    What ZeRO-3 gathers of it is counted by moment."""
    width = stored_width(job)
    kind = {"nf4": "4 bits", "fp4": "4 bits", "int8": "8 bits", "none": job.precision}[job.quantization]
    scales = Item("scales of the base", _scale_bytes(shape, job) / GIB)
    stored, kept = width * shape.quantized, job.item * shape.kept
    if not shards(job):
        values = sum(linear.numel * linear.count for linear in shape.linears if job.adapts(linear))
        beside = [Item("values of the 4-bit base", job.item * values / GIB)] if job.values_kept else []
        held = [Item(f"base in {kind}", stored / GIB), scales, Item(f"base kept in {job.precision}", kept / GIB)]
        return held + beside
    here = 0.0 if job.offload_parameters != "none" else 1 / job.ranks
    items = [Item(f"base in {kind}, sharded", here * stored / GIB), scales]
    items.append(Item(f"base kept in {job.precision}, sharded", here * kept / GIB))
    if job.strategy == "hpz" and job.offload_parameters == "none":
        items.append(Item("base again, sharded in the node", (stored + kept) / job.ranks_per_node / GIB))
    return items


def _scale_bytes(shape: Shape, job: Job) -> float:
    if job.quantization == "int8":  # one fp32 a row
        return 4.0 * sum(linear.outputs * linear.count for linear in shape.linears)
    bits = 0.0 if job.quantization == "none" else NESTED_BITS if job.double_quant else BLOCK_BITS
    return shape.quantized * bits / 8


def _stored(tensors: list[int], job: Job) -> float:
    """Elements of trained tensors on this rank: under ZeRO-3 small ones whole beside their part, others their part."""
    if not shards(job):
        return sum(tensors)
    return sum(numel / job.ranks + numel * (numel <= job.persistence) for numel in tensors)


def _on_host(job: Job) -> bool:
    return job.offload_optimizer != "none"


def _optimizer(trained: int, job: Job) -> list[Item]:
    """fp32 masters and Adam's moments, a part on each rank under every strategy. torch does not count pages."""
    if _on_host(job):
        return []
    own, paged = trained / job.ranks, job.optimizer.startswith("paged") and job.device == "cuda"
    return [
        Item("fp32 masters of the adapter", 4 * own / GIB),
        Item("optimizer moments" + (" in pages" * paged), MOMENT_BYTES[job.optimizer] * own / GIB, counted=not paged),
    ]


def _buckets(job: Job) -> Item:
    """Buckets for gradients on their way: two when communication overlaps in stages 1 and 2."""
    # with the optimizer on the host stages 1 and 2 always have them (deepspeed 0.19.8, stage_1_and_2.py)
    copied = copies_gradients(job.contiguous_gradients, job.strategy) or (_on_host(job) and not shards(job))
    count = copied * (2 if job.overlap_comm and not shards(job) else 1)
    return Item("gradient buckets", count * job.bucket * job.item / GIB)


def _host(shape: Shape, job: Job, trained: int) -> list[Item]:
    """Host memory of a node, all its ranks together."""
    here = job.ranks_per_node
    items = [Item("processes", here * PROCESS_GIB), Item("reading", here * READ_GIB)]
    if job.device == "cpu":
        return items[1:]
    if _on_host(job):  # masters, moments and gradients in fp32
        items.append(Item("optimizer", here * (8 + MOMENT_BYTES[job.optimizer]) * trained / job.ranks / GIB))
    if inputs := on_host_bytes(shape, job):
        items.append(Item("layers' inputs, pinned", here * inputs / GIB))
    if shards(job) and job.offload_parameters != "none":
        stored = stored_width(job) * shape.quantized + job.item * shape.kept
        whole = here * stored / job.ranks + (stored if job.strategy == "hpz" else 0)
        items.append(Item("base, pinned", (whole if job.offload_parameters == "cpu" else _in_files(shape, job)) / GIB))
    return items


def _in_files(shape: Shape, job: Job) -> float:
    """Host bytes of a node whose linears lie in files: what stays in 16 bits, and a buffer for each linear of a layer,
    as large as the largest part (`zero.swap_buffers`)."""
    linears = {f"layers.0.{linear.path}": linear.numel for linear in shape.linears}
    parts = {name: round(stored_width(job) * numel / job.storage_bytes / job.ranks) for name, numel in linears.items()}
    buffers = swap_buffers(parts)
    here = job.ranks_per_node
    locked = here * buffers["buffer_count"] * buffers["buffer_size"] * job.storage_bytes
    return locked + here * job.item * shape.kept / job.ranks


def _notes(shape: Shape, job: Job) -> tuple[str, ...]:
    notes = list(shape.notes)
    if shape.experts_per_token > 1:
        notes.append(f"activations are those of {shape.experts_per_token} experts a token, evenly spread")
    return tuple(notes)


def _sum(items: tuple[Item, ...]) -> float:
    return math.fsum(item.gib for item in items)


def _named(items: tuple[Item, ...]) -> str:
    return ", ".join(f"{item.name} {item.gib:.2f}" for item in items)
