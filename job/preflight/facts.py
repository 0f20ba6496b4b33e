"""What a node says about itself before a run, as one line of JSON: launchers gather these lines and judge them."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

from job.errors import JobError

NO_GPUS = ("NoDevFiles", "-1")
"""What schedulers put into CUDA_VISIBLE_DEVICES when a job has none."""


class Gpu(NamedTuple):
    """A GPU as torch sees it; memory in GiB."""

    name: str
    memory_free_gib: float
    memory_total_gib: float


class Clock(NamedTuple):
    """A GPU's clock as nvidia-smi tells it: the highest that it can have, MHz (0 where it does not say), and what holds
    it down that is no wish of anybody: hw_thermal_slowdown, hw_power_brake."""

    max_sm_mhz: int
    held_down_by: tuple[str, ...]


class Address(NamedTuple):
    """An IPv4 or IPv6 address of this node, and the network interface that has it."""

    interface: str
    address: str


@dataclass(frozen=True)
class Facts:
    """One node before a run; memory in GiB."""

    node: str
    """Its name: the scheduler's, else the host's."""
    visible: tuple[str, ...] | None
    """The environment's CUDA_VISIBLE_DEVICES; None when it is not set."""
    promised: int | None
    """GPUs that the scheduler gave; None when nobody said."""
    gpus: tuple[Gpu, ...]
    """Those that torch sees."""
    clocks: tuple[Clock, ...]
    """Of all GPUs that nvidia-smi shows; empty without it."""
    devices: int
    """Files /dev/nvidia0, /dev/nvidia1, ..., whether or not this process may use them."""
    versions: Mapping[str, str]
    """python, torch with its CUDA, the other libraries, job, driver, nccl, and digests: code, settings."""
    memory_free_gib: float
    """Of the host."""
    cpus: int
    """CPU cores that this process may use."""
    shm_free_gib: float
    shm_total_gib: float
    """Of /dev/shm, through which NCCL and workers talk."""
    time: float
    """Unix seconds by the node's clock, when the line was made."""
    addresses: tuple[Address, ...]
    """All but loopback."""
    port: int
    """The first free one from the wanted one on; 0 when none is."""
    storage: str
    """Why data or output cannot be used from here, a sentence; empty when they can."""

    def to_json(self) -> str:
        """One line, which `parse` takes."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            JobError: it is cut off, something else, or from another version.
        """
        try:
            found = json.loads(line)
            names, expected = set(found), {field.name for field in fields(cls)}
            if names != expected:
                raise ValueError(f"fields {', '.join(sorted(names ^ expected))} are there on one side only")
            read = cls(
                **{
                    **found,
                    "visible": None if found["visible"] is None else _texts(found["visible"]),
                    "gpus": tuple(Gpu(str(name), float(free), float(total)) for name, free, total in found["gpus"]),
                    "clocks": tuple(Clock(int(most), _texts(why)) for most, why in found["clocks"]),
                    "versions": {str(name): str(version) for name, version in found["versions"].items()},
                    "addresses": tuple(Address(str(name), str(address)) for name, address in found["addresses"]),
                }
            )
            _check(read)
        except (ValueError, TypeError, KeyError, AttributeError) as fault:
            raise JobError(
                f"a node's report cannot be read ({fault}): {line.strip()[:200]!r}. Expected the line that "
                "`qlora preflight CONFIG --report` prints. Install the same version on all nodes"
            ) from fault
        return read


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _check(read: Facts) -> None:
    numbers = {name: getattr(read, name) for name in ("devices", "cpus", "port", "promised")}
    for name, value in numbers.items():
        if not (isinstance(value, int) or (name == "promised" and value is None)):
            raise ValueError(f"{name} is {value!r}, expected a number")
    for name in ("memory_free_gib", "shm_free_gib", "shm_total_gib", "time"):
        value = getattr(read, name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, expected a number")
    for name in ("node", "storage"):
        if not isinstance(getattr(read, name), str):
            raise ValueError(f"{name} is {getattr(read, name)!r}, expected text")


def visible(env: Mapping[str, str]) -> tuple[str, ...] | None:
    """CUDA_VISIBLE_DEVICES as a list; None when it is not set, empty when it names none."""
    text = env.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    named = [part.strip() for part in text.split(",")]
    return tuple(part for part in named if part and part not in NO_GPUS)


def promised(env: Mapping[str, str]) -> int | None:
    """GPUs of this node that the scheduler gave to the job; None when it does not say."""
    shown = visible(env)
    if shown is not None:
        return len(shown)
    count = env.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isascii() and count.isdecimal() else None
