"""One run, many ways: every strategy and number of ranks gives the losses of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import alpaca_rows, losses, write_rows
from tests.ranks import run_ranks

RunFile = Callable[..., Path]
Run = Callable[..., list[float]]


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, int], list[float]]:
    """Losses of one process, by precision and global batch size."""
    return {}


@pytest.fixture
def run(run_file: RunFile) -> Run:
    """Losses of 20 steps on so many ranks, on nodes of so many; rows are of different lengths, dropout is on."""

    def train(ranks: int, per_node: int, batch: int, precision: str, recompute: str, **parallel: Any) -> list[float]:
        name = f"{ranks}-{parallel.get('strategy', 'auto')}"
        config = run_file(
            name,
            data={"max_length": 64},
            train={
                "max_steps": 20,
                "global_batch_size": batch,
                "micro_batch_size": 1 if ranks > 1 else 2,
                "precision": precision,
                "recompute": recompute,
            },
            lora={"dropout": 0.1},
            parallel=parallel,
        )
        write_rows(config.parent / "rows.jsonl", alpaca_rows(96))
        done = run_ranks(ranks, "train", config, per_node=per_node)
        assert [one.code for one in done] == [0] * ranks, "\n".join(one.err for one in done)
        return losses(config.parent / "out" / name)

    return train


@pytest.mark.parametrize(
    ("strategy", "ranks", "per_node", "precision", "recompute"),
    [
        ("replicate", 2, 2, "fp32", "none"),
        ("replicate", 3, 3, "fp32", "full"),
        ("zero2", 2, 2, "fp32", "full"),
        ("zero3", 1, 1, "fp32", "none"),
        ("zero3", 2, 2, "fp32", "none"),
        ("zero3", 2, 2, "fp32", "full"),
        ("zero3", 3, 3, "fp32", "full"),
        ("zero3", 5, 5, "fp32", "full"),
        ("hpz", 4, 2, "fp32", "none"),
        ("replicate", 2, 2, "bf16", "none"),
        ("zero2", 3, 3, "bf16", "none"),
        ("zero3", 2, 2, "bf16", "full"),
        ("hpz", 4, 2, "bf16", "full"),
    ],
)
def test_losses_are_those_of_one_process(
    run: Run, known: dict[Any, Any], strategy: str, ranks: int, per_node: int, precision: str, recompute: str
) -> None:
    batch = 10 if ranks == 5 else 12
    if (precision, batch) not in known:
        known[precision, batch] = run(1, 1, batch, precision, "none")
    # up to 700 adapters stay whole, and layers are gathered at once; with 0 all that is gathered is DeepSpeed's
    small = {"zero3": 700 if recompute == "full" else 0, "hpz": 0}
    sharded = {"persistence": small[strategy]} if strategy in small else {}
    found = run(ranks, per_node, batch, precision, recompute, strategy=strategy, **sharded)
    assert found == pytest.approx(known[precision, batch], rel=1e-5 if precision == "fp32" else 2e-3)
