"""What only GPUs can show of resuming: loss scaling, paged moments, CUDA's generators, the shares of two GPUs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from job.config import parse_config
from job.engine import Engine
from job.saved import CUDA
from job.train import train
from job.world import World
from tests.checkpoints import rank_states, run_state, whole
from tests.conftest import alpaca_rows, losses, qlora, write_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
RunFile = Callable[..., Path]
STEPS, CUT = 8, 4


def config(run_file: RunFile, name: str, how: dict[str, Any]) -> Path:
    """A run with dropout whose schedule does not depend on how far it goes."""
    shared = {"max_steps": STEPS, "global_batch_size": 12, "micro_batch_size": 2, "schedule": "constant"}
    sections = {**how, "train": {**shared, **how.get("train", {})}}
    path = run_file(name, data={"max_length": 64}, lora={"rank": 16, "dropout": 0.1}, **sections)
    write_rows(path.parent / "rows.jsonl", alpaca_rows(96))
    return path


def cut_and_whole(run_file: RunFile, tmp_path: Path, **how: Any) -> tuple[Path, Path]:
    """The outputs of a run of eight steps, and of one that ended after four and was started again."""
    for name, steps in (("whole", STEPS), ("cut", CUT), ("cut", STEPS)):
        done = qlora("train", config(run_file, name, how), f"train.max_steps={steps}")
        assert done.returncode == 0, done.stderr
    assert f"going on after step {CUT}" in done.stderr
    return tmp_path / "out/whole", tmp_path / "out/cut"


def same(one: Path, other: Path) -> None:
    """Losses, masters, moments and loss scaling are equal bit for bit."""
    assert losses(one) == losses(other) and len(losses(one)) == STEPS
    first, second = whole(one), whole(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert run_state(one).scaler == run_state(other).scaler


@pytest.mark.parametrize(
    "learning",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "optimizer": "paged_adamw_32bit", "recompute": "full"},
        {"precision": "bf16", "optimizer": "paged_adamw_8bit"},
        {"precision": "bf16", "optimizer": "adamw_8bit"},
        {"precision": "fp32"},
        {"precision": "fp16"},
    ],
    ids=str,
)
def test_on_one_gpu_a_run_goes_on_bit_for_bit(run_file: RunFile, tmp_path: Path, learning: dict[str, Any]) -> None:
    one, other = cut_and_whole(run_file, tmp_path, train=learning, parallel={"processes": 1})
    same(one, other)
    if learning["precision"] == "fp16":
        assert run_state(one).scaler, "fp16 scales its losses"


@two
@pytest.mark.parametrize(
    "how",
    [
        {"parallel": {"strategy": "replicate"}},
        {"parallel": {"strategy": "zero2"}},
        {"parallel": {"strategy": "zero3", "persistence": 0}, "train": {"precision": "bf16"}},
        {"parallel": {"strategy": "zero3"}, "train": {"precision": "bf16", "optimizer": "paged_adamw_8bit"}},
        {"parallel": {"strategy": "zero3"}, "train": {"precision": "fp16"}},
        {"parallel": {"strategy": "zero3", "offload_optimizer": "cpu", "offload_parameters": "cpu"}},
    ],
    ids=str,
)
def test_on_two_gpus_a_run_goes_on_bit_for_bit(run_file: RunFile, tmp_path: Path, how: dict[str, Any]) -> None:
    same(*cut_and_whole(run_file, tmp_path, **how))


@two
def test_from_two_gpus_under_zero3_to_one_the_losses_are_the_same(run_file: RunFile, tmp_path: Path) -> None:
    how = {"parallel": {"strategy": "zero3", "persistence": 0}}
    for name, words in (("whole", []), ("cut", [f"train.max_steps={CUT}"]), ("cut", ["parallel.processes=1"])):
        done = qlora("train", config(run_file, name, how), *words)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out/cut") == pytest.approx(losses(tmp_path / "out/whole"), rel=1e-4)


def test_the_gpus_generator_goes_on_where_it_was(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []
    train_step = Engine.train_step

    def drawing(self: Engine, *arguments: Any) -> Any:
        drawn.append(torch.rand((), device="cuda").item())
        return train_step(self, *arguments)

    monkeypatch.setattr(Engine, "train_step", drawing)
    for name, steps in (("whole", STEPS), ("cut", CUT), ("cut", STEPS)):
        path = config(run_file, name, {"parallel": {"processes": 1}})
        train(parse_config(path.read_text().replace(f"max_steps: {STEPS}", f"max_steps: {steps}")), World(), print)
    assert len(drawn) == 2 * STEPS and drawn[:STEPS] == drawn[STEPS:]
    (one,), (other,) = rank_states(tmp_path / "out/whole"), rank_states(tmp_path / "out/cut")
    assert torch.equal(torch.as_tensor(one.random[CUDA]), torch.as_tensor(other.random[CUDA]))
