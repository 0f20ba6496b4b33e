"""An output layer that config.json ties to the embedding: what the files hold is right, as for transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import job
from job.reading import REQUEST
from tests.conftest import losses, make_llama, qlora
from tests.test_convert import trained

RunFile = Callable[..., Path]
IDS = torch.arange(40)[None]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def said_to_be_tied(folder: Path, tokenizer: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A Llama whose config.json ties, and whose tensors are as `change` leaves them."""
    make_llama(folder, tie_word_embeddings=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def head_alone(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[EMBEDDING]


def equal(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def last_differs(tensors: dict[str, torch.Tensor]) -> None:
    equal(tensors)
    tensors[HEAD][-1, -1] += 1


@pytest.mark.parametrize(
    ("change", "tied"),
    [(lambda tensors: None, False), (last_differs, False), (equal, True), (head_alone, True)],
    ids=["another head", "one value differs", "the same twice", "the head alone"],
)
def test_logits_are_those_of_transformers(
    tiny_model: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], tied: bool
) -> None:
    folder = said_to_be_tied(tmp_path / "model", tiny_model, change)
    ours, _ = job.load_base(str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_a_difference_behind_the_first_request_is_found(tiny_model: Path, tmp_path: Path) -> None:
    wide = {"vocab_size": REQUEST // 2 // 64 + 64, "hidden_size": 64, "num_attention_heads": 4}
    folder = tmp_path / "model"
    make_llama(folder, tie_word_embeddings=False, **wide)
    tensors = load_file(folder / "model.safetensors")
    assert tensors[HEAD].nbytes > REQUEST
    last_differs(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ours, _ = job.load_base(str(folder), dtype="bfloat16")
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_trains_on_the_head_that_the_files_hold(
    run_file: RunFile, tiny_model: Path, tmp_path: Path, ranks: int
) -> None:
    apart = said_to_be_tied(tmp_path / "apart", tiny_model, lambda tensors: None)
    plain = said_to_be_tied(tmp_path / "plain", tiny_model, lambda tensors: None)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    expected = trained(run_file("plain", model={"name": str(plain)}))
    how = {"parallel": {"strategy": "zero3"}} if ranks > 1 else {}
    done = qlora("train", run_file("apart", model={"name": str(apart)}, **how), f"parallel.processes={ranks}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out/apart") == pytest.approx(expected, rel=1e-5)
