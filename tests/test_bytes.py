"""What several ranks read of a checkpoint of more than 100M parameters, counted while they run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import alpaca_rows, losses, write_rows
from tests.ranks import run_ranks

RunFile = Callable[..., Path]
SHORT = {"max_length": 64}
TRAIN = {"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def weights(smollm2: Path) -> int:
    """Bytes of the real model's file."""
    return (smollm2 / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("strategy", "ranks"), [("replicate", 4), ("zero3", 2)])
def test_ranks_together_read_the_checkpoint_once(
    run_file: RunFile, smollm2: Path, tmp_path: Path, weights: int, strategy: str, ranks: int
) -> None:
    train = {**TRAIN, "max_steps": 1}
    path = run_file(model={"name": str(smollm2)}, data=SHORT, train=train, parallel={"strategy": strategy})
    counted = tmp_path / "read"
    done = run_ranks(ranks, "train", path, env={"COUNT_READ_BYTES": str(counted)})
    assert [one.code for one in done] == [0] * ranks, "\n".join(one.err for one in done)
    read = [int(line) for line in counted.read_text().split()]
    assert weights <= sum(read) <= 1.05 * weights


def test_the_real_model_has_equal_losses_on_one_rank_and_sharded_over_two(
    run_file: RunFile, smollm2: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", alpaca_rows(48))
    found = {}
    for strategy, ranks in (("replicate", 1), ("zero3", 2)):
        shape = {
            "train": {**TRAIN, "global_batch_size": 2},
            "parallel": {"strategy": strategy},
            "lora": {"dropout": 0.05},
        }
        path = run_file(strategy, model={"name": str(smollm2)}, data=SHORT, **shape)
        done = run_ranks(ranks, "train", path)
        assert [one.code for one in done] == [0] * ranks, "\n".join(one.err for one in done)
        found[strategy] = losses(tmp_path / "out" / strategy)
    assert len(found["zero3"]) == 6
    assert found["zero3"] == pytest.approx(found["replicate"], rel=1e-5)
    assert found["zero3"][-1] < found["zero3"][0]
