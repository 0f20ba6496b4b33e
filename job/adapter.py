"""The result: written in PEFT's format, read back, and refused if it is not what was trained."""

import tempfile
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError

from job.errors import AdapterError, InputError
from job.store import Store
from job.tokenizer import Tokenizer

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def write(
    model: Any,
    tensors: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    store: Store,
    trained: bool,
    revision: str | None = None,
) -> None:
    """Write adapter and tokenizer into `store`, its config last, and prove what lies there.

    Args:
        model: the peft model, for its configuration.
        tensors: the trained parameters by their names in the model; one that several modules share by its first.
        trained: at least one step was taken, so that an untouched B is a fault.
        revision: the base's, `model.revision`, which plain peft asks the hub for; None is its default branch.

    Raises:
        AdapterError: what was read back is damaged, empty, not finite, or differs from what was trained.
    """
    tensors = _under_all_names(model, tensors)
    expected = get_peft_model_state_dict(model, state_dict=tensors)
    model.active_peft_config.revision = revision
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
        Path(folder, "README.md").unlink(missing_ok=True)  # peft's card with nothing filled in
        tokenizer.save(folder)
        files = sorted(Path(folder).iterdir(), key=lambda file: (file.name == SETTINGS, file.name))
        for file in files:
            store.write(file.name, file.read_bytes())
    try:
        found = safetensors.torch.load(store.read(WEIGHTS))
    except SafetensorError as fault:
        raise AdapterError(
            f"{store.url}/{WEIGHTS}: damaged when read back ({fault}): the storage changed it. Try another output.url"
        ) from fault
    prove(found, expected, trained)


def _under_all_names(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with each shared parameter under the names of all modules that share it, as peft's files have it."""
    first: dict[int, str] = {}
    everywhere = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in everywhere:
        first.setdefault(id(parameter), name)
    twins = {name: tensors[first[id(value)]] for name, value in everywhere if first[id(value)] in tensors}
    return {**twins, **tensors}


def prove(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], trained: bool) -> None:
    """Compare an adapter that was read back with the one that was trained.

    Raises:
        AdapterError: says which tensor is wrong and how.
    """
    if not expected or set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))[:3]
        raise AdapterError(f"the adapter has {len(found)} tensors, expected {len(expected)} ({', '.join(odd)})")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.numel() == 0:
            raise AdapterError(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name} is not finite. Lower train.learning_rate")
        if not torch.equal(tensor, expected[name].to(tensor.dtype)):
            raise AdapterError(f"{name} differs from what was trained: the storage changed it")
    if trained and not any(tensor.any() for name, tensor in found.items() if "lora_B" in name):
        raise AdapterError("all B matrices are zero: nothing was learnt")


def load(model: peft.PeftModel, store: Store) -> None:
    """Put a written adapter into a model that has one of the same shape.

    Raises:
        InputError: there is no adapter, or it is damaged or of another shape.
    """
    if not store.exists(WEIGHTS):
        raise InputError(f"{store.url}: no adapter there. Run `qlora train` first")
    try:
        tensors = safetensors.torch.load(store.read(WEIGHTS))
    except SafetensorError as fault:
        raise InputError(
            f"{store.url}/{WEIGHTS}: the adapter is damaged ({fault}). Copy it again, or train again"
        ) from fault
    try:
        outcome = set_peft_model_state_dict(model, tensors)
    except RuntimeError as fault:
        raise InputError(f"{store.url}: the adapter does not fit these settings: {fault}") from fault
    if outcome.unexpected_keys:
        raise InputError(f"{store.url}: the adapter has {outcome.unexpected_keys[0]}, which these settings do not")
