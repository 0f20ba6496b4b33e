"""Which ranks exchange in which round."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A node's name and its ranks."""

    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Nodes that exchange with each other alone, and their ranks."""

    nodes: tuple[str, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"node {self.nodes[0]} alone" if len(self.nodes) == 1 else " and ".join(self.nodes)


@dataclass(frozen=True)
class Round:
    """Groups that exchange at once."""

    name: str
    groups: tuple[Group, ...]


def nodes_of(places: Sequence[tuple[str, int]], named: Sequence[str]) -> tuple[Node, ...]:
    """The nodes in the order of ranks.

    Args:
        places: each rank's node name and local rank; a node begins with the local rank 0.
        named: what the nodes are to be called, in their order; anything but one name a node is not used.
    """
    starts = [rank for rank, (_, local) in enumerate(places) if local == 0 or rank == 0]
    spans = [range(start, end) for start, end in zip(starts, [*starts[1:], len(places)], strict=True)]
    names = list(named) if len(named) == len(spans) else [places[span.start][0] for span in spans]
    names = [name if names.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(names)]
    return tuple(Node(name, tuple(span)) for name, span in zip(names, spans, strict=True))


def rounds_of(nodes: Sequence[Node]) -> list[Round]:
    """Each node alone; neighbouring nodes in a ring, in two rounds; all together."""
    rounds = [Round("alone", tuple(_group(node) for node in nodes))]
    count = len(nodes)
    if count > 1:
        rounds.append(Round("pairs", tuple(_group(*nodes[at : at + 2]) for at in range(0, count - 1, 2))))
    if count > 2:
        later = [_group(*nodes[at : at + 2]) for at in range(1, count - 1, 2)]
        if count % 2 == 0:
            later.append(_group(nodes[-1], nodes[0]))
        rounds += [Round("other pairs", tuple(later)), Round("all", (_group(*nodes),))]
    return rounds


def _group(*nodes: Node) -> Group:
    return Group(tuple(node.name for node in nodes), tuple(rank for node in nodes for rank in node.ranks))


def group_of(round_: Round, rank: int) -> Group | None:
    """The group that a rank belongs to in a round; None when it waits."""
    return next((group for group in round_.groups if rank in group.ranks), None)
