"""A whole run with model, data and output on a real S3, its keys in an .env file; and that secrets stay there."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import yaml

from job.config import parse_config
from tests.conftest import alpaca_rows, losses, settings, write_rows
from tests.forked import Done, run
from tests.s3 import BUCKET, S3

OUT = f"{BUCKET}/runs/first"
TOKEN = "hf_verysecrettoken"


@dataclass(frozen=True)
class Trained:
    """A finished run, its folder's files, and the local folder it was started from."""

    done: Done
    files: dict[str, bytes]
    here: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def trained(s3_server: S3, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """One run for all assertions; the S3 keys are in .env and nowhere else."""
    here, fs = tmp_path_factory.mktemp("here"), s3_server.fs()
    fs.put(f"{tiny_model}/", f"{BUCKET}/model/", recursive=True)
    fs.put_file(str(write_rows(here / "rows.jsonl", alpaca_rows(24))), f"{BUCKET}/data/rows.jsonl")
    (here / "rows.jsonl").unlink()
    (here / ".env").write_text(
        "".join(f"{name}={value}\n" for name, value in s3_server.env.items()) + f"HF_TOKEN={TOKEN}\n"
    )
    values = settings(
        f"s3://{BUCKET}/model",
        f"s3://{BUCKET}/data/rows.jsonl",
        f"s3://{OUT}",
        storage=s3_server.storage,
        evaluation={"share": 0.25},
    )
    (here / "run.yaml").write_text(yaml.safe_dump(values))
    no_keys = {"HOME": str(here)}
    done = run("train", "run.yaml", cwd=here, env=no_keys)
    files = {path.removeprefix(f"{OUT}/"): fs.cat_file(path) for path in fs.find(OUT)}
    yield Trained(done, files, here, no_keys)


def test_a_run_on_s3_finishes_with_settings_metrics_status_and_adapter(trained: Trained) -> None:
    assert trained.done.code == 0, trained.done.err
    assert f"adapter: s3://{OUT}/adapter" in trained.done.err
    status = json.loads(trained.files["status.json"])
    assert (status["state"], status["step"], status["checkpoint"]) == ("finished", 3, 3)
    assert "checkpoints/step-00000003/manifest.json" in trained.files
    assert parse_config(trained.files["run.yaml"].decode()).output.url == f"s3://{OUT}"


def test_the_metrics_are_joined_and_the_parts_are_gone(trained: Trained) -> None:
    rows = [json.loads(line) for line in trained.files["metrics.jsonl"].splitlines()]
    assert [(row["step"], "loss" in row) for row in rows] == [(0, False), (1, True), (2, True), (3, True), (3, False)]
    assert not [name for name in trained.files if name.startswith("metrics-parts/")]


def test_the_adapter_is_whole_and_names_its_base_by_url(trained: Trained) -> None:
    tensors = safetensors.torch.load(trained.files["adapter/adapter_model.safetensors"])
    assert len(tensors) == 28 and all(tensor.numel() for tensor in tensors.values())
    config = json.loads(trained.files["adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == f"s3://{BUCKET}/model"
    assert "adapter/tokenizer.json" in trained.files


def test_no_secret_is_in_any_file_or_line(trained: Trained, s3_server: S3) -> None:
    everything = {**trained.files, "out": trained.done.out.encode(), "err": trained.done.err.encode()}
    for secret in (TOKEN, s3_server.env["AWS_SECRET_ACCESS_KEY"], s3_server.env["AWS_ACCESS_KEY_ID"]):
        assert [name for name, content in everything.items() if secret.encode() in content] == []


def test_nothing_is_left_on_the_local_disk(trained: Trained) -> None:
    assert sorted(file.name for file in trained.here.iterdir()) == [".env", "run.yaml"]


def test_the_same_run_again_is_finished_already(trained: Trained) -> None:
    again = run("train", "run.yaml", cwd=trained.here, env=trained.env)
    assert again.code == 0 and again.err.startswith("This run is finished already (3 steps). Adapter: s3://"), again.err


def test_a_run_on_s3_goes_on_from_its_checkpoint_when_it_shall_be_longer(trained: Trained, s3_server: S3) -> None:
    place, fs = f"{BUCKET}/runs/longer", s3_server.fs()
    words = ("train", "run.yaml", f"output.url=s3://{place}", "train.schedule=constant", "train.warmup_steps=0")
    assert run(*words, "train.max_steps=2", cwd=trained.here, env=trained.env).code == 0
    refused = run(*words, "train.max_steps=4", "lora.rank=8", cwd=trained.here, env=trained.env)
    assert refused.code == 2
    assert "  lora.rank: 4 there, 8 here\n  Use another output.url, or set these back to what they were" in refused.err
    done = run(*words, "train.max_steps=4", cwd=trained.here, env=trained.env)
    assert done.code == 0 and "going on after step 2" in done.err, done.err
    rows = [json.loads(line) for line in fs.cat_file(f"{place}/metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    status = json.loads(fs.cat_file(f"{place}/status.json"))
    assert (status["state"], status["step"], status["checkpoint"]) == ("finished", 4, 4)
    names = [path.removeprefix(f"{place}/") for path in fs.find(place)]
    assert "checkpoints/step-00000004/manifest.json" in names
    assert not [name for name in names if name.startswith("metrics-parts/")]


def test_a_failed_run_on_s3_keeps_the_metrics_up_to_its_end_and_a_checkpoint(trained: Trained, s3_server: S3) -> None:
    place, fs = f"{BUCKET}/runs/failed", s3_server.fs()
    wild = ("train.learning_rate=1e30", "train.max_steps=100", "train.max_skipped_steps=3")
    done = run("train", "run.yaml", f"output.url=s3://{place}", *wild, cwd=trained.here, env=trained.env)
    assert done.code == 1 and "Traceback" not in done.err, done.err
    status = json.loads(fs.cat_file(f"{place}/status.json"))
    assert status["state"] == "failed" and status["reason"].startswith("loss or gradients of 3 steps in a row")
    rows = [json.loads(line) for line in fs.cat_file(f"{place}/metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, status["step"] + 1))
    assert [row.get("left_out", 0) for row in rows if "loss" in row][-3:] == [1, 1, 1]
    assert status["checkpoint"] == status["step"] - 3
    assert fs.exists(f"{place}/checkpoints/step-{status['checkpoint']:08d}/manifest.json")


def test_compare_reads_model_data_and_adapter_from_s3(trained: Trained) -> None:
    words = ("compare", "run.yaml", "generation.max_new_tokens=4", "generation.rows=2")
    done = run(*words, cwd=trained.here, env=trained.env)
    assert done.code == 0, done.err
    assert all(word in done.out for word in ("question", "wanted", "base", "tuned", "Count to"))
    assert " before, " in done.out and f"adapter: s3://{OUT}/adapter" in done.out


def test_a_second_run_on_the_node_downloads_no_weights_again(
    trained: Trained, tiny_model: Path, s3_server: S3, tmp_path: Path
) -> None:
    size = (tiny_model / "model.safetensors").stat().st_size
    storage = {**s3_server.storage, "cache_dir": str(tmp_path / "cache")}
    source, rows = f"s3://{BUCKET}/model", f"s3://{BUCKET}/data/rows.jsonl"
    found = []
    for name in ("first", "second"):
        values = settings(source, rows, tmp_path / "out" / name, storage=storage)
        (trained.here / f"{name}.yaml").write_text(yaml.safe_dump(values))
        counted = tmp_path / f"{name}-bytes"
        env = {**trained.env, "COUNT_READ_BYTES": str(counted)}
        done = run("train", f"{name}.yaml", cwd=trained.here, env=env)
        assert done.code == 0, done.err
        found.append((sum(map(int, counted.read_text().split())), losses(tmp_path / "out" / name)))
    (first, expected), (second, again) = found
    assert second <= first - 0.95 * size
    assert again == expected
