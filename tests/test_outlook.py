"""`qlora plan`: what is said beforehand is what happens, without torch and without a GPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.config import load_config
from job.errors import ConfigError, ModelError
from job.launch.local import workers
from job.outlook import Outlook, look_ahead, planned_for
from job.world import Hardware, World
from tests.conftest import REPOSITORY, alpaca_rows, losses, qlora, write_rows
from tests.forked import run

RunFile = Callable[..., Path]
CPU = Hardware("cpu", "2 CPU cores", True, 8)


def outlook(path: Path, *overrides: str, world: World | None = None, hardware: Hardware = CPU) -> Outlook:
    return look_ahead(load_config(str(path), overrides), world or World(), hardware)


@pytest.mark.parametrize("packing", [True, False])
def test_estimated_steps_are_near_those_that_are_taken(run_file: RunFile, tmp_path: Path, packing: bool) -> None:
    path = run_file(train={"max_steps": None, "epochs": 2, "global_batch_size": 2}, data={"packing": packing})
    write_rows(tmp_path / "rows.jsonl", alpaca_rows(200))
    expected = outlook(path)
    assert run("train", path).code == 0
    assert expected.plan.steps == pytest.approx(len(losses(tmp_path / "out/run")), rel=0.15)
    assert expected.rows == 200


def test_max_steps_are_taken_as_they_are_and_no_rows_are_read(run_file: RunFile) -> None:
    path = run_file(data={"train": "/nowhere/rows.jsonl"})
    found = outlook(path)
    assert (found.plan.steps, found.rows, found.tokens) == (3, None, None)


def test_the_numbers_are_those_of_the_model(smollm2: Path, run_file: RunFile) -> None:
    found = outlook(run_file(model={"name": str(smollm2)}, lora={"rank": 16})).as_json()
    assert found["model"]["parameters"] == 134_515_008
    assert found["model"]["trained"] == 4_884_480


def test_json_and_deepspeed_s_dictionary_are_printed(run_file: RunFile) -> None:
    path = run_file(parallel={"strategy": "zero3", "processes": 2})
    plan = json.loads(qlora("plan", path, "--json").stdout)
    assert (plan["world"], plan["strategy"], plan["accumulation"]) == ({"ranks": 2, "ranks_per_node": 2}, "zero3", 1)
    assert plan["total_gib"] == pytest.approx(sum(plan["memory_gib"].values()), abs=0.02)
    printed = json.loads(qlora("plan", path, "--deepspeed").stdout)
    assert printed["zero_optimization"]["stage"] == 3
    assert (printed["train_batch_size"], printed["train_micro_batch_size_per_gpu"]) == (4, 2)


def test_other_machines_can_be_planned_for(run_file: RunFile) -> None:
    done = qlora("plan", run_file(), "--nodes", "2", "--gpus", "1", "--gpu-memory", "80")
    assert done.returncode == 0, done.stderr
    assert "where     2 nodes x 1 x GPU, 80.0 GiB each" in done.stdout
    assert "strategy  replicate: 0.7 GiB of 80.0 GiB a GPU" in done.stdout
    assert "4 sequences of at most 128 tokens a step: 2 a forward x 2 ranks x 1 accumulated" in done.stdout


def test_gpus_without_their_memory_are_refused(run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.outlook.seen_gpus", lambda: None)
    with pytest.raises(ConfigError, match=r"--gpus: here is no GPU to ask for its memory. Give --gpu-memory too"):
        planned_for(load_config(str(run_file())), 1, 8, None)


def test_more_ranks_than_gpus_are_refused_as_train_does(run_file: RunFile) -> None:
    four = load_config(str(run_file()), ["parallel.processes=4"])
    with pytest.raises(ConfigError) as planned:
        planned_for(four, 1, 2, 80)
    with pytest.raises(ConfigError) as started:
        workers(four, 2)
    assert planned.value.faults == started.value.faults
    assert planned.value.faults == ("parallel.processes: 4, and here are 2 GPUs. Use all",)
    assert planned_for(four, 1, 8, 80)[0].world_size == 4
    assert planned_for(four, 1, None, 80)[0].world_size == 4, "as many GPUs as ranks when nobody says how many"


def test_gpus_are_asked_of_the_driver(tmp_path: Path, run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf 'Tesla T4, 15360, 7.5\\nTesla T4, 15360, 7.5\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    world, hardware = planned_for(load_config(str(run_file())), 3, None, None)
    assert (world.world_size, world.ranks_per_node) == (6, 2)
    assert hardware == Hardware("cuda", "Tesla T4", False, 15.0, 2, fp8=False)


@pytest.mark.parametrize(
    ("sections", "fault", "message"),
    [
        ({"model": {"name": "/nowhere"}}, ModelError, "model.name: /nowhere: no such folder"),
        ({"parallel": {"strategy": "hpz"}}, ConfigError, "parallel.strategy: hpz replicates between nodes"),
        ({"train": {"precision": "fp16"}}, ConfigError, "train.precision: fp16 does not train on a CPU"),
    ],
)
def test_what_train_would_refuse_is_refused(
    run_file: RunFile, sections: dict[str, Any], fault: type[Exception], message: str
) -> None:
    with pytest.raises(fault, match=message):
        outlook(run_file(**sections))


def test_no_torch_is_imported(run_file: RunFile) -> None:
    code = (
        "import sys; from job.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    words = [sys.executable, "-c", code, "plan", str(run_file(train={"max_steps": None}))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
