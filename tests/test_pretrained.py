"""What an adapter says of its base, and what has to be said beside it."""

import json
from pathlib import Path

import peft
import pytest
import transformers

from job import adapter
from job.config.learning import Model
from job.pretrained import base_name, plain_peft_note
from job.store import Store
from job.tokenizer import Tokenizer


@pytest.mark.parametrize("revision", ["v1.0", None])
def test_the_adapter_names_the_revision_of_its_base(tiny_model: Path, tmp_path: Path, revision: str | None) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    adapter.write(model, trained, Tokenizer(str(tiny_model)), Store(str(tmp_path)), trained=False, revision=revision)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == revision
    assert peft.PeftConfig.from_pretrained(tmp_path).revision == revision


def test_a_base_at_a_url_is_noted_as_beyond_plain_peft() -> None:
    name = "s3://bucket/model"
    assert base_name(Model(name=name)) == name
    assert plain_peft_note(Model(name=name)) == (
        "plain peft cannot load the base from s3://bucket/model: copy it into a folder and write that folder "
        "as base_model_name_or_path into adapter_config.json"
    )


def test_a_base_that_plain_peft_finds_needs_no_note(tiny_model: Path) -> None:
    assert plain_peft_note(Model(name="owner/model")) is None
    assert plain_peft_note(Model(name=str(tiny_model))) is None


def test_a_base_in_a_gguf_file_is_noted_as_beyond_plain_peft(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_1.gguf").touch()
    assert plain_peft_note(Model(name=str(tmp_path))) == (
        f"plain peft cannot load the base from the GGUF file in {tmp_path}: save it as safetensors and write "
        "that folder as base_model_name_or_path into adapter_config.json"
    )
