"""What only several GPUs can show: every strategy over NCCL, offload to pinned memory, workers one a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import alpaca_rows, losses, qlora, write_rows

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
RunFile = Callable[..., Path]
SHARED = {"max_steps": 10, "global_batch_size": 12, "micro_batch_size": 2, "learning_rate": 1e-3}


def run(run_file: RunFile, name: str, processes: int | str, precision: str, **sections: Any) -> list[float]:
    train = {**SHARED, "precision": precision, **sections.pop("train", {})}
    parallel = {"processes": processes, **sections.pop("parallel", {})}
    path = run_file(name, data={"max_length": 64}, lora={"dropout": 0.1}, train=train, parallel=parallel, **sections)
    write_rows(path.parent / "rows.jsonl", alpaca_rows(96))
    done = qlora("train", path)
    assert done.returncode == 0, done.stderr
    if processes != 1:
        assert "2 workers on 2 GPUs" in done.stderr
    return losses(path.parent / "out" / name)


@pytest.mark.parametrize(
    "parallel",
    [
        {"strategy": "replicate"},
        {"strategy": "zero2"},
        {"strategy": "zero3", "persistence": 0},
        {"strategy": "zero3"},
        {"strategy": "zero2", "offload_optimizer": "cpu"},
        {"strategy": "zero3", "persistence": 0, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    ],
    ids=str,
)
def test_losses_on_two_gpus_are_those_of_one(run_file: RunFile, parallel: dict[str, Any]) -> None:
    expected = run(run_file, "one", 1, "fp32")
    found = run(run_file, "two", 2, "fp32", parallel=parallel)
    assert found == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_zero3_trains_in_bf16_with_every_recomputation(run_file: RunFile, recompute: str, optimizer: str) -> None:
    how = {"train": {"recompute": recompute, "optimizer": optimizer}, "parallel": {"strategy": "zero3"}}
    found = run(run_file, "two", "all", "bf16", **how)
    assert found == pytest.approx(run(run_file, "one", 1, "bf16"), rel=5e-3)


def test_fp16_with_loss_scaling_trains_under_zero3(run_file: RunFile) -> None:
    found = run(run_file, "two", 2, "fp16", parallel={"strategy": "zero3", "persistence": 0})
    assert found[-1] < found[0]
