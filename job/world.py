"""Where this process woke up: its rank among how many, the job it belongs to, the machine beneath it."""

import os
import random
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from job.errors import ConfigError, InputError

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU time in how many of time, of control groups' second version; a container sees its own."""


@dataclass(frozen=True)
class Hardware:
    """What a rank computes on; `memory_gib` is the device's memory, GiB, `gpus` how many this machine shows; of a GPU
    that nobody asked, `fp8` and `rows` are taken for granted. `rows` says whether torch has an attention that is told
    where rows begin, for as many keys as queries alone or also for groups."""

    device: Literal["cpu", "cuda"]
    name: str
    bf16: bool
    memory_gib: float
    gpus: int = 0
    fp8: bool = True
    rows: Literal["none", "plain", "grouped"] = "grouped"


def cores() -> int:
    """CPUs that this process may use: those that it may run on, and no more than its control group's quota of time."""
    there = len(os.sched_getaffinity(0))
    try:
        quota, period = QUOTA.read_text().split()
        return max(min(there, int(quota) // int(period)), 1)
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return there


def free_port() -> int:
    """A port of this machine on which ranks can meet: below 32768, from where on Linux gives out ports by itself, or
    another process might be given it before they listen."""
    while True:
        port = random.SystemRandom().randrange(12000, 20000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def ranks_on(processes: Literal["all"] | int, gpus: int) -> int:
    """How many ranks parallel.processes means on a machine of so many GPUs: all is one a GPU, or one on a CPU.

    Raises:
        ConfigError: there are fewer GPUs.
    """
    if processes == "all":
        return max(gpus, 1)
    if gpus and processes > gpus:
        raise ConfigError(
            "the settings for this machine", [f"parallel.processes: {processes}, and here are {gpus} GPUs. Use all"]
        )
    return processes


def started_by_launcher(env: Mapping[str, str]) -> bool:
    """Whether torchrun, deepspeed, accelerate, Ray or this command started this process as one of its workers."""
    return "RANK" in env and "WORLD_SIZE" in env


@dataclass(frozen=True)
class World:
    """This process among its peers, as its launcher said through environment variables."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    job_id: str | None = None
    local_world_size: int = 0
    """Ranks on this node; 0 means all of them."""
    attempt: int | None = None
    """How often the scheduler had started this job again, which it does after it ended the job; None: nobody counts."""
    even: bool = True
    """Whether every node has as many, as far as the ranks have told each other."""

    @classmethod
    def from_env(cls, env: Mapping[str, str], local_rank: int | None = None) -> Self:
        """Read RANK, WORLD_SIZE and LOCAL_RANK (torchrun, deepspeed, accelerate, Ray), LOCAL_WORLD_SIZE (deepspeed:
        LOCAL_SIZE), and the job: QLORA_JOB_ID and QLORA_JOB_ATTEMPT of our own launchers, else SLURM_JOB_ID and
        SLURM_RESTART_COUNT, which is set from the first restart on.

        Args:
            env: the environment; nothing else is looked at.
            local_rank: what the deepspeed launcher passes as --local_rank; LOCAL_RANK wins.

        Raises:
            InputError: a variable is no number, or the numbers contradict each other.
        """
        job, counter = env.get("QLORA_JOB_ID"), "QLORA_JOB_ATTEMPT"
        if job is None:
            job, counter = env.get("SLURM_JOB_ID"), "SLURM_RESTART_COUNT"
        numbers = {}
        names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", local_rank or 0), ("LOCAL_SIZE", 0)
        for name, default in (*names, ("LOCAL_WORLD_SIZE", 0), (counter, 0)):
            text = env.get(name, str(default))
            if not (text.isascii() and text.isdecimal()):
                raise InputError(f"The environment's {name} is {text!r}, expected a number. Unset it or use a launcher")
            numbers[name] = int(text)
        if numbers["RANK"] >= numbers["WORLD_SIZE"]:
            raise InputError(f"RANK is {numbers['RANK']} of WORLD_SIZE {numbers['WORLD_SIZE']}, expected less")
        whole = numbers["WORLD_SIZE"]
        here = numbers["LOCAL_WORLD_SIZE"] or numbers["LOCAL_SIZE"]
        attempt = numbers[counter] if job else None
        return cls(numbers["RANK"], whole, numbers["LOCAL_RANK"], job, here, attempt)

    @property
    def ranks_per_node(self) -> int:
        """Ranks on this node."""
        return self.local_world_size or self.world_size

    @property
    def nodes(self) -> int:
        """Nodes of as many ranks as this one."""
        return -(-self.world_size // self.ranks_per_node)

    @property
    def speaks(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0
