"""Every family learns: twenty steps of QLoRA alone, and the same sharded over two ranks."""

import json
from pathlib import Path

import pytest

from job.config import parse_config
from job.outlook import look_ahead
from job.train import train
from job.world import Hardware, World
from tests.conftest import alpaca_rows, losses, settings, write_rows
from tests.native_models import CONFIGS, SEEING, tiny
from tests.ranks import run_ranks

CPU = Hardware("cpu", "this CPU", bf16=True, memory_gib=8)
RUN = {"train": {"max_steps": 20, "micro_batch_size": 2}, "data": {"max_length": 64}}
UNPACKED = ("OPT", "OPT-350m")
"""Whose rows see each other when packed, which is refused."""


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "qwen1", SEEING, *CONFIGS])
def test_twenty_steps_fall_in_loss_alone_and_sharded_over_two_ranks(tmp_path: Path, name: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", alpaca_rows(80))
    values = settings(tiny(name, tmp_path / "model"), rows, tmp_path / "alone", **RUN)
    values["data"]["packing"] = name not in UNPACKED
    alone = parse_config(json.dumps(values), [])
    train(alone, World(), lambda line: None)
    found = losses(tmp_path / "alone")
    assert len(found) == 20 and sum(found[-3:]) < 0.95 * sum(found[:3]), found
    values |= {"parallel": {"strategy": "zero3", "persistence": 0}, "output": {"url": str(tmp_path / "sharded")}}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    planned = look_ahead(parse_config(json.dumps(values), []), World(world_size=2), CPU)
    assert planned.plan.zero.strategy == "zero3"
    done = run_ranks(2, "train", tmp_path / "run.yaml")
    assert [one.code for one in done] == [0, 0], done[0].err
    assert losses(tmp_path / "sharded") == pytest.approx(found, rel=1e-5)
