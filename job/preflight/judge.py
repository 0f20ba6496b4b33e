"""Which nodes a run should not have, from what they all say about themselves, and why."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low

from job.preflight.facts import Facts

MEMORY_SHARE = 0.8
"""Of a GPU's memory has to be free."""
CLOCK_OFF_S = 60.0
CLOCK_SHARE = 0.9
"""Of the highest clock that most GPUs of a kind can have."""
SHM = "/dev/shm"  # noqa: S108 - looked at, nothing is written there
SHM_FAULT_GIB, SHM_WARN_GIB = 1 / 16, 1.0
HOST_GIB_A_RANK = 4.0
SHOWN = 4
"""Nodes that a line names; the others are counted."""


@dataclass(frozen=True)
class Verdict:
    """Sentences by node: what speaks against it, and what is worth a look."""

    faults: Mapping[str, Sequence[str]]
    warnings: Mapping[str, Sequence[str]]
    general: Sequence[str] = ()
    """What fails among all of them and is no single node's fault: leaving one out would not help."""

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the run."""
        return not self.faults and not self.general

    @property
    def bad(self) -> tuple[str, ...]:
        """The nodes to repair or to leave out."""
        return tuple(self.faults)

    def lines(self) -> list[str]:
        """What people read: a sentence once, with the nodes that it is about in front."""
        return [*self.general, *_grouped(self.faults, ""), *_grouped(self.warnings, "Warning: ")]

    def to_json(self) -> str:
        """For launchers: {"faults": {node: [sentence]}, "warnings": {node: [sentence]}, "general": [sentence]}."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def joined(self, other: "Verdict") -> "Verdict":
        """Both."""
        faults, warnings = _joined(self.faults, other.faults), _joined(self.warnings, other.warnings)
        return Verdict(faults, warnings, [*self.general, *other.general])


def judge(facts: Sequence[Facts], wanted: Sequence[str]) -> Verdict:
    """What is wrong with which node.

    Args:
        facts: one a node; of several of one node the first counts.
        wanted: names of the nodes that should have reported; empty when nobody knows. Names count up to their first
            dot, as hosts and schedulers differ in the rest.
    """
    came = {_short(one.node): one for one in reversed(facts)}
    nodes = [one for one in facts if came[_short(one.node)] is one]
    faults = {name: ["did not report"] for name in wanted if _short(name) not in came}
    warnings: dict[str, list[str]] = {}
    known = {_short(name) for name in wanted}
    peers = [*_versions(nodes), *_kinds(nodes), *_off_clocks(nodes)]
    for one in nodes:
        own = [*_gpus(one), *_shm(one), *([one.storage] if one.storage else [])]
        own += [said for node, said in peers if node == one.node]
        if own:
            faults[one.node] = own
        noted = [*_scarce(one), *_slow_clocks(one, nodes)]
        if known and _short(one.node) not in known:
            noted.append("reported, and nobody expected it")
        if noted:
            warnings[one.node] = noted
    return Verdict(faults, warnings)


def _short(name: str) -> str:
    return name.partition(".")[0].lower()


def most_common(values: Iterable[str]) -> tuple[str, int]:
    """The value that most have, the first among equals, and how many have it."""
    return Counter(values).most_common(1)[0]


def _versions(nodes: Sequence[Facts]) -> list[tuple[str, str]]:
    """Whose versions are not those of most nodes."""
    found = []
    for what in sorted({name for one in nodes for name in one.versions}):
        values = {one.node: one.versions.get(what, "none") for one in nodes}
        usual, count = most_common(values.values())
        cure = "Give all nodes the same run file" if what == "settings" else "Install the same on all nodes"
        found += [
            (node, f"has {what} {value}, and {count} of {len(nodes)} nodes have {usual}. {cure}")
            for node, value in values.items()
            if value != usual
        ]
    return found


def _kinds(nodes: Sequence[Facts]) -> list[tuple[str, str]]:
    """Whose GPUs are not those of most nodes."""
    kinds = {one.node: ", ".join(sorted({gpu.name for gpu in one.gpus})) for one in nodes if one.gpus}
    if not kinds:
        return []
    some = f"{len(kinds)} of {len(nodes)} nodes have some"  # where GPUs are promised or there, `_gpus` says more
    bare = [one.node for one in nodes if not (one.gpus or one.promised or one.devices)]
    usual, count = most_common(kinds.values())
    cure = "Ask for nodes of one kind (sbatch --constraint or --gpus-per-node=KIND:N)"
    other = [
        (node, f"has {kind}, and {count} of {len(nodes)} nodes have {usual}. {cure}")
        for node, kind in kinds.items()
        if kind != usual
    ]
    return [*((node, f"has no GPU, and {some}. {cure}") for node in bare), *other]


