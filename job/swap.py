"""The base in files: what of it goes there, through which buffers, and whether this machine can do it."""

import ctypes
import mmap
import os
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.swap_tensor.utils import MIN_AIO_BYTES

from job.errors import InputError
from job.group import first_of_each_node
from job.plan import Plan
from job.weights import Share
from job.world import World
from job.zero import layer_of, swap_buffers

STORAGE = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types of stored elements, each of which holds two 4-bit weights a byte."""


def stored(share: Share) -> int:
    """Stored elements of a whole parameter."""
    return -(-share.tensor.numel // share.unit)


def swapped(plan: Plan, world: World, shares: Iterable[Share]) -> dict[str, int]:
    """Stored elements of a rank's part of each parameter that goes to files, by name.

    The others are offloaded to host memory: embeddings and head, which would make every buffer as large as they are,
    parameters below the smallest transfer, and those that every rank keeps whole anyway.
    """
    if plan.zero.offload_parameters != "nvme":
        return {}
    smallest = max(MIN_AIO_BYTES, plan.deepspeed()["aio"]["block_size"])
    least = -(-smallest // STORAGE[plan.storage].itemsize)
    large = {share.name: stored(share) for share in shares if stored(share) > plan.zero.persistence}
    parts = {name: -(-size // world.world_size) for name, size in large.items() if layer_of(name)}
    return {name: size for name, size in parts.items() if size >= least}


def with_buffers(plan: Plan, in_files: dict[str, int]) -> dict[str, Any]:
    """DeepSpeed's configuration with buffers for these parameters; those that one's own JSON names stay."""
    config = plan.deepspeed()
    if plan.zero.offload_parameters == "nvme":
        zero = config["zero_optimization"]
        zero["offload_param"] = swap_buffers(in_files) | zero["offload_param"]
    return config


def prepare_files(plan: Plan, world: World, shares: Iterable[Share], say: Callable[[str], None]) -> None:
    """Make sure that this node can offload to files, before anything is loaded; nothing when that is not asked for.

    Raises:
        InputError: the folder cannot be written, what compiles DeepSpeed's operator is missing, or the buffers exceed
            the memory that may be locked.
    """
    if "nvme" not in (plan.zero.offload_optimizer, plan.zero.offload_parameters):
        return
    say("DeepSpeed's file operator is compiled where it is not yet, which takes minutes")
    buffers = with_buffers(plan, swapped(plan, world, shares))["zero_optimization"].get("offload_param", {})
    size = buffers.get("buffer_size", 0) * buffers.get("buffer_count", 0) * STORAGE[plan.storage].itemsize

    def prepare() -> None:
        if fault := folder_fault(str(plan.zero.nvme_path)) or operator_fault() or lock_fault(size):
            raise InputError(fault)

    first_of_each_node(world, prepare)


def folder_fault(path: str) -> str | None:
    """Why files cannot lie in this folder."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        return f"parallel.nvme_path: {path} cannot be made: {fault.strerror}. Name a folder on a fast local disk"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"parallel.nvme_path: {path} cannot be written. Name a folder on a fast local disk"
    return None


def operator_fault() -> str | None:
    """Why DeepSpeed's file operator does not load; compiles it when it is not yet."""
    # ninja lies beside the Python that runs, which need not be on PATH; another ninja would compile all of it again
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    try:
        deepspeed.ops.op_builder.AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError) as fault:
        why = str(fault).strip().splitlines()[0][:200]
        return (
            "parallel.nvme_path: DeepSpeed's file operator cannot be compiled here. Install libaio-dev, g++ and ninja "
            f"(Debian: apt-get install libaio-dev g++), or offload to cpu ({why})"
        )
    return None


def lock_fault(size: int) -> str | None:
    """Why so many bytes cannot be locked in memory, found by trying: DeepSpeed would die without a word."""
    if not size or _locks(size):
        return None
    return (
        f"parallel.offload_parameters: nvme locks {size / 2**20:.0f} MiB in memory for its buffers, more than this "
        "process may. Raise the limit (ulimit -l unlimited), or use cpu"
    )


def _locks(size: int) -> bool:
    try:
        memory = mmap.mmap(-1, size)
    except OSError:
        return False
    start = ctypes.c_char.from_buffer(memory)
    locked = bool(ctypes.CDLL(None).mlock(ctypes.byref(start), ctypes.c_size_t(size)) == 0)
    del start  # it holds the mapping, whose end unlocks it
    memory.close()
    return locked
