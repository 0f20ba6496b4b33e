"""An architecture that nobody knows: read as Llama where settings and tensors are Llama's, else refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import job
from job.config import parse_config
from job.config.learning import Model
from job.config.running import Storage
from job.errors import ModelError
from job.pretrained import fetch, plain_peft_note
from job.train import train
from job.world import World
from tests.conftest import alpaca_rows, losses, settings, write_rows
from tests.native_models import CONFIGS, make

IDS = torch.arange(3, 43)[None]


def unknown(folder: Path, name: str = "Llama 2", **changed: Any) -> Path:
    """A model under a name that transformers does not know."""
    make(name, folder)
    written = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"} | changed
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_its_logits_are_llama_s_and_a_sentence_says_what_it_is_read_as(tmp_path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(make("Llama 2", tmp_path / "llama")).eval()
    folder, said = unknown(tmp_path / "unknown"), list[str]()
    fetch(Model(name=str(folder)), Storage(), said.append)
    assert said == ["transformers does not know unheard_of; it has Llama's settings and is read as Llama"]
    with torch.no_grad():
        assert torch.equal(job.load_base(str(folder))[0](IDS).logits, theirs(IDS).logits)
    assert "as the class that was trained" in str(plain_peft_note(Model(name=str(folder))))


def test_it_learns(tmp_path: Path) -> None:
    rows, brief = write_rows(tmp_path / "rows.jsonl", alpaca_rows(40)), {"train": {"max_steps": 10}}
    values = settings(unknown(tmp_path / "unknown"), rows, tmp_path / "out", **brief)
    said: list[str] = []
    train(parse_config(json.dumps(values), []), World(), said.append)
    found = losses(tmp_path / "out")
    assert sum(found[-3:]) < sum(found[:3])
    assert any("is read as Llama" in line for line in said)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("sliding_window", 32, "32"),
        ("qk_norm", True, "true"),
        ("logit_scale", 0.5, "0.5"),
        ("layer_types", ["a"], '["a"]'),
    ],
)
def test_a_setting_that_llama_does_not_have_is_refused_by_name(
    tmp_path: Path, setting: str, value: Any, said: str
) -> None:
    with pytest.raises(ModelError) as refused:
        job.load_base(str(unknown(tmp_path, **{setting: value})))
    assert str(refused.value) == (
        f"unheard_of: config.json has {setting} {said}, which Llama does not have, and transformers does not know this "
        "architecture. Use one that it knows"
    )


def test_one_that_is_off_is_not(tmp_path: Path) -> None:
    assert job.load_base(str(unknown(tmp_path, sliding_window=None, qk_norm=False)))[0]


def test_tensors_that_are_not_llama_s_are_named(tmp_path: Path) -> None:
    extra = {"use_sliding_window": False, "sliding_window": None, "layer_types": None, "max_window_layers": 0}
    with pytest.raises(ModelError, match=r"self_attn.q_proj.bias is in the checkpoint but not in the model"):
        job.load_base(str(unknown(tmp_path, "Qwen2.5", **extra)))


def test_one_without_llama_s_settings_is_left_to_transformers(tmp_path: Path) -> None:
    written = CONFIGS["GPT-2"].to_dict() | {"model_type": "unheard_of"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ModelError, match=r"unheard_of"):
        job.load_base(str(tmp_path))
