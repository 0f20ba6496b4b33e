"""The nodes of a job as DeepSpeed wants them: a hostfile, the GPUs that are this job's on each, address and port."""

import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from job.errors import ConfigError, InputError, JobError
from job.preflight.facts import Facts
from job.world import ranks_on

FILE, HOSTFILE = "job.json", "hostfile"


@dataclass(frozen=True)
class Node:
    """A node of the job.

    Args:
        name: as the scheduler calls it.
        address: at which its scheduler reaches it: an address, or a name of any kind.
        gpus: this job's GPUs there, as CUDA_VISIBLE_DEVICES names them: numbers, or the ids of whole GPUs or parts.
        slots: ranks there.
    """

    name: str
    address: str
    gpus: tuple[str, ...] = ()
    slots: int = 1


@dataclass(frozen=True)
class Start:
    """What is known of a start of a job, in its folder's job.json, for ranks and for people.

    Args:
        job: the scheduler's id.
        words: CONFIG and settings.
        output: output.url.
        before: when the run's status.json was last written as this start began, by the clock of whoever wrote it; empty
            without any. What differs from it is of this start, whatever the clocks of the nodes say.
        step: how far the run was then.
        nodes: in the order of the hostfile; empty until they have reported.
        fruitless: starts of this job before this one, without a break, that came no further.
    """

    job: str
    words: tuple[str, ...]
    output: str
    before: str
    step: int
    nodes: tuple[Node, ...] = ()
    fruitless: int = 0

    def save(self, folder: Path) -> None:
        """Write job.json."""
        draft = folder / f"{FILE}.part"
        draft.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False))
        draft.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read job.json.

        Raises:
            JobError: it is not there or damaged.
        """
        try:
            found = json.loads((folder / FILE).read_text())
            nodes = tuple(Node(**{**node, "gpus": tuple(node["gpus"])}) for node in found["nodes"])
            return cls(**{**found, "words": tuple(found["words"]), "nodes": nodes})
        except (OSError, ValueError, TypeError, KeyError) as fault:
            raise JobError(f"{folder / FILE} cannot be read ({fault}). Is this folder on all nodes?") from fault


def nodes_of(
    allocation: str, facts: Sequence[Facts], processes: Literal["all"] | int, without: Sequence[str] = ()
) -> tuple[Node, ...]:
    """The nodes to use, in the scheduler's order.

    Args:
        allocation: a line a node: its name, its address, and what SLURM shares out there beside CPUs and memory.
        facts: what they said; a node without GPUs may have said nothing.
        processes: parallel.processes, counted on each node.
        without: names of nodes to leave out.

    Raises:
        InputError: none is left, a node has fewer GPUs than processes, GPUs that are for jobs that ask for them, or
            a rank for each of several parts of GPUs.
        JobError: a node said nothing that has GPUs.
    """
    said = {one.node: one for one in facts}
    found = []
    for name, address, shared_out in (line.split() for line in allocation.splitlines()):
        if name in without:
            continue
        if name not in said and "gpu" in shared_out:
            raise JobError(f"{name} said nothing, and so not which of its GPUs are this job's. Leave it out")
        gpus = _gpus(said[name], "gpu" in shared_out) if name in said else ()
        try:
            slots = ranks_on(processes, len(gpus))
        except ConfigError as fault:
            raise ConfigError(f"the settings for {name}", fault.faults) from fault
        if sum(gpu.startswith("MIG-") for gpu in gpus[:slots]) > 1:
            raise InputError(
                f"{name} gave {len(gpus)} parts of GPUs (MIG), and several ranks cannot have one each: CUDA shows a "
                "process only the first. Ask for whole GPUs or one part a node, or set parallel.processes=1"
            )
        found.append(Node(name, address, gpus, slots))
    if not found:
        raise InputError("no node is left to run on. Repair those that were named, or ask for others")
    return tuple(found)


def _gpus(said: Facts, shared_out: bool) -> tuple[str, ...]:
    """The job's GPUs on a node: those that SLURM named; where it shares none out, all that are there."""
    if said.visible is not None:
        return said.visible
    if shared_out and said.gpus:
        raise InputError(
            f"{said.node} has {len(said.gpus)} GPUs, and this job asked for none. Ask for them: sbatch "
            f"--gpus-per-node={len(said.gpus)}, or SBATCH_GPUS_PER_NODE in slurm/site.sh"
        )
    return tuple(str(number) for number in range(len(said.gpus)))


def hostfile(nodes: Sequence[Node]) -> str:
    """The nodes as `deepspeed --hostfile` reads them."""
    return "".join(f"{node.name} slots={node.slots}\n" for node in nodes)


def own_gpus(start: Start, env: Mapping[str, str]) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for a rank: DeepSpeed's launcher counts GPUs from 0 (DeepSpeed#1331, #7155), which may be
    other jobs' ones on a node that is shared, or none at all.

    Args:
        env: the environment, with the number of the node in the hostfile that DeepSpeed's launcher sets.
    """
    node = start.nodes[int(env["CROSS_RANK"])]
    return {"CUDA_VISIBLE_DEVICES": ",".join(node.gpus[: node.slots])}


def address_of_first(nodes: Sequence[Node], here: str) -> str:
    """An address of the first node that the others reach.

    The scheduler's names may be loopback to the node that has them, as Debian writes /etc/hosts: on the first node
    itself the routing table is asked instead for the address from which it speaks to the second.

    Args:
        here: name of the node this runs on.
    """
    if len(nodes) == 1:
        return "127.0.0.1"
    first, second = nodes[:2]
    if first.name == here:
        with suppress(OSError):
            family, kind, _, _, place = socket.getaddrinfo(second.address, 1, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(place)  # sends nothing
                own = str(probe.getsockname()[0])
                if not own.startswith(("127.", "::1")):
                    return own
    return first.address
