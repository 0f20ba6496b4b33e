"""An adapter file that is damaged: refused where it is read, and where it was written."""

from pathlib import Path

import peft
import pytest
import transformers

from job import adapter
from job.errors import AdapterError, InputError
from job.store import Store
from job.tokenizer import Tokenizer

KEPT = pytest.mark.parametrize("kept", [0, 100, -1], ids=["empty", "cut in its header", "without its last byte"])


@pytest.fixture
def model(tiny_model: Path) -> peft.PeftModel:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))


def write(model: peft.PeftModel, tiny_model: Path, store: Store) -> None:
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    adapter.write(model, tensors, Tokenizer(str(tiny_model)), store, trained=False)


@KEPT
def test_a_damaged_adapter_is_refused_with_what_to_do(
    model: peft.PeftModel, tiny_model: Path, tmp_path: Path, kept: int
) -> None:
    write(model, tiny_model, Store(str(tmp_path)))
    adapter.load(model, Store(str(tmp_path)))
    file = tmp_path / adapter.WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError) as refused:
        adapter.load(model, Store(str(tmp_path)))
    said = str(refused.value)
    assert said.startswith(f"{Store(str(tmp_path)).url}/{adapter.WEIGHTS}: the adapter is damaged (")
    assert said.endswith("). Copy it again, or train again")


@KEPT
def test_an_adapter_that_a_storage_damages_is_not_taken_for_written(
    model: peft.PeftModel, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda store, name: read(store, name)[:kept])
    with pytest.raises(AdapterError, match=r"/adapter_model\.safetensors: damaged when read back \("):
        write(model, tiny_model, Store(str(tmp_path)))
