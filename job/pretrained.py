"""Where the pretrained model comes from: a folder, a URL or a hub id; its small files and its configuration."""

import atexit
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from job.config.learning import Model
from job.config.running import Storage
from job.errors import ModelError
from job.store import Store, is_url, reason

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")


def fetch(model: Model, storage: Storage) -> tuple[str, Store]:
    """A local folder with the model's small files, and the store its weights are streamed from.

    Raises:
        ModelError: no such folder, hub id or bucket, or it holds no model.
    """
    if is_url(model.name):
        store = Store(model.name, storage)
        folder = tempfile.mkdtemp(prefix="qlora-model-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            bucket = store.missing_bucket()
            wanted = [name for name in store.names() if any(Path(name).match(pattern) for pattern in SMALL_FILES)]
            for name in wanted:
                Path(folder, name).write_bytes(store.read(name))
        except Exception as fault:  # every driver has its own errors
            raise ModelError(
                f"model.name: {model.name}: {reason(fault)}. Check the URL and storage.endpoint"
            ) from fault
        if bucket:
            raise ModelError(f"model.name: {model.name}: no bucket {bucket}. Check the URL and storage.endpoint")
    elif Path(model.name).is_dir():
        folder, store = model.name, Store(model.name)
    else:
        folder = _from_hub(model, SMALL_FILES)
        store = Store(folder)
    if not Path(folder, "config.json").is_file():
        raise ModelError(f"model.name: {model.name} has no config.json. Give a transformers checkpoint")
    return folder, store


def fetch_weights(model: Model, store: Store) -> Store:
    """The store with the weights in it: `fetch` leaves those of a hub id where they are until all else is checked.

    Raises:
        ModelError: the hub does not give them.
    """
    if is_url(model.name) or Path(model.name).is_dir():
        return store
    return Store(_from_hub(model, ("*.safetensors", "*.safetensors.index.json")))


def _from_hub(model: Model, files: tuple[str, ...]) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model.name):
        raise ModelError(f"model.name: {model.name}: no such folder, and no hub id (owner/name). Check the path")
    other_formats = ["original/*", "consolidated*"]  # the same weights once more
    try:
        return str(
            huggingface_hub.snapshot_download(
                model.name, revision=model.revision, allow_patterns=list(files), ignore_patterns=other_formats
            )
        )
    except Exception as fault:  # the hub's client raises many kinds
        raise ModelError(
            f"model.name: {model.name} is no folder here and cannot be had from the hub ({reason(fault)}). "
            "Check the path, or the id and HF_TOKEN"
        ) from fault


def base_name(model: Model) -> str:
    """What an adapter's config calls its base, so that it loads from anywhere: hub id, URL or absolute folder.

    Plain peft knows hub ids and folders only; `plain_peft_note` says so of a URL.
    """
    return str(Path(model.name).resolve()) if Path(model.name).is_dir() else model.name


def plain_peft_note(model: Model) -> str | None:
    """What a user of plain peft has to do first when the base is at a URL; None when peft finds it by itself."""
    if not is_url(model.name):
        return None
    return (
        f"plain peft cannot load the base from {model.name}: copy it into a folder and write that folder "
        "as base_model_name_or_path into adapter_config.json"
    )


def read_config(folder: str, model: Model) -> Any:
    """The checkpoint's transformers configuration.

    Raises:
        ModelError: it is unreadable, needs remote code that is not allowed, or is quantized already.
    """
    _refuse_remote_code(folder, model)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as fault:  # a damaged config.json fails in many ways
        raise ModelError(f"model.name: {model.name}: {' '.join(str(fault).split())[:300]}") from fault
    if getattr(config, "quantization_config", None):
        raise ModelError(f"model.name: {model.name} is quantized already. Give the 16-bit checkpoint it was made from")
    return config


def _refuse_remote_code(folder: str, model: Model) -> None:
    try:
        written = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except ValueError as fault:
        raise ModelError(f"model.name: {model.name}: config.json is damaged ({fault}). Copy it again") from fault
    if not isinstance(written, dict):
        raise ModelError(f"model.name: {model.name}: config.json is no object with settings. Copy it again")
    kind = written.get("model_type", "(none)")
    if "auto_map" in written and kind not in transformers.CONFIG_MAPPING and not model.trust_remote_code:
        raise ModelError(
            f"model.name: {model.name} has the architecture {kind}, which transformers does not know, and brings "
            "Python code for it, which is not run. Set model.trust_remote_code: true if you trust its authors"
        )
