"""Every family on a GPU: the authors' logits, and twenty steps of QLoRA in bf16."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import job
from tests.conftest import alpaca_rows, losses, qlora, settings, write_rows
from tests.native_models import CONFIGS, LEGACY, SEEING, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ORIGINALS = ("chatglm2", "chatglm3", "qwen1")
UNPACKED = ("OPT", "OPT-350m")


@pytest.mark.parametrize("name", ORIGINALS)
def test_logits_are_those_of_the_authors_code(name: str) -> None:
    model, _ = job.load_base(str(LEGACY / name), device="cuda")
    expected = load_file(LEGACY / name / "expected.safetensors", device="cuda")
    with torch.no_grad():
        found = model(expected["len19.input_ids"]).logits
    assert (found - expected["len19.logits"]).abs().max() < 5e-5


@pytest.mark.parametrize("name", [*ORIGINALS, SEEING, *CONFIGS])
def test_twenty_steps_in_bf16_fall_in_loss(tmp_path: Path, name: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", alpaca_rows(80))
    train = {"max_steps": 20, "micro_batch_size": 2, "precision": "bf16", "recompute": "full"}
    values = settings(tiny(name, tmp_path / "model"), rows, tmp_path / "out", train=train, data={"max_length": 64})
    values["data"]["packing"] = name not in UNPACKED
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))
    done = qlora("train", path, "parallel.processes=1")
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path / "out")
    assert len(found) == 20 and sum(found[-3:]) < 0.95 * sum(found[:3]), found
