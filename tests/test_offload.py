"""State that lives in host memory or in files: the same losses, also after a kill."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, losses, make_llama, make_tokenizer
from tests.ranks import run_ranks

RunFile = Callable[..., Path]
Run = Callable[..., list[float]]


@pytest.fixture
def run(run_file: RunFile) -> Run:
    """Losses of some steps on so many ranks on nodes of so many."""

    def train(ranks: int, per_node: int = 0, model: Path | None = None, rank: int = 4, **parallel: Any) -> list[float]:
        name = "-".join([str(ranks), *map(str, parallel.values())]).replace("/", "_")
        config = run_file(
            name,
            train={"max_steps": 5, "micro_batch_size": 1, "learning_rate": 1e-3},
            lora={"rank": rank},
            parallel=parallel,
            **({"model": {"name": str(model)}} if model else {}),
        )
        done = run_ranks(ranks, "train", config, per_node=per_node)
        assert [one.code for one in done] == [0] * ranks, "\n".join(one.err for one in done)
        return losses(config.parent / "out" / name)

    return train


@pytest.fixture(scope="module")
def known() -> dict[Any, list[float]]:
    """Losses of one process without offload, by model and rank of the adapter."""
    return {}


@pytest.mark.parametrize(
    ("strategy", "optimizer", "parameters"),
    [
        ("replicate", "cpu", "none"),
        ("zero2", "cpu", "none"),
        ("zero3", "cpu", "none"),
        ("zero3", "none", "cpu"),
        ("zero3", "cpu", "cpu"),
        ("hpz", "cpu", "none"),
        ("hpz", "none", "cpu"),
        ("hpz", "cpu", "cpu"),
    ],
)
def test_offloading_to_host_memory_changes_no_loss(
    run: Run, known: dict[Any, list[float]], strategy: str, optimizer: str, parameters: str
) -> None:
    expected = known.setdefault("tiny", []) or run(1)
    known["tiny"] = expected
    places = {"offload_optimizer": optimizer, "offload_parameters": parameters}
    whole = {"persistence": 0} if strategy in ("zero3", "hpz") else {}
    ranks, per_node = (4, 2) if strategy == "hpz" else (2, 2)
    assert run(ranks, per_node, strategy=strategy, **places, **whole) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def file_operator() -> None:
    """DeepSpeed's operator, compiled once on this machine, which takes minutes; the gate has what it takes."""
    there = Path("/usr/include/libaio.h").exists() and shutil.which("g++")
    if not there and os.environ.get("QLORA_TEST_NVME") != "1":
        pytest.skip("needs libaio-dev and g++ (Debian: apt-get install libaio-dev g++)")
    load = "import sys; from job.swap import operator_fault; sys.exit(operator_fault())"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", load], check=True, timeout=590, env=environment, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose quantized linears are large enough for files, which begin at a megabyte a rank."""
    folder = tmp_path_factory.mktemp("wide-model")
    shape = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 8}
    make_llama(folder, **shape, num_key_value_heads=8)
    make_tokenizer(folder)
    return folder


def swap_files(folder: Path, kind: str) -> list[Path]:
    """Files of at least a megabyte that DeepSpeed left under this kind's folders."""
    return [path for path in folder.rglob("*.swp") if kind in str(path) and path.stat().st_size >= 1 << 20]


@pytest.mark.parametrize(
    ("strategy", "optimizer", "parameters"),
    [
        ("zero3", "none", "nvme"),
        ("zero3", "nvme", "none"),
        ("zero3", "nvme", "nvme"),
        ("zero3", "nvme", "cpu"),
        ("hpz", "nvme", "none"),
    ],
)
def test_offloading_to_files_writes_them_and_changes_no_loss(
    run: Run,
    known: dict[Any, list[float]],
    wide_model: Path,
    file_operator: None,
    tmp_path: Path,
    strategy: str,
    optimizer: str,
    parameters: str,
) -> None:
    rank = 64
    known["wide"] = known.get("wide") or run(1, model=wide_model, rank=rank)
    places = {"offload_optimizer": optimizer, "offload_parameters": parameters, "nvme_path": str(tmp_path / "nvme")}
    ranks, per_node = (4, 2) if strategy == "hpz" else (2, 2)
    found = run(ranks, per_node, wide_model, rank, strategy=strategy, persistence=0, **places)
    assert found == pytest.approx(known["wide"], rel=1e-5)
    # gate, up and down of four layers, and the parts of adapters that passed through
    assert len(swap_files(tmp_path / "nvme", "float32params")) >= (12 * ranks if parameters == "nvme" else 0)
    assert (tmp_path / "nvme/zero_stage_3/float32params").exists() == (parameters == "nvme")
    assert bool(swap_files(tmp_path / "nvme", "optimizer")) == (optimizer == "nvme")


@pytest.mark.parametrize("parameters", ["none", "nvme"])
def test_state_that_was_in_files_goes_on_bit_for_bit(
    run_file: RunFile, tmp_path: Path, wide_model: Path, file_operator: None, parameters: str
) -> None:
    files = {"offload_optimizer": "nvme", "offload_parameters": parameters, "nvme_path": str(tmp_path / "nvme")}
    sections: dict[str, Any] = {
        "model": {"name": str(wide_model)},
        "train": {"max_steps": 5, "micro_batch_size": 1, "learning_rate": 1e-3},
        "lora": {"rank": 64},
        "checkpoint": {"every_steps": 2},
        "parallel": {"strategy": "zero3", "persistence": 0, **files},
    }
    for name, ends in (("whole", {}), ("broken", {"DIE_AFTER_STEP": "3"}), ("broken", {})):
        done = run_ranks(2, "train", run_file(name, **sections), env=ends)
        assert bool(ends) or [one.code for one in done] == [0, 0], done[0].err
    assert "going on after step 2" in done[0].err
    assert losses(tmp_path / "out/broken") == losses(tmp_path / "out/whole")
    assert swap_files(tmp_path / "nvme", "optimizer")