def _off_clocks(nodes: Sequence[Facts]) -> list[tuple[str, str]]:
    """Whose time is not that of the others; a report may have waited a few seconds for its libraries."""
    if not nodes:
        return []
    middle = median_low(one.time for one in nodes)
    return [
        (
            one.node,
            f"its clock is {abs(one.time - middle):.0f} s {'ahead of' if one.time > middle else 'behind'} the other "
            f"nodes', expected at most {CLOCK_OFF_S:.0f} s: storage refuses signatures of another time. Set it "
            "(chrony)",
        )
        for one in nodes
        if abs(one.time - middle) > CLOCK_OFF_S
    ]


def _gpus(one: Facts) -> list[str]:
    """What is wrong with this node's GPUs."""
    said = []
    torch = one.versions.get("torch", "torch")
    if one.devices and not one.gpus and not one.promised:
        ask = f"Ask the scheduler for them (sbatch --gpus-per-node={one.devices})"
        if one.promised is None:
            ask += f", or install a torch that sees them (this is {torch})"
        said.append(f"has {one.devices} GPUs (/dev/nvidia*), and this job was given none. {ask}")
    elif one.promised is not None and len(one.gpus) < one.promised:
        said.append(
            f"torch sees {len(one.gpus)} of the {one.promised} GPUs that the scheduler gave. Look at nvidia-smi and "
            f"the driver there (torch is {torch}, driver {one.versions.get('driver', 'unknown')})"
        )
    if len({gpu.name for gpu in one.gpus}) > 1:
        said.append(f"has GPUs of several kinds ({', '.join(sorted({gpu.name for gpu in one.gpus}))}). Use one kind")
    said += [
        f"GPU {number} has {gpu.memory_free_gib:.1f} of {gpu.memory_total_gib:.1f} GiB free, expected "
        f"{MEMORY_SHARE:.0%}: another process holds it. Find it with nvidia-smi and end it"
        for number, gpu in enumerate(one.gpus)
        if gpu.memory_free_gib < MEMORY_SHARE * gpu.memory_total_gib
    ]
    said += [
        f"GPU {number} is slowed down by {', '.join(clock.held_down_by)}. Look at its cooling and power"
        for number, clock in enumerate(one.clocks)
        if clock.held_down_by
    ]
    return said


def _shm(one: Facts) -> list[str]:
    if len(one.gpus) < 2 or one.shm_total_gib >= SHM_FAULT_GIB:
        return []
    return [
        f"{SHM} has {one.shm_total_gib * 1024:.0f} MiB, expected 1 GiB: NCCL fails between GPUs of a node without it. "
        "Start the container with --shm-size=8g, or on Kubernetes with an emptyDir of medium Memory there"
    ]


def _scarce(one: Facts) -> list[str]:
    """What may become too little."""
    said = []
    ranks = max(len(one.gpus), 1)
    if len(one.gpus) > 1 and SHM_FAULT_GIB <= one.shm_total_gib < SHM_WARN_GIB:
        said.append(f"{SHM} has {one.shm_total_gib * 1024:.0f} MiB, better 1 GiB: NCCL may need more")
    elif len(one.gpus) > 1 and one.shm_free_gib < SHM_FAULT_GIB <= one.shm_total_gib:
        said.append(f"{SHM} has {one.shm_free_gib * 1024:.0f} MiB left: remove what ended jobs left there")
    if one.memory_free_gib < HOST_GIB_A_RANK * ranks:
        said.append(
            f"{one.memory_free_gib:.1f} GiB of host memory are free, better {HOST_GIB_A_RANK:.0f} GiB for each of "
            f"{ranks} ranks"
        )
    if one.cpus < ranks:
        said.append(f"{one.cpus} CPU cores for {ranks} ranks: raise --cpus-per-task")
    if not one.port:
        said.append("has no free port behind the wanted one. Give another with --port")
    return said


def _slow_clocks(one: Facts, nodes: Sequence[Facts]) -> list[str]:
    """GPUs whose clock was limited, by the usual one of all nodes; where all are of one kind."""
    if len({gpu.name for other in nodes for gpu in other.gpus}) != 1:
        return []
    all_clocks = [clock.max_sm_mhz for other in nodes for clock in other.clocks if clock.max_sm_mhz]
    if not all_clocks:
        return []
    usual = median_low(all_clocks)
    return [
        f"GPU {number} runs at {clock.max_sm_mhz} MHz at most, most of them at {usual} MHz"
        for number, clock in enumerate(one.clocks)
        if 0 < clock.max_sm_mhz < CLOCK_SHARE * usual
    ]


def _grouped(sentences: Mapping[str, Sequence[str]], mark: str) -> list[str]:
    """One line a sentence, with the nodes that have it."""
    nodes: dict[str, list[str]] = {}
    for node, said in sentences.items():
        for sentence in said:
            nodes.setdefault(sentence, []).append(node)
    return [f"{mark}{_some(names)}: {sentence}" for sentence, names in nodes.items()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _joined(one: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {node: [*one.get(node, ()), *other.get(node, ())] for node in [*one, *(n for n in other if n not in one)]}
