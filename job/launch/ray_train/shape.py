"""How many workers on which nodes, and what each holds: arithmetic on what a cluster says of its nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from job.errors import InputError
from job.world import ranks_on


@dataclass(frozen=True)
class Node:
    """A node that lives: its resources in all, as Ray counts them."""

    name: str
    cpus: float
    gpus: float

    @classmethod
    def all_of(cls, said: Sequence[Mapping[str, Any]]) -> list[Self]:
        """The living ones of `ray.nodes()`."""
        return [
            cls(str(one["NodeName"]), one["Resources"].get("CPU", 0.0), one["Resources"].get("GPU", 0.0))
            for one in said
            if one["Alive"]
        ]


@dataclass(frozen=True)
class Shape:
    """Workers in all, and the resources of each."""

    workers: int
    cpus: float
    gpus: int

    @property
    def resources(self) -> dict[str, float]:
        """As Ray's resources_per_worker."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU{'s' if self.cpus > 1 else ''}" + (" and a GPU" if self.gpus else "")
        return f"{self.workers} worker{'s' if self.workers > 1 else ''} of {each}"


@dataclass(frozen=True)
class Wanted:
    """What the command line says of the cluster; see `shape_of`.

    Args:
        wait_minutes: how long workers may wait for their GPUs, at the start and after a node was lost.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    wait_minutes: float = 10.0


def shape_of(
    found: Sequence[Node], processes: Literal["all"] | int, nodes: int | None = None, gpus_per_node: int | None = None
) -> Shape:
    """The workers of a run.

    Args:
        found: the cluster's nodes; those without CPUs to give, as heads of clusters are, get no worker.
        processes: parallel.processes, counted on each node.
        nodes: how many nodes; all that are there now when left out.
        gpus_per_node: GPUs of each; those that are there now when left out.

    Raises:
        InputError: there is nothing to run on.
        ConfigError: a node has fewer GPUs than processes.
    """
    usable = [node for node in found if node.cpus >= 1]
    with_gpus = [node for node in usable if node.gpus >= 1]
    there = with_gpus or usable
    if gpus_per_node is not None:
        counts = [gpus_per_node] * (nodes or max(len(there), 1))
    elif there:
        most = [int(node.gpus) for node in there]
        counts = most if nodes is None else [max(most)] * nodes
    elif nodes is not None:
        counts = [0] * nodes
    else:
        raise InputError("the cluster has no node with CPUs for workers. Say --nodes, and it is waited for them")
    ranks = [ranks_on(processes, gpus) for gpus in counts]
    gpus = 1 if counts[0] else 0
    # CPUs are shared out whole, or Ray packs the ranks of several nodes onto one
    cpus = 1.0 if gpus or not there else max(min(node.cpus for node in there) // max(ranks), 1.0)
    return Shape(sum(ranks), cpus, gpus)


def missing(shape: Shape, found: Sequence[Node], free: Mapping[str, float], minutes: float) -> str:
    """Why the workers did not come to be: what was asked for, beside what there is."""
    nodes = ", ".join(f"{node.name} {node.cpus:g} CPUs {node.gpus:g} GPUs" for node in found) or "no node"
    return (
        f"{shape} could not be placed within {minutes:g} min. The cluster has {nodes}; free are "
        f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs. Ask for fewer (--nodes, --gpus-per-node), "
        "end other jobs, or wait longer (--wait-minutes)"
    )
