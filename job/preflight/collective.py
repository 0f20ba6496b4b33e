"""All-reduces before a run: each node alone, neighbours in pairs, all together; right, and how fast."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from job.config import RunConfig
from job.errors import JobError
from job.group import connect, disconnect, lost_peer
from job.hardware import this_hardware
from job.preflight.facts import Facts
from job.preflight.findings import (
    Found,
    absent,
    broken,
    hung,
    judge_devices,
    judge_opening,
    judge_rounds,
    read_found,
    report,
)
from job.preflight.judge import Verdict, judge
from job.preflight.limit import Budget, within
from job.preflight.meeting import Ended, Meeting
from job.preflight.probe import node_name, probe
from job.preflight.rounds import Node, group_of, nodes_of, rounds_of
from job.world import World

SIZE = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Bytes of an all-reduce: on a GPU enough that bandwidth counts and not latency."""
TIMES = 5
PARTING_S = 2.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What was asked for: the run, seconds for all stages together, names of the nodes in the order of ranks (or none),
    and the port that the nodes' reports are to begin with."""

    config: RunConfig
    limit_s: float
    nodes: Sequence[str]
    port: int


def check(asked: Asked, world: World, say: Say) -> Verdict:
    """Compare the nodes and let the ranks exchange. The first rank's verdict says what was found, the others' no more
    than that there was something.

    The process has to end by `leave` afterwards: a thread of it may hang for good.

    Args:
        say: hears the first rank's report.

    Raises:
        JobError: the ranks cannot meet, or the first rank fell silent.
    """
    device, fault, budget = "cpu", "", Budget(asked.limit_s)
    try:
        device = within(budget.act_s / 2, partial(this_hardware, world.local_rank)).device
    except (JobError, RuntimeError, TimeoutError) as found:  # RuntimeError: CUDA's
        fault = _first_line(found)
    meeting = Meeting(world, budget.left_s)
    try:
        return _Check(asked, world, device, meeting, budget).run(fault, say)
    except Ended as ended:
        return Verdict({}, {}, [str(ended)])
    finally:
        with suppress(JobError):  # the first rank is gone, which has been said
            meeting.part(PARTING_S)


