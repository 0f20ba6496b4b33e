"""What this process computes on, asked of torch once."""

import os
from inspect import signature
from typing import Literal

import psutil
import torch
from torch.nn.attention.varlen import varlen_attn

from job.errors import InputError
from job.world import Hardware


def count_gpus() -> int:
    """GPUs that this process may use; none of them is touched."""
    return torch.cuda.device_count()


def this_hardware(local_rank: int) -> Hardware:
    """The GPU of this local rank, or the CPU when there is none.

    Raises:
        InputError: there are fewer GPUs than ranks on this node.
    """
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK is {local_rank}, and this node shows {torch.cuda.device_count()} GPUs. "
                "Start as many ranks a node as it has GPUs"
            )
        torch.cuda.set_device(local_rank)
        properties = torch.cuda.get_device_properties(local_rank)
        bf16 = properties.major >= 8  # emulated below, at a fraction of the speed
        gib, gpus = properties.total_memory / 2**30, torch.cuda.device_count()
        fp8 = properties.major >= 9
        return Hardware("cuda", properties.name, bf16, gib, gpus, fp8, _rows(properties.major))
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    return Hardware("cpu", cores, True, psutil.virtual_memory().total / 2**30, fp8=False, rows="none")


def _rows(major: int) -> Literal["none", "plain", "grouped"]:
    """What torch's FlashAttention takes on a GPU of this generation."""
    if torch.version.hip or major < 8 or not torch.backends.cuda.is_flash_attention_available():
        return "none"
    return "grouped" if "enable_gqa" in signature(varlen_attn).parameters else "plain"  # torch 2.11 takes no groups


def peak_memory_gib(device: str) -> float:
    """Largest memory so far: allocated on the GPU, or resident in this process on a CPU, GiB."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated() / 2**30)
    with open("/proc/self/status") as status:
        peak = next((line for line in status if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(peak.split()[1]) / 2**20


def out_of_memory(fault: BaseException) -> bool:
    """Whether the GPU's memory ran out."""
    return isinstance(fault, torch.OutOfMemoryError)
