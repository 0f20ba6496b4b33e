"""What the rounds of exchanges say about the nodes, and what people read of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low

from job.errors import JobError
from job.preflight.judge import Verdict
from job.preflight.rounds import Group, Node, Round

SLOW = 0.5
"""Of the median of the others."""
LISTED = 8

Results = Sequence[tuple[Round, Mapping[int, "Found"]]]
"""The rounds as far as they came, each with what the ranks found."""


@dataclass(frozen=True)
class Found:
    """What a rank found in a round: its bus bandwidth (GB/s; 0 for a rank by itself), how many numbers were wrong
    before they were sent and after they were summed, and why it did not end."""

    gbps: float = 0.0
    wrong_before: int = 0
    wrong_after: int = 0
    fault: str = ""
    lost_peer: bool = False
    """Whether the fault is another rank's end."""
    late: bool = False
    """Whether the fault is no more than that it did not end in time."""

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))


def absent(ranks: Iterable[int], size: int, here: int, named: Sequence[str], limit_s: float) -> Verdict:
    """The nodes whose ranks did not come.

    Args:
        size: of the world.
        here: ranks on a node, as far as the first one knows.
        named: all nodes in their order; else they are called by their place.
    """
    nodes: dict[str, list[int]] = {}
    for rank in ranks:
        place = rank // here
        name = named[place] if len(named) == -(-size // here) else f"the node of ranks {place * here}.."
        nodes.setdefault(name, []).append(rank)
    cure = "Look whether it is up, runs the command and can reach the first node"
    return Verdict(
        {name: [f"{_ranks(missing)} did not come within {limit_s:.0f} s. {cure}"] for name, missing in nodes.items()},
        {},
    )


def judge_devices(nodes: Sequence[Node], devices: Sequence[tuple[str, str]]) -> Verdict:
    """Ranks that have no device, or another kind of one than the first.

    Args:
        devices: by rank: what it computes on, and why it cannot ("" when it can).
    """
    usual = devices[0][0]
    said = {}
    for rank, (device, why) in enumerate(devices):
        if why or device != usual:
            said[rank] = why or f"computes on {device}, the first rank on {usual}. Give all of them the same"
    return Verdict(_by_node(said, {rank: node.name for node in nodes for rank in node.ranks}), {})


def judge_opening(nodes: Sequence[Node], found: Mapping[int, Found]) -> Verdict:
    """Who kept the ranks from opening their group: those that are gone, else those that failed by themselves, else
    nobody in particular.

    Args:
        found: what each rank found; those that do not say are gone.
    """
    home = {rank: node.name for node in nodes for rank in node.ranks}
    gone = [rank for rank in home if rank not in found]
    if gone:
        return Verdict(_by_node(dict.fromkeys(gone, "ended, or fell silent, when the group was opened"), home), {})
    failed = {rank: one for rank, one in found.items() if one.fault}
    own = _by_themselves(failed)
    if own and len(own) < len(found):
        said = {rank: f"the group could not be opened: {one.fault}" for rank, one in own.items()}
        return Verdict(_by_node(said, home), {})
    cure = "Look at the network between the nodes; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name its interface"
    whys = {one.fault for one in failed.values()} if own else {_common(failed)}
    return Verdict({}, {}, [f"the group of all ranks could not be opened: {why}. {cure}" for why in sorted(whys)])


def _by_themselves(failed: Mapping[int, Found]) -> dict[int, Found]:
    """Those that waited for nobody."""
    return {rank: one for rank, one in failed.items() if not one.lost_peer and not one.late}


def _common(failed: Mapping[int, Found]) -> str:
    """What those say that waited for others: the first one's words, for all of them mean the same."""
    return failed[min(failed)].fault


def broken(found: Mapping[int, Found], size: int) -> bool:
    """Whether a round did not end on all ranks, so that there can be no other."""
    return len(found) < size or any(one.fault for one in found.values())


def judge_rounds(nodes: Sequence[Node], results: Results, strict: bool) -> Verdict:
    """What the rounds say about the nodes.

    Args:
        strict: whether a slow node is a fault; else it is a warning, for CPUs are shared.
    """
    home = {rank: node.name for node in nodes for rank in node.ranks}
    verdict = Verdict({}, {})
    for round_, found in results:
        for group in round_.groups:
            if any(rank not in found or found[rank].fault for rank in group.ranks):
                verdict = verdict.joined(_unfinished(group, found, home))
        verdict = verdict.joined(Verdict(_by_node(_own_faults(round_, found), home), {}))
    verdict = verdict.joined(_wrong_sums(results))
    slow = _slow(results)
    return verdict.joined(Verdict(slow, {}) if strict else Verdict({}, slow))


def _unfinished(group: Group, found: Mapping[int, Found], home: Mapping[int, str]) -> Verdict:
    """Who of a group kept it from ending: those that are gone, else those that failed by themselves, else all."""
    gone = [rank for rank in group.ranks if rank not in found]
    if gone:
        return Verdict(_by_node(dict.fromkeys(gone, "ended, or fell silent, in the all-reduce"), home), {})
    failed = {rank: found[rank] for rank in group.ranks if found[rank].fault}
    own = _by_themselves(failed)
    if own:
        return Verdict(_by_node({rank: f"the all-reduce failed: {one.fault}" for rank, one in own.items()}, home), {})
    return _blamed(group, f"the all-reduce of {group} failed: {_common(failed)}")


def hung(limit_s: float) -> Found:
    """What a rank found whose exchange did not end."""
    return Found(fault=f"no end within {limit_s:.0f} s", late=True)


def _blamed(group: Group, sentence: str) -> Verdict:
    """A group's fault: that of its node, of both that talk to each other, or of nobody in particular."""
    cure = "Look at NCCL's words (NCCL_DEBUG=INFO)" if len(group.nodes) == 1 else "Look at the network between them"
    if len(group.nodes) > 2:
        sentence = sentence.replace(str(group), f"all {len(group.ranks)} ranks")
        return Verdict({}, {}, [f"{sentence}, and in pairs the nodes get along. {cure}"])
    return Verdict({name: [f"{sentence}. {cure}"] for name in group.nodes}, {})


def _own_faults(round_: Round, found: Mapping[int, Found]) -> dict[int, str]:
    """Ranks that can only blame themselves: what they wrote changed, or they alone have wrong sums."""
    said = {}
    for group in round_.groups:
        there = {rank: found[rank] for rank in group.ranks if rank in found}
        right = any(not one.wrong_after for one in there.values())
        for rank, one in there.items():
            if one.wrong_before:
                said[rank] = (
                    f"{one.wrong_before} numbers changed in its memory before they were sent. Replace the device"
                )
            elif one.wrong_after and right:
                said[rank] = f"{one.wrong_after} sums of the all-reduce ({group}) came out wrong there"
    return said


def _wrong_sums(results: Results) -> Verdict:
    """Groups whose ranks all have wrong sums; a node of a group that was right is cleared."""
    wrong, right = [], set()
    for round_, found in results:
        for group in round_.groups:
            there = [found[rank] for rank in group.ranks if rank in found]
            if len(there) < len(group.ranks) or any(one.wrong_before for one in there):
                continue
            if all(one.wrong_after for one in there):
                wrong.append(group)
            elif len(group.nodes) == 2 and not any(one.wrong_after for one in there):
                right |= set(group.nodes)
    verdict = Verdict({}, {})
    for group in sorted(wrong, key=lambda group: len(group.nodes)):
        if set(group.nodes) & set(verdict.faults):
            continue  # a smaller group has told why
        narrowed = Group(tuple(name for name in group.nodes if name not in right) or group.nodes, group.ranks)
        named = narrowed if len(group.nodes) <= 2 else group
        said = _blamed(named, f"the sums of the all-reduce ({group}) are wrong")
        verdict = verdict.joined(said)
    return verdict


def _slow(results: Results) -> dict[str, list[str]]:
    """Nodes whose own exchange is slow, and pairs; a node of a pair that is fast is cleared."""
    speeds = _speeds(results)
    said: dict[str, list[str]] = {}
    for among in (1, 2):
        peers = {group: gbps for group, gbps in speeds.items() if len(group.nodes) == among}
        lame = {group: _others(peers, group) for group in peers if peers[group] < SLOW * _others(peers, group)}
        fast = {name for group in peers if group not in lame for name in group.nodes}
        for group, usual in lame.items():
            if among == 2 and set(group.nodes) & set(said):
                continue  # slow by itself
            sentence = f"the all-reduce of {group} has {peers[group]:.3g} GB/s, others {usual:.3g} GB/s"
            for name in [name for name in group.nodes if name not in fast] or group.nodes:
                said.setdefault(name, []).append(sentence)
    return said


def _others(peers: Mapping[Group, float], group: Group) -> float:
    others = [gbps for other, gbps in peers.items() if other != group]
    return median_low(others) if others else 0.0


def _speeds(results: Results) -> dict[Group, float]:
    """The bus bandwidth of each group that exchanged, GB/s, as the middle one of its ranks saw it."""
    speeds = {}
    for round_, found in results:
        for group in round_.groups:
            seen = [found[rank].gbps for rank in group.ranks if rank in found and found[rank].gbps]
            if seen:
                speeds[group] = median_low(seen)
    return speeds


def report(nbytes: int, results: Results) -> list[str]:
    """What people read of the bandwidths: every group of a few, else the middle and the slowest."""
    lines = [f"all-reduce of {nbytes / 2**20:.0f} MiB, bus bandwidth:"]
    for round_, found in results:
        speeds = _speeds([(round_, found)])
        if not speeds:
            continue
        slowest = min(speeds, key=lambda group: speeds[group])
        if round_.name == "all":
            lines.append(f"  all {len(slowest.ranks)} ranks: {speeds[slowest]:.3g} GB/s")
        elif len(speeds) <= LISTED:
            lines += [f"  {group}: {gbps:.3g} GB/s" for group, gbps in speeds.items()]
        else:
            middle = median_low(speeds.values())
            lines.append(f"  {round_.name}: {middle:.3g} GB/s (median), {speeds[slowest]:.3g} GB/s of {slowest}")
    if len(lines) > 1:
        return lines
    return ["one rank: nothing to exchange with"] if sum(len(found) for _, found in results) == 1 else []


def _by_node(said: Mapping[int, str], home: Mapping[int, str]) -> dict[str, list[str]]:
    """Sentences of ranks as sentences of nodes."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, sentence in said.items():
        ranks.setdefault((home[rank], sentence), []).append(rank)
    nodes: dict[str, list[str]] = {}
    for (name, sentence), which in ranks.items():
        nodes.setdefault(name, []).append(f"{_ranks(which)}: {sentence}")
    return nodes


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def read_found(note: str) -> Found:
    """What `to_json` wrote.

    Raises:
        JobError: it is something else.
    """
    try:
        return Found(**json.loads(note))
    except (ValueError, TypeError) as fault:
        raise JobError(
            f"preflight: a rank's note cannot be read: {note[:200]!r}. Use one version on all nodes"
        ) from fault