def leave(code: int) -> None:
    """End the process, whatever of it hangs; after a good check the group is closed first."""
    if code == 0:
        disconnect()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Check:
    """The stages. In each, ranks post what they found, the first one decides, and all hear how to go on. The time is
    the first rank's: what is left of it when all have arrived is left to all."""

    def __init__(self, asked: Asked, world: World, device: str, meeting: Meeting, budget: Budget):
        self.asked, self.world, self.device, self.meeting, self.budget = asked, world, device, meeting, budget
        self.nodes: tuple[Node, ...] = ()
        self.took: dict[str, float] = {}

    def run(self, fault: str, say: Say) -> Verdict:
        """All stages; see `check`."""
        verdict = self._arrive(fault)
        if verdict.ok:
            verdict = self._compare(say)
        if verdict.ok:
            verdict = verdict.joined(self._exchange(say))
        return verdict

    def _arrive(self, fault: str) -> Verdict:
        """Who came, where, and on what."""
        world, limit_s = self.world, self.budget.left_s
        place = [node_name(os.environ), world.local_rank, self.device, fault]
        self.meeting.post("arrival", json.dumps(place))
        if world.rank:
            left_s, told = json.loads(self.meeting.hear("arrival", self._patience_s))
            self.budget.give(left_s)
            self.nodes = tuple(Node(name, tuple(ranks)) for name, ranks in told)
            return Verdict({}, {})
        came = self.meeting.collect("arrival", range(world.world_size), limit_s)
        missing = [rank for rank in range(world.world_size) if rank not in came]
        if missing:
            verdict = absent(missing, world.world_size, world.ranks_per_node, self.asked.nodes, limit_s)
        else:
            places = [json.loads(came[rank]) for rank in range(world.world_size)]
            self.nodes = nodes_of([(name, local) for name, local, _, _ in places], self.asked.nodes)
            verdict = judge_devices(self.nodes, [(device, why) for _, _, device, why in places])
        self._took("arrival")
        word = [self.budget.left_s, [(node.name, node.ranks) for node in self.nodes]]
        self.meeting.decide("arrival", json.dumps(word) if verdict.ok else "")
        return verdict

    def _compare(self, say: Say) -> Verdict:
        """What the nodes say about themselves, each by its first rank."""
        if late := self._late("reports"):
            return late
        firsts, limit_s = {node.ranks[0]: node.name for node in self.nodes}, self.budget.act_s
        if self.world.rank in firsts:
            asked, answers_s = self.asked, limit_s - self.budget.margin_s / 2
            with suppress(TimeoutError):  # a driver that hangs; the first rank misses the report
                found = within(limit_s, lambda: probe(asked.config, os.environ, asked.port, say, answers_s))
                self.meeting.post("reports", found.to_json())
        if self.world.rank:
            self.meeting.hear("reports", self._patience_s)
            return Verdict({}, {})
        came = self.meeting.collect("reports", firsts, self.budget.left_s)
        silent = {name: [f"no report within {limit_s:.0f} s"] for rank, name in firsts.items() if rank not in came}
        facts = [_launched(Facts.parse(line), firsts[rank]) for rank, line in came.items()]
        verdict = Verdict(silent, {}).joined(judge(facts, ()))
        self._took("reports")
        self.meeting.decide("reports", "on" if verdict.ok else "")
        return verdict

    def _exchange(self, say: Say) -> Verdict:
        """All rounds, as far as they can go."""
        opening = "opening"
        if late := self._late(opening):
            return late
        opened = self._stage(opening, self._open)
        if self.world.rank == 0 and broken(opened, self.world.world_size):
            return judge_opening(self.nodes, opened)
        results = []
        for round_ in rounds_of(self.nodes):
            if late := self._late(round_.name):
                break
            group = group_of(round_, self.world.rank)
            act = partial(exchange, group.ranks, self.world, self.device) if group else Found
            found = self._stage(round_.name, act)
            results.append((round_, found))
            if self.world.rank == 0 and broken(found, self.world.world_size):
                break
        if self.world.rank:
            self.meeting.hear("verdict", self._patience_s)
            return Verdict({}, {})
        for line in report(SIZE[self.device], results):
            say(line)
        if self.world.world_size > 1:
            say(f"  seconds: {', '.join(f'{stage} {took_s:.1f}' for stage, took_s in self.took.items())}")
        verdict = judge_rounds(self.nodes, results, self.device == "cuda").joined(late or Verdict({}, {}))
        self.meeting.decide("verdict", "on" if verdict.ok else "")
        return verdict

    def _open(self) -> Found:
        connect(self.world, self.device)
        return Found()

    def _stage(self, stage: str, act: Callable[[], Found]) -> dict[int, Found]:
        """What each rank's `act` found, on the first rank; the others have their own alone."""
        limit_s = self.budget.act_s
        try:
            mine = within(limit_s, act)
        except TimeoutError:
            mine = hung(limit_s)
        except Exception as fault:  # torch and its backends raise many kinds
            mine = Found(fault=_first_line(fault), lost_peer=lost_peer(fault))
        self.meeting.post(stage, mine.to_json())
        if self.world.rank:
            self.meeting.hear(stage, self._patience_s)
            return {self.world.rank: mine}
        notes = self.meeting.collect(stage, range(self.world.world_size), self.budget.left_s)
        found = {rank: read_found(note) for rank, note in notes.items()}
        self._took(stage)
        self.meeting.decide(stage, "" if broken(found, self.world.world_size) else "on")
        return found

    @property
    def _patience_s(self) -> float:
        """How long to wait for the first rank's word, which comes by the end of the time: then it is gone."""
        return self.budget.left_s + self.budget.margin_s + PARTING_S

    def _took(self, stage: str) -> None:
        self.took[stage] = self.budget.passed_s - sum(self.took.values())

    def _late(self, stage: str) -> Verdict | None:
        """The end of the check on the first rank, when too little time is left for a stage to tell good from bad."""
        if self.world.rank or not self.budget.short:
            return None
        self.meeting.decide(stage, "")
        most = max(self.took, key=lambda name: self.took[name])
        return Verdict(
            {},
            {},
            [
                f"the check stopped before its stage {stage!r}: of {self.budget.seconds:.0f} s for all of them, {most} "
                f"took {self.took[most]:.0f} s. Give it more (--timeout; on SLURM QLORA_PREFLIGHT_S)"
            ],
        )


def exchange(ranks: Sequence[int], world: World, device: str) -> Found:
    """All-reduce among these ranks: once to warm up, then timed, each time from fresh numbers that are checked before
    and after.

    The bus bandwidth is nccl-tests' (doc/PERFORMANCE.md there): 2(n-1)/n * bytes / time, which is what a link carries
    whatever the number n of ranks; here of the median time.
    """
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)  # a thread has its own
    # named by their ranks, so that nobody but them need wait
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    nbytes = SIZE[device]
    base = (torch.arange(nbytes // 4, dtype=torch.int32, device=device) % 251).float()
    own = float(world.rank % 64)  # whole numbers, and sums that fp32 holds exactly on up to 50 thousand ranks
    expected = base * len(ranks) + float(sum(rank % 64 for rank in ranks))
    buffer = torch.empty_like(base)
    tick = torch.zeros(1, device=device)
    before = after = 0
    times = []
    for _ in range(1 + TIMES):
        torch.add(base, own, out=buffer)
        before = max(before, int((buffer - own != base).sum()))
        dist.all_reduce(tick, group=group)  # all begin at once: who waits would measure the others' checking
        _wait(device)
        begun = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        _wait(device)
        times.append(time.perf_counter() - begun)
        after = max(after, int((buffer != expected).sum()))
    count = len(ranks)
    gbps = 2 * (count - 1) / count * nbytes / median(times[1:]) / 1e9
    return Found(gbps, before, after)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _launched(facts: Facts, node: str) -> Facts:
    """The report under the name that the launcher's order gives the node. Where there are no GPUs, CUDA_VISIBLE_DEVICES
    is no promise: deepspeed's launcher sets it to its ranks, on CPUs too."""
    bare = not facts.devices and not facts.gpus
    return replace(facts, node=node, promised=None if bare else facts.promised)


def _first_line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0][:300] if lines else ''}"
