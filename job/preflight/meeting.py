"""Where ranks tell the first one what they found, through a store of their own: it works where collectives hang."""

import time
from collections.abc import Collection
from functools import partial
from typing import Any

import torch.distributed as dist

from job.errors import JobError
from job.group import meet
from job.world import World

PAUSE_S = 0.1


class Ended(JobError):
    """The first rank ended the check, and has said why."""


class Meeting:
    """The ranks' notes on each stage, and the first rank's word on how to go on.

    Args:
        limit_s: seconds until the first rank has to be there.

    Raises:
        InputError: the environment does not say where to meet.
        JobError: the first rank cannot be reached, or its port is taken.
    """

    def __init__(self, world: World, limit_s: float):
        self.world = world
        self._silent: set[int] = set()
        self._store: Any = dist.PrefixStore("preflight", meet(world, limit_s))  # type: ignore[attr-defined]

    def post(self, stage: str, note: str) -> None:
        """Leave this rank's note."""
        self._call(lambda: self._store.set(f"{stage}/{self.world.rank}", note))

    def collect(self, stage: str, ranks: Collection[int], limit_s: float) -> dict[int, str]:
        """The notes of these ranks, without those that did not come in time."""
        keys = {rank: f"{stage}/{rank}" for rank in ranks}
        if not self._came(list(keys.values()), limit_s):
            keys = {rank: key for rank, key in keys.items() if self._call(partial(self._store.check, [key]))}
            self._silent |= set(ranks) - set(keys)
        return {rank: self._store.get(key).decode() for rank, key in keys.items()}

    def decide(self, stage: str, word: str) -> None:
        """The first rank's word; an empty one ends the check."""
        self._call(lambda: self._store.set(f"{stage}/word", word))

    def hear(self, stage: str, limit_s: float) -> str:
        """The first rank's word on a stage.

        Raises:
            Ended: it ends the check.
            JobError: it did not come.
        """
        if not self._came([f"{stage}/word"], limit_s):
            raise JobError(f"preflight: the first rank fell silent during {stage}. What it said tells why")
        word = str(self._call(lambda: self._store.get(f"{stage}/word")).decode())
        if not word:
            raise Ended(f"preflight: the first rank ended the check after {stage}")
        return word

    def part(self, limit_s: float) -> None:
        """Let the others go first: the first rank's process holds the store."""
        self.post("end", "")
        if self.world.rank == 0:
            others = set(range(self.world.world_size)) - self._silent
            self._came([f"end/{rank}" for rank in others], limit_s)

    def _came(self, keys: list[str], limit_s: float) -> bool:
        """Whether all are there in time; asks again and again, since torch writes pages about a wait that ends."""
        end = time.monotonic() + limit_s
        while not self._call(lambda: self._store.check(keys)):
            if time.monotonic() > end:
                return False
            time.sleep(PAUSE_S)
        return True

    def _call(self, act: Any) -> Any:
        try:
            return act()
        except RuntimeError as fault:
            raise self._gone() from fault

    def _gone(self) -> JobError:
        return JobError("preflight: the first rank's process has ended. What it said tells why")
