"""Looking into checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch

from job.checkpoint import Checkpoints, Manifest, part_of
from job.saved import RankState, RunState
from job.state import Flat, plain
from job.store import Store

Whole = dict[tuple[str, str], torch.Tensor]


def newest(out: Path) -> int:
    """The newest step with a manifest."""
    return max(int(path.parent.name[5:]) for path in out.glob("checkpoints/step-*/manifest.json"))


def manifest(out: Path, step: int | None = None) -> Manifest:
    """A checkpoint's manifest."""
    return Checkpoints(Store(str(out))).manifest(newest(out) if step is None else step)


def part(out: Path, kind: str, step: int | None = None) -> Path:
    """The file of a part, `run` or `rank00000`."""
    step = newest(out) if step is None else step
    (found,) = (out / f"checkpoints/step-{step:08d}").glob(f"{kind}-*")
    return found


def run_state(out: Path, step: int | None = None) -> RunState:
    """The run's own numbers."""
    return RunState.parse(part(out, "run", step).read_bytes())


def rank_states(out: Path, step: int | None = None) -> list[RankState]:
    """What each rank held."""
    ranks = run_state(out, step).world_size
    return [RankState.parse(part(out, f"rank{rank:05d}", step).read_bytes()) for rank in range(ranks)]


def whole(out: Path, step: int | None = None) -> Whole:
    """Masters and moments by (parameter, kind), whole, whoever held which part."""
    found: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for state in rank_states(out, step):
        for flat in map(plain, state.flats):
            _cut(flat, found)
    return {
        key: torch.cat([tensor for _, tensor in sorted(pieces, key=lambda p: p[0])]) for key, pieces in found.items()
    }


def _cut(flat: Flat, found: dict[tuple[str, str], list[tuple[int, torch.Tensor]]]) -> None:
    for piece in flat.pieces:
        for kind, tensor in flat.tensors.items():
            cut = tensor[piece.offset : piece.offset + piece.stop - piece.start]
            found.setdefault((piece.name, kind), []).append((piece.start, cut))


def rewrite(out: Path, kind: str, content: bytes, step: int | None = None) -> None:
    """Put other content into a checkpoint, with a manifest that fits it."""
    old = part(out, kind, step)
    made = part_of("".join([kind, *old.suffixes]), content)
    known = manifest(out, step)
    parts = tuple(made if one.name == old.name else one for one in known.parts)
    (old.parent / made.name).write_bytes(content)
    if made.name != old.name:
        old.unlink()
    changed = Manifest(known.step, known.settings, known.eval_loss, parts)
    (old.parent / "manifest.json").write_bytes(changed.content())


def change_run(out: Path, step: int | None = None, **values: Any) -> None:
    """Other values in a checkpoint's run.json; None removes a field."""
    fields = json.loads(part(out, "run", step).read_bytes()) | values
    kept = {name: value for name, value in fields.items() if value is not None}
    rewrite(out, "run", json.dumps(kept).encode(), step)
