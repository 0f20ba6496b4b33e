"""What a checkpoint's parts hold: a rank's buffers and random state, the run's own numbers, the best adapter."""

import dataclasses
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch

from job.checkpoint import Unusable
from job.progress import COUNTERS
from job.state import Flat, Piece

RANK, RUN, BEST = "rank", "run.json", "best.safetensors"
SCHEDULE = ("steps", "warmup_steps", "kind")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scaler remembers."""
CUDA = "random.cuda"
CPU = "random.cpu"


@dataclass(frozen=True)
class RunState:
    """The run's own numbers.

    `counters` are Progress's; `cursor` is where the data goes on and `rows` the fingerprint of the data it belongs to;
    `schedule` is what the learning rate followed from; `scaler` is fp16's loss scaling, empty without; `settings` are
    all settings by section, `fixed` the hash of the fixed ones.
    """

    counters: dict[str, Any]
    cursor: dict[str, Any]
    rows: str
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    settings: dict[str, Any]
    fixed: str
    world_size: int
    strategy: str

    def content(self) -> bytes:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> "RunState":
        """From JSON.

        Raises:
            Unusable: a field is missing or unknown.
        """
        values = json.loads(content)
        names = {field.name for field in dataclasses.fields(cls)}
        if odd := sorted(names ^ set(values)):
            raise Unusable(f"its {RUN} lacks or adds {', '.join(odd)}")
        state = cls(**values)
        whole = ("counters", state.counters, COUNTERS), ("schedule", state.schedule, SCHEDULE)
        for field, found, expected in (*whole, ("scaler", state.scaler, SCALER if state.scaler else ())):
            if odd := sorted(set(expected) ^ set(found)):
                raise Unusable(f"{field} in its {RUN} lacks or adds {', '.join(odd)}")
        return state


@dataclass(frozen=True)
class RankState:
    """What one rank holds; `random` are the generators' states (see `random_states`)."""

    flats: list[Flat]
    random: dict[str, Any]

    def content(self) -> bytes:
        """As safetensors."""
        tensors = {
            f"{number}.{name}": tensor
            for number, flat in enumerate(self.flats)
            for name, tensor in flat.tensors.items()
        }
        about = [
            {
                "steps": flat.steps,
                "pieces": [dataclasses.astuple(piece) for piece in flat.pieces],
                "tensors": list(flat.tensors),
            }
            for flat in self.flats
        ]
        states = {name: value for name, value in self.random.items() if torch.is_tensor(value)}
        plain = {name: value for name, value in self.random.items() if name not in states} | {"of": list(states)}
        return safetensors.torch.save(tensors | states, {"flats": json.dumps(about), "random": json.dumps(plain)})

    @classmethod
    def parse(cls, content: bytes) -> "RankState":
        """From safetensors.

        Raises:
            Unusable: a field is missing.
        """
        try:
            tensors = safetensors.torch.load(content)
            about = _metadata(content)
            flats = [
                Flat(
                    tuple(Piece(*piece) for piece in one["pieces"]),
                    one["steps"],
                    {name: tensors[f"{number}.{name}"] for name in one["tensors"]},
                )
                for number, one in enumerate(json.loads(about["flats"]))
            ]
            states = json.loads(about["random"])
            states |= {name: tensors[name] for name in states.pop("of")}
        except (KeyError, ValueError, TypeError) as fault:
            raise Unusable(f"it lacks {fault}") from fault
        return cls(flats, states)


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + length])["__metadata__"])


def seed_random(seed: int, rank: int) -> None:
    """Start Python's, numpy's and torch's generators: what a model or a user's code draws is repeatable, and differs
    between ranks."""
    random.seed(f"{seed}/{rank}")
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def random_states(device: str) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        CPU: torch.get_rng_state(),
    }
    if device == "cuda":
        states[CUDA] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators where they were.

    Raises:
        KeyError: one is missing.
    """
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(states[CPU])
    if CUDA in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[CUDA])


def adapter_content(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Trained tensors by name, as safetensors."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def parse_adapter(content: bytes) -> dict[str, torch.Tensor]:
    """What `adapter_content` wrote."""
    return dict(safetensors.torch.load(content))
