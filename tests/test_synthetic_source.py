"""The benchmarks' checkpoints without a disk: safetensors files, whatever range is read, that a run trains from."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import LlamaConfig

from tests.conftest import REPOSITORY, make_tokenizer

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
READ = """
import sys, random, fsspec
url, seed = sys.argv[1:]
fs, root = fsspec.core.url_to_fs(url)
for entry in fs.ls(root):
    if entry["name"].endswith(".safetensors"):
        whole, chance = fs.cat_file(entry["name"]), random.Random(seed)
        assert len(whole) == entry["size"] and fs.cat_file(entry["name"], entry["size"], None) == b""
        for _ in range(200):
            start, stop = sorted(chance.randrange(len(whole) + 9) for _ in range(2))
            assert fs.cat_file(entry["name"], start, stop) == whole[start:stop], (start, stop)
        sys.stdout.buffer.write(len(whole).to_bytes(8, "little") + whole)
"""


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, str]]:
    """A model's folder in two files, and the environment that knows the file system."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench"))
    import synthetic_source

    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.setattr(synthetic_source, "FILE", 1 << 17)
    config = LlamaConfig(**SMALL, bos_token_id=1, eos_token_id=2)
    total = synthetic_source.prepare(folder, config)
    headers = sorted(folder.glob("*.header"))
    assert len(headers) > 1
    parsed = [json.loads(one.read_bytes()[8:]) for one in headers]
    assert total == sum(max(entry["data_offsets"][1] for entry in entries.values()) for entries in parsed)
    return folder, synthetic_source.environment(tmp_path)


def test_any_range_is_that_of_the_whole_file_and_the_file_is_safetensors(
    prepared: tuple[Path, dict[str, str]],
) -> None:
    folder, environment = prepared
    words = [sys.executable, "-c", READ, f"synthetic://{folder}", str(random.randrange(1000))]
    done = subprocess.run(words, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found, rest = {}, done.stdout
    while rest:
        size = int.from_bytes(rest[:8], "little")
        found |= load(rest[8 : 8 + size])
        rest = rest[8 + size :]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(found) == set(index) and len(found) == 2 * 9 + 3
    assert found["lm_head.weight"].shape == (512, 64)
    for name, tensor in found.items():
        assert bool(tensor.isfinite().all())
        if tensor.dim() == 1:
            assert bool((tensor == 1).all()), name
        else:
            assert 0.018 < float(tensor.float().std()) < 0.022, name
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], found["model.layers.1.mlp.up_proj.weight"])


def test_a_run_trains_from_it(prepared: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, environment = prepared
    make_tokenizer(folder)
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three"}\n' * 8)
    words = ["train", str(tmp_path / "run.yaml"), f"model.name=synthetic://{folder}"]
    words += [f"data.train={tmp_path / 'rows.jsonl'}", "data.max_length=32", "train.max_steps=1"]
    (tmp_path / "run.yaml").write_text(f"model: {{}}\ndata: {{}}\noutput: {{url: {tmp_path / 'out'}}}\n")
    done = subprocess.run([sys.executable, "-m", "job", *words], env=environment, capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
