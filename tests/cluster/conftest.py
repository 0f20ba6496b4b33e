"""Tests on several hosts run when they are asked for, and then they do not skip."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import Host, hosts, missing
from tests.conftest import alpaca_rows, settings, write_rows

ASKED = "QLORA_TEST_CLUSTER"
"""The variable that `make test-cluster` sets."""


@pytest.fixture(scope="session", autouse=True)
def asked() -> None:
    if ASKED not in os.environ:
        pytest.skip("several hosts: `make test-cluster`, as root")
    if lacks := missing():
        pytest.exit(f"several hosts cannot run here: {'; '.join(lacks)}", returncode=1)


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """n1 and n2."""
    folder = tmp_path / "hosts"
    folder.mkdir()
    with hosts(2, folder) as both:
        yield both


@pytest.fixture(scope="module")
def run_of(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the run file of one and the same run, but for `parallel` and max_steps."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl", alpaca_rows(24))

    def write(name: str, max_steps: int = 4, **parallel: Any) -> Path:
        path = folder / f"{name}.yaml"
        train = {"max_steps": max_steps, "global_batch_size": 4, "micro_batch_size": 1}
        values = settings(tiny_model, rows, folder / name, lora={"dropout": 0.1}, train=train, parallel=parallel)
        path.write_text(yaml.safe_dump(values))
        return path

    return write
