"""When a checkpoint is due, and how it comes about: copied between two steps, written while training goes on."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from job.checkpoint import Checkpoints, Manifest, Part
from job.config import RunConfig, fixed_hash, without_signatures
from job.data.batches import GlobalBatch
from job.engine import Engine
from job.errors import JobError
from job.group import PostBox, any_of, everyone
from job.plan import Plan
from job.progress import Progress
from job.record import Record
from job.saved import BEST, RANK, RUN, RankState, RunState, adapter_content, random_states
from job.store import reason
from job.uploads import passes


@dataclass(frozen=True)
class Point:
    """Where a run stands between two steps: the counters of progress, and where its data goes on."""

    counters: dict[str, Any]
    cursor: Mapping[str, Any]
    eval_loss: float | None

    @classmethod
    def of(cls, progress: Progress, cursor: Mapping[str, Any]) -> "Point":
        """Where this progress stands."""
        judged = progress.last_eval if progress.evaluated_at == progress.step else None
        return cls(progress.counters(), cursor, judged)

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.counters["step"])


class Saver:
    """Takes checkpoints; every rank has one and calls alike.

    Args:
        engine, plan, config: of the run.
        rows: the fingerprint of the training data.
        record: of the run, with this rank's uploads and on the first rank its lease.
        flush: hands metrics of the steps so far to the uploads.
        start: where the run starts, which needs no checkpoint.
        stale: steps whose checkpoints are unusable, and replaced.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        config: RunConfig,
        rows: str,
        record: Record,
        flush: Callable[[], None],
        start: Point,
        stale: Collection[int],
    ):
        self.engine, self.plan, self.config, self.rows = engine, plan, config, rows
        self.record, self.world, self.uploads, self.lease = record, record.world, record.uploads, record.lease
        self.checkpoints, self.flush = Checkpoints(record.run.store), flush
        self.stale, self.notes = set(stale), PostBox(self.world)
        self.good = self.last = start
        self.saved, self.wanted = start.step, False
        self.taken_at = time.monotonic()

    def after_step(self, progress: Progress, batch: GlobalBatch) -> None:
        """Take a checkpoint if one is due and the last one is written; every rank calls after every step.

        Raises:
            JobError: another run took the output folder over.
        """
        self.last = Point.of(progress, batch.cursor)
        whole = not (progress.skipped or progress.left_out)
        if whole:
            self.good = self.last
        lost = self.lease is not None and self.lease.lost is not None
        clock, busy, lost = any_of(self.world, self._by_the_clock(), not self.uploads.idle, lost)
        if lost:
            raise JobError((self.lease and self.lease.lost) or "another run has taken output.url over")
        best = self.config.checkpoint.keep_best and progress.at_its_best
        if best and busy:  # the weights of this very step are to be kept
            self._wait()
            busy = False
        self.wanted = self.wanted or clock or best or self._due(progress, batch)
        if self.wanted and not busy and whole:
            self._take(self.good, progress.adapter)

    def rescue(self, progress: Progress) -> None:
        """Before a run fails because its steps are left out: have a checkpoint from before them."""
        self._settle(self.good, progress.adapter)

    def finish(self, progress: Progress) -> None:
        """Have a checkpoint of where the run stands; returns when it is complete.

        Raises:
            JobError: it could not be written for storage.retry_minutes.
        """
        if progress.step:
            self._settle(self.last, progress.adapter)
            if self.world.rank == 0:  # what a run that was killed before that left, too
                self.uploads.put("removal of older checkpoints", self._retain, self.checkpoints.store)

    def _settle(self, point: Point, adapter: Mapping[str, Any]) -> None:
        self._wait()
        if self.saved != point.step:
            self._take(point, adapter)
            self._wait()

    def _wait(self) -> None:
        fault: JobError | None = None
        try:
            self.uploads.wait(math.inf)
        except JobError as found:
            fault = found
            self.notes.post(self._about(self.saved), f"!{found}")
        faults = [found for found in everyone(self.world, fault) if found is not None]
        if faults:
            raise fault or faults[0]

    def _by_the_clock(self) -> bool:
        every = self.config.checkpoint.every_minutes
        return self.world.rank == 0 and every is not None and time.monotonic() - self.taken_at > 60 * every

    def _due(self, progress: Progress, batch: GlobalBatch) -> bool:
        checkpoint = self.config.checkpoint
        by_steps = checkpoint.every_steps is not None and progress.step % checkpoint.every_steps == 0
        by_epoch = checkpoint.every_epoch and float(batch.epoch).is_integer()
        return by_steps or by_epoch

    def _take(self, point: Point, adapter: Mapping[str, Any]) -> None:
        """Copy what trains, and queue its writing."""
        mine = RankState(self.engine.trained.read(), random_states(self.plan.device))
        content: dict[str, Callable[[], bytes]] = {f"{RANK}{self.world.rank:05d}.safetensors": mine.content}
        if self.world.rank == 0:
            content[RUN] = self._run_state(point).content
            if point.counters["kept_eval"] is not None:
                content[BEST] = lambda: adapter_content(adapter)
            self.flush()
        what = f"checkpoint of step {point.step}"
        self.uploads.put(what, lambda: self._write(point.step, content), self.checkpoints.store)
        if self.world.rank == 0:
            self.uploads.put(what, lambda: self._publish(point), self.checkpoints.store)
        self.saved, self.wanted, self.taken_at = point.step, False, time.monotonic()

    def _run_state(self, point: Point) -> RunState:
        plan = self.plan
        return RunState(
            counters=point.counters,
            cursor=dict(point.cursor),
            rows=self.rows,
            schedule={"steps": plan.steps, "warmup_steps": plan.warmup_steps, "kind": plan.schedule},
            scaler=self.engine.scaler(),
            settings=without_signatures(self.config),
            fixed=fixed_hash(self.config),
            world_size=self.world.world_size,
            strategy=plan.zero.strategy,
        )

    def _about(self, step: int) -> str:
        return f"checkpoint/{step}"

    def _write(self, step: int, content: Mapping[str, Callable[[], bytes]]) -> None:
        parts = [self.checkpoints.write(step, kind, made()) for kind, made in content.items()]
        self.notes.post(self._about(step), json.dumps([dataclasses.astuple(part) for part in parts]))

    def _publish(self, point: Point) -> None:
        """Wait for the parts of all ranks, then make the checkpoint complete."""
        while (notes := self.notes.collect(self._about(point.step))) is None:
            if self.uploads.closed or self.record.failing:
                return
            time.sleep(0.02)
        if failed := [note[1:] for note in notes if note.startswith("!")]:
            raise JobError(failed[0])
        parts = tuple(Part(*part) for note in notes for part in json.loads(note))
        if self.lease is not None:
            self.lease.check()
        manifest = Manifest(point.step, fixed_hash(self.config), point.eval_loss, parts)
        conditional = self.config.storage.lease
        if not self.checkpoints.publish(manifest, point.step in self.stale, conditional):
            raise JobError(f"another run wrote the checkpoint of step {point.step}. Use another output.url")
        self.stale.discard(point.step)
        self.record.checkpointed(point.step)
        self._retain()

    def _retain(self) -> None:
        """Remove what need not stay; that it cannot be removed spoils no checkpoint."""
        checkpoint = self.config.checkpoint
        try:
            self.checkpoints.retain(checkpoint.keep, checkpoint.keep_best, self.stale)
        except Exception as fault:
            if not passes(fault) and not isinstance(fault, OSError):
                raise
            self.record.say(f"older checkpoints cannot be removed: {reason(fault)}")
