"""Going on where the newest usable checkpoint stands, on these ranks or on others."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from job.checkpoint import Checkpoints, Manifest, Unusable
from job.config import RunConfig, changes, parse_config
from job.engine import Engine
from job.errors import DataError, OutputError
from job.group import everyone, on_first_rank, shown, told
from job.plan import Plan
from job.progress import Progress
from job.record import Record
from job.saved import BEST, RANK, RUN, RankState, RunState, parse_adapter, set_random_states
from job.saving import Point
from job.sinks import METRICS, cut_metrics, forget_metrics
from job.state import Flat, Placed, plain
from job.uploads import patiently
from job.world import World

Say = Callable[[str], None]
Patiently = Callable[[Callable[[], Any], str], Any]
"""Tries again while the storage fails: (act, what it does)."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint. Each rank holds what it read: the states of ranks that wrote it, by their number, and the
    first the best adapter, None on others or without one."""

    manifest: Manifest
    state: RunState
    ranks: dict[int, RankState]
    best: dict[str, torch.Tensor] | None


def find(checkpoints: Checkpoints, steps: Sequence[int], world: World, say: Say, patiently: Patiently) -> Found | None:
    """The newest complete checkpoint whose parts are all what its manifest says; None when there is none.

    Rank i's part is read by rank i modulo the ranks, so that a checkpoint is read once, and as many ranks as wrote it
    read their own. What is skipped is said.

    Args:
        steps: those that have a folder, the newest first.
    """
    for step in steps:
        found = _verified(checkpoints, step, world, patiently)
        if isinstance(found, Found):
            return found
        say(f"skipping the checkpoint of step {step}: {found}")
    return None


def _verified(checkpoints: Checkpoints, step: int, world: World, patiently: Patiently) -> Found | str:
    manifest = on_first_rank(world, lambda: _or_why(lambda: checkpoints.manifest(step), patiently))
    if isinstance(manifest, str):
        return manifest
    read = _or_why(lambda: _read(checkpoints, manifest, world), patiently)
    whys = [said for said in everyone(world, read if isinstance(read, str) else None) if said]
    if whys:
        return whys[0]
    state, ranks, best = read
    return Found(manifest, told(world, 0, state), ranks, best)


def _read(
    checkpoints: Checkpoints, manifest: Manifest, world: World
) -> tuple[RunState | None, dict[int, RankState], dict[str, torch.Tensor] | None]:
    """This rank's share of a checkpoint; the run's own numbers and the best adapter are the first's.

    Raises:
        Unusable: a part is missing, damaged, or lacks something; says which.
    """

    def content(kind: str) -> bytes:
        stem = kind.partition(".")[0]
        part = next((part for part in manifest.parts if part.name.startswith(f"{stem}-")), None)
        if part is None:
            raise Unusable(f"it has no {kind}")
        return checkpoints.read(manifest.step, part)

    state, best = None, None
    if world.rank == 0:
        state = RunState.parse(content(RUN))
        if state.counters["kept_eval"] is not None:
            best = parse_adapter(content(BEST))
    written = sum(part.name.startswith(RANK) for part in manifest.parts)
    if state and state.world_size != written:
        raise Unusable(f"it has parts of {written} ranks, expected {state.world_size}")
    mine = range(world.rank, written, world.world_size)
    return state, {rank: RankState.parse(content(f"{RANK}{rank:05d}")) for rank in mine}, best


def _or_why(act: Callable[[], Any], patiently: Patiently) -> Any:
    """What it gives, or in a sentence why that cannot be used."""
    try:
        return patiently(act, "checkpoint")
    except Unusable as fault:
        return str(fault)


def restore(
    found: Found, engine: Engine, progress: Progress, plan: Plan, config: RunConfig, rows: str, world: World, say: Say
) -> None:
    """Put everything where the checkpoint has it; every rank calls.

    Args:
        rows: the fingerprint of the training data.

    Raises:
        OutputError: the checkpoint belongs to a run with other fixed settings, or lacks some of what is trained.
        DataError: the rows are others.
    """
    step, state = found.manifest.step, found.state
    _refuse_another_run(state, config, step)
    if state.rows != rows:
        raise DataError(
            f"data.train: the rows are not those that the checkpoint of step {step} was trained on. Bring them back, "
            "or use another output.url"
        )
    mine = found.ranks.get(world.rank)
    fits = mine is not None and engine.trained.same(mine.flats)
    if state.world_size == world.world_size and all(everyone(world, fits)):
        assert mine is not None
        engine.trained.write(mine.flats)
        set_random_states(mine.random)
    else:
        said = f"from {state.world_size} ranks under {state.strategy} to {world.world_size} under {plan.zero.strategy}"
        engine.trained.write(_from_others(found, engine, world, said, say))
    engine.restore_scaler(state.scaler)
    progress.restore(state.counters, shown(world, 0, found.best) if config.evaluation.keep_best else {})
    if not config.evaluation.keep_best:
        progress.kept_eval = None
    if state.schedule["steps"] != plan.steps:
        say(f"the schedule now ends after step {plan.steps}, it was {state.schedule['steps']}")
    say(f"going on after step {step}")


def _refuse_another_run(state: RunState, config: RunConfig, step: int) -> None:
    old = parse_config(json.dumps(state.settings), source=f"the checkpoint of step {step}")
    fixed = [change for change in changes(old, config) if change.rule == "fixed"]
    if fixed:
        listed = "\n  ".join(map(str, fixed))
        raise OutputError(
            f"output.url: the checkpoint of step {step} belongs to a run with other fixed settings\n  {listed}\n"
            "  Use another output.url, or set these back to what they were"
        )


def _from_others(found: Found, engine: Engine, world: World, said: str, say: Say) -> list[Flat]:
    """This rank's buffers, out of those of all ranks that wrote.

    Raises:
        OutputError: some rank's are not whole.
    """
    places = engine.trained.places()
    eight_bits = False
    for number in range(found.state.world_size):
        source = number % world.world_size
        theirs = found.ranks[number].flats if world.rank == source else None
        mine = None if theirs is None else [(flat.pieces, flat.steps) for flat in theirs]
        for place, (pieces, steps) in enumerate(told(world, source, mine)):
            own = theirs[place] if theirs else None
            eight_bits |= own is not None and any(value.dtype == torch.uint8 for value in own.tensors.values())
            places.take(Flat(pieces, steps, shown(world, source, plain(own).tensors if own else None)))
    rounded = ", moments in 8 bits are rounded again" if any(everyone(world, eight_bits)) else ""
    say(f"the optimizer's state is spread anew, {said}{rounded}")
    return _whole(places, f"the checkpoint of step {found.manifest.step}", world)


def _whole(places: Placed, source: str, world: World) -> list[Flat]:
    """The filled buffers; one rank's refusal is every rank's, or the others would wait for it."""
    flats, refusal = [], None
    try:
        flats = places.flats(source)
    except OutputError as fault:
        refusal = fault
    refusals = [fault for fault in everyone(world, refusal) if fault]
    if refusals:
        raise refusals[0]
    return flats


@dataclass(frozen=True)
class Start:
    """Where training starts. `metrics` are the lines of metrics.jsonl up to there, on the first rank; `stale` are the
    steps behind it that have a folder, of which nothing can be used."""

    point: Point
    metrics: list[bytes]
    stale: frozenset[int]


def go_on(record: Record, engine: Engine, plan: Plan, config: RunConfig, rows: str, say: Say) -> Start:
    """From the newest usable checkpoint, or from the beginning; every rank calls.

    Args:
        rows: the fingerprint of the training data.

    Raises:
        InputError: see `restore`.
        JobError: the storage cannot be read for storage.retry_minutes.
    """
    world, store = record.world, record.run.store

    def patient(act: Callable[[], Any], what: str) -> Any:
        return patiently(act, what, record.retry_s, record.say, store, done="read")

    checkpoints = Checkpoints(store)
    steps = on_first_rank(world, lambda: patient(checkpoints.steps, "list of checkpoints"))
    found = find(checkpoints, steps, world, say, patient)
    record.run.checkpoint = found.manifest.step if found else 0
    if found is None:
        if record.run.old is not None:
            say(f"no usable checkpoint in {store.url}: starting from the beginning")
            on_first_rank(world, lambda: patient(lambda: forget_metrics(store), METRICS))
        return Start(Point.of(record.progress, {}), [], frozenset(steps))
    restore(found, engine, record.progress, plan, config, rows, world, say)
    kept: list[bytes] = []
    on_first_rank(world, lambda: kept.extend(patient(lambda: cut_metrics(store, found.manifest.step), METRICS)))
    stale = frozenset(step for step in steps if step > found.manifest.step)
    return Start(Point.of(record.progress, found.state.cursor), kept, stale)
