"""Going on where the newest usable checkpoint stands, on these ranks or on others."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from job.checkpoint import Checkpoints, Manifest, Part, Unusable
from job.config import RunConfig, changes, parse_config
from job.engine import Engine
from job.errors import DataError, OutputError
from job.group import everyone, on_first_rank, shown, told
from job.plan import Plan
from job.progress import Progress
from job.record import Record
from job.saved import BEST, RANK, RUN, RankState, RunState, parse_adapter, set_random_states
from job.saving import Point
from job.sinks import cut_metrics, forget_metrics
from job.state import Flat, plain
from job.uploads import patiently
from job.world import World

Say = Callable[[str], None]
Patiently = Callable[[Callable[[], Any], str], Any]
"""Tries again while the storage fails: (act, what it does)."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint; of `content` each rank holds the parts that it read, by their number."""

    manifest: Manifest
    parts: tuple[Part, ...]
    content: dict[int, bytes]
    state: RunState


def find(checkpoints: Checkpoints, world: World, say: Say, patiently: Patiently) -> Found | None:
    """The newest complete checkpoint whose parts are all what its manifest says; None when there is none.

    Part i is read by rank i modulo the ranks, so that a checkpoint is read once, and as many ranks as wrote it read
    their own. What is skipped is said.
    """
    for step in on_first_rank(world, lambda: patiently(checkpoints.steps, "list of checkpoints")):
        found = _verified(checkpoints, step, world, patiently)
        if isinstance(found, Found):
            return found
        say(f"skipping the checkpoint of step {step}: {found}")
    return None


def _verified(checkpoints: Checkpoints, step: int, world: World, patiently: Patiently) -> Found | str:
    manifest = on_first_rank(world, lambda: _or_why(lambda: checkpoints.manifest(step), patiently))
    if isinstance(manifest, str):
        return manifest
    # the ranks' parts first: rank r then reads what rank r wrote
    parts = tuple(sorted(manifest.parts, key=lambda part: (not part.name.startswith(RANK), part.name)))
    content: dict[int, bytes] = {}
    why = None
    for number in range(world.rank, len(parts), world.world_size):
        read = _or_why(lambda part=parts[number]: checkpoints.read(step, part), patiently)  # type: ignore[misc]
        if isinstance(read, str):
            why = read
            break
        content[number] = read
    if whys := [said for said in everyone(world, why) if said]:
        return whys[0]
    place = _number(parts, RUN)
    if place is None:
        return f"it has no {RUN}"
    own = content.get(place)
    state = told(world, place % world.world_size, None if own is None else _or_why(lambda: RunState.parse(own)))
    if isinstance(state, RunState) and state.counters["kept_eval"] is not None and _number(parts, BEST) is None:
        return f"it has no {BEST}"
    return state if isinstance(state, str) else Found(manifest, parts, content, state)


def _or_why(act: Callable[[], Any], patiently: Patiently = lambda act, what: act()) -> Any:
    """What it gives, or in a sentence why that cannot be used."""
    try:
        return patiently(act, "checkpoint")
    except Unusable as fault:
        return str(fault)


def _number(parts: Sequence[Part], kind: str) -> int | None:
    stem = kind.partition(".")[0]
    return next((number for number, part in enumerate(parts) if part.name.startswith(f"{stem}-")), None)


def restore(
    found: Found, engine: Engine, progress: Progress, plan: Plan, config: RunConfig, rows: str, world: World, say: Say
) -> None:
    """Put everything where the checkpoint has it; every rank calls.

    Args:
        rows: the fingerprint of the training data.

    Raises:
        OutputError: the checkpoint belongs to a run with other fixed settings.
        DataError: the rows are others.
    """
    step, state = found.manifest.step, found.state
    _refuse_another_run(state, config, step)
    if state.rows != rows:
        raise DataError(
            f"data.train: the rows are not those that the checkpoint of step {step} was trained on. Bring them back, "
            "or use another output.url"
        )
    own = found.content.get(world.rank) if world.rank < state.world_size else None
    mine = RankState.parse(own) if own else None
    fits = mine is not None and engine.trained.same(mine.flats)
    if state.world_size == world.world_size and all(everyone(world, fits)):
        assert mine is not None
        engine.trained.write(mine.flats)
        set_random_states(mine.random)
    else:
        said = f"from {state.world_size} ranks under {state.strategy} to {world.world_size} under {plan.zero.strategy}"
        engine.trained.write(_from_others(found, engine, world, said, say))
    engine.restore_scaler(state.scaler)
    progress.restore(state.counters, _best(found, world) if config.evaluation.keep_best else {})
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
    """This rank's buffers, out of those of all ranks that wrote."""
    places = engine.trained.places()
    eight_bits = False
    for number in range(found.state.world_size):
        source = number % world.world_size
        theirs = RankState.parse(found.content[number]).flats if world.rank == source else None
        mine = None if theirs is None else [(flat.pieces, flat.steps) for flat in theirs]
        for place, (pieces, steps) in enumerate(told(world, source, mine)):
            own = theirs[place] if theirs else None
            eight_bits |= own is not None and any(value.dtype == torch.uint8 for value in own.tensors.values())
            places.take(Flat(pieces, steps, shown(world, source, plain(own).tensors if own else None)))
    rounded = ", moments in 8 bits are rounded again" if any(everyone(world, eight_bits)) else ""
    say(f"the optimizer's state is spread anew, {said}{rounded}")
    return places.flats()


def _best(found: Found, world: World) -> dict[str, torch.Tensor]:
    number = _number(found.parts, BEST)
    if number is None:
        return {}
    source = number % world.world_size
    return shown(world, source, parse_adapter(found.content[number]) if world.rank == source else None)


@dataclass(frozen=True)
class Start:
    """Where training starts; `metrics` are the lines of metrics.jsonl up to there, on the first rank."""

    point: Point
    metrics: list[bytes]


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

    found = find(Checkpoints(store), world, say, patient)
    if found is None:
        if record.run.old is not None:
            say(f"no usable checkpoint in {store.url}: starting from the beginning")
            on_first_rank(world, lambda: forget_metrics(store))
        return Start(Point.of(record.progress, {}), [])
    restore(found, engine, record.progress, plan, config, rows, world, say)
    kept: list[bytes] = []
    on_first_rank(world, lambda: kept.extend(cut_metrics(store, found.manifest.step)))
    return Start(Point.of(record.progress, found.state.cursor), kept)
