"""How far a run got."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COUNTERS = (
    *("step", "first_eval", "last_eval", "kept_eval", "best_eval", "evaluated_at", "worse"),
    *("left_out", "skipped", "skipped_in_all"),
)
"""What a checkpoint keeps of it."""


@dataclass
class Progress:
    """How far a run got. `adapter` holds the trained tensors by name, the best ones when those are kept, whose
    evaluation loss is `kept_eval`; `left_out` counts the last steps in a row whose gradients overflowed in fp16,
    `skipped` those that were not finite otherwise; `stopped` says why training was enough before its last step,
    `interrupted` who asked for a stop."""

    step: int = 0
    first_eval: float | None = None
    last_eval: float | None = None
    kept_eval: float | None = None
    best_eval: float = math.inf
    evaluated_at: int = -1
    worse: int = 0
    left_out: int = 0
    skipped: int = 0
    skipped_in_all: int = 0
    adapter: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None
    interrupted: str | None = None

    @property
    def at_its_best(self) -> bool:
        """Whether this very step has the lowest evaluation loss so far."""
        return self.evaluated_at == self.step > 0 and self.last_eval == self.best_eval

    def counters(self) -> dict[str, Any]:
        """The numbers, as JSON has them."""
        values = {name: getattr(self, name) for name in COUNTERS}
        return values | {"best_eval": None if math.isinf(self.best_eval) else self.best_eval}

    def restore(self, counters: Mapping[str, Any], adapter: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            KeyError: a counter is missing.
        """
        for name in COUNTERS:
            setattr(self, name, counters[name])
        self.best_eval = math.inf if self.best_eval is None else self.best_eval
        self.adapter = adapter
