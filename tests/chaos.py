"""Runs on S3 whose ranks are killed at random moments."""

import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import Faults
from tests.forked import Command
from tests.place import STEPS, Place
from tests.ranks import free_port

RANKS = 2
PART = re.compile(r"PUT \S*/checkpoints/step-(\d+)/(?!manifest)")
FINISHED = "This run is finished already"
WORDS = re.compile(rf"going on after step \d+|starting from the beginning|{FINISHED}")
DELAY_S = 0.03
UPLOAD_S = 0.6
"""Seconds that a checkpoint of this run takes through a proxy with that delay."""
ALONE_S = 15.0
"""Seconds in which a rank whose peer was killed ends by itself; one that still waits for it to connect does not."""
LANDED_S = 0.3
"""Seconds after which what dead ranks had under way has arrived, or never will."""
BEFORE, INSIDE, STARTING, ELSEWHERE = (
    "before the first checkpoint",
    "while a checkpoint was written",
    "while it started again",
    "elsewhere",
)


@contextmanager
def started(path: Path, env: dict[str, str], ranks: int = RANKS) -> Iterator[list[Command]]:
    """`qlora train` in processes that know of each other; gone at the end."""
    here = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with ExitStack() as stack:
        commands = []
        for rank in range(ranks):
            about = {**here, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
            variables = {name: str(value) for name, value in about.items()} | env
            commands.append(stack.enter_context(Command("train", path, env=variables)))
        yield commands


def finish(path: Path, env: dict[str, str], ranks: int = RANKS) -> tuple[float, float]:
    """Run to the end: seconds until its first step, and in all."""
    began = time.monotonic()
    with started(path, env, ranks) as commands:
        commands[0].wait_for(f"step 1/{STEPS}", 300)
        first_s = time.monotonic() - began
        ended(commands)
    return first_s, time.monotonic() - began


def ended(commands: Sequence[Command]) -> str:
    """Wait for a good end; what the first rank said."""
    done = [command.wait(300) for command in commands]
    assert [one.code for one in done] == [0] * len(done), "\n".join(one.err for one in done)
    return done[0].err


def steps_put(log: Sequence[str]) -> list[int]:
    """Steps of which these requests wrote a part."""
    return sorted({int(match[1]) for line in log if (match := PART.match(line))})


@dataclass
class Tally:
    """What killing came to.

    Attributes:
        kills: (ranks, where in the run) of each.
        runs: that were finished in the end.
        repeated: steps that were done again.
        resumes_s: seconds from a start to the word that it goes on, or begins anew.
        alone_s: seconds until a rank that was left ended by itself.
        waiting: ranks that were left and had to be ended, since they waited for the other to connect.
        left: what ranks that were left said.
    """

    kills: list[tuple[tuple[int, ...], str]] = field(default_factory=list)
    runs: int = 0
    repeated: int = 0
    resumes_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    waiting: int = 0
    left: list[str] = field(default_factory=list)

    def count(self, where: str) -> int:
        """Kills there."""
        return sum(where == other for _, other in self.kills)


class Killer:
    """Starts a run again and again and kills it each time at a random moment.

    Args:
        faults: those of the proxy between the run and its storage.
        first_s, all_s: seconds that an undisturbed run takes until its first step, and in all.
    """

    def __init__(self, seed: int, faults: Faults, first_s: float, all_s: float):
        self.chance, self.faults, self.tally = random.Random(seed), faults, Tally()
        self.first_s, self.step_s = first_s, (all_s - first_s) / STEPS

    def run(self, place: Place, path: Path, env: dict[str, str], kills: int) -> None:
        """Kill it so many times, unless it is finished before, then let it finish, and look at what it leaves.

        Each start must say that it goes on after the newest step that is complete then, and none that was complete at a
        kill may be lost.
        """
        last, known, reached = len(self.tally.kills) + kills, 0, 0
        while True:
            newest = place.newest()
            assert newest >= known, f"step {known} was complete at the kill, {newest} is the newest after it"
            self.tally.repeated += max(reached - newest, 0)
            word = FINISHED if place.finished() else self._word(place, newest)
            seen = len(self.faults.log)
            with started(path, env) as commands:
                due = self._due(newest, seen) if len(self.tally.kills) < last else lambda: False
                resumed = self._watch(commands, word, due)
                if not all(command.process.is_alive() for command in commands):
                    said = ended(commands)
                    assert not word or word in said, f"expected {word!r}: {said}"
                    self.tally.runs += 1
                    place.check_tidy(late=newest == STEPS)
                    return
                known, reached = self._kill(place, commands, seen, resumed)
                self._leave(commands)
            time.sleep(LANDED_S)

    def _word(self, place: Place, newest: int) -> str:
        """What the next start has to say; empty for the first."""
        if newest:
            return f"going on after step {newest}"
        return "starting from the beginning" if "run.yaml" in place.files() else ""

    def _due(self, newest: int, seen: int) -> Callable[[], bool]:
        """When to kill: at any moment of what is left of the run, or at one while a checkpoint is written.

        Args:
            newest: the step from which it goes on.
            seen: requests before this start.
        """
        if self.chance.random() < 0.5:
            at = time.monotonic() + self.chance.uniform(0, self.first_s + self.step_s * (STEPS - newest))
            return lambda: time.monotonic() >= at
        number, later_s = self.chance.randint(1, 2), self.chance.uniform(0, UPLOAD_S)
        begun: list[float] = []

        def inside() -> bool:
            if not begun and len(steps_put(self.faults.log[seen:])) >= number:
                begun.append(time.monotonic())
            return bool(begun) and time.monotonic() >= begun[0] + later_s

        return inside

    def _watch(self, commands: Sequence[Command], word: str, due: Callable[[], bool]) -> bool:
        """Wait until it is due, or a rank has ended; whether the run has said where it goes on."""
        began, resumed = time.monotonic(), False
        while not due() and all(command.process.is_alive() for command in commands):
            if not resumed and (said := WORDS.search(commands[0].said())):
                assert said[0] == word, f"{said[0]!r}, expected {word!r}"
                self.tally.resumes_s.append(time.monotonic() - began)
                resumed = True
            time.sleep(0.01)
        return resumed

    def _kill(self, place: Place, commands: Sequence[Command], seen: int, resumed: bool) -> tuple[int, int]:
        """Kill one rank or all; the step that is complete just after, and the one that was reached."""
        whom = self.chance.choice([(0,), (1,), (0, 1)])
        for rank in whom:
            commands[rank].send(signal.SIGKILL)
        put, newest = steps_put(self.faults.log[seen:]), place.newest()
        if put and put[-1] > newest:
            where = INSIDE
        elif not newest:
            where = BEFORE
        else:
            where = ELSEWHERE if resumed or put else STARTING
        self.tally.kills.append((whom, where))
        steps = re.findall(rf"^step (\d+)/{STEPS}", commands[0].said(), re.MULTILINE)
        return newest, int(steps[-1]) if steps else 0

    def _leave(self, commands: Sequence[Command]) -> None:
        """Have all ranks end, by themselves when they can."""
        began = time.monotonic()
        for command in commands:
            command.process.join(max(began + ALONE_S - time.monotonic(), 0))
            if command.process.is_alive():
                self.tally.waiting += 1
            elif command.process.exitcode != -signal.SIGKILL:
                self.tally.alone_s.append(time.monotonic() - began)
                self.tally.left.append(command.said())
