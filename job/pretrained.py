"""Where the pretrained model comes from: a folder, a URL or a hub id; its small files and its configuration."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from job.config.learning import Model
from job.config.running import Storage
from job.convert import SMALL_FILES, converted, has_tokenizer, is_gguf, small_files, weight_files
from job.errors import ModelError
from job.hub import Repository, aside, offline, snapshot
from job.published import at_url, no_config, parse_config_json, reaching, refuse_quantized
from job.store import Store, is_url

Say = Callable[[str], None]


def fetch(model: Model, storage: Storage, say: Say = aside) -> tuple[str, Store]:
    """A local folder with the model's small files, and the store its weights are streamed from.

    A GGUF file without configuration or tokenizer beside it is converted here: it brings them.

    Args:
        say: hears of a busy hub's pauses and of a conversion.

    Raises:
        ModelError: no such folder, hub id or bucket, or it holds no model.
    """
    if is_url(model.name):
        folder = tempfile.mkdtemp(prefix="qlora-model-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        with reaching(model):
            store = at_url(model, storage)
            for name in small_files(store.names()):
                Path(folder, name).write_bytes(store.read(name))
    else:
        folder = model.name if Path(model.name).is_dir() else snapshot(model, SMALL_FILES, say)
        store = Store(folder)
    small = Store(folder).names()
    if "config.json" not in small or not has_tokenizer(small):
        with reaching(model):
            names = store.names() if _is_here(model) else Repository(model, say).names()
        if is_gguf(weight_files(model.name, names)):
            store = fetch_weights(model, store, storage, say)
            folder = store.url
    if not Path(folder, "config.json").is_file():
        raise no_config(model)
    return folder, store


def fetch_weights(model: Model, store: Store, storage: Storage, say: Say = aside) -> Store:
    """The store with the weights in it, as safetensors: `fetch` leaves those of a hub id where they are, and those that
    have to be converted as they are, until all else is checked.

    Args:
        store: what `fetch` gave.
        storage: storage.cache_dir keeps what was converted.
        say: hears of a busy hub's pauses and of a conversion.

    Raises:
        ModelError: the hub does not give them, or they cannot be converted.
        JobError: the storage failed.
    """
    if not (is_url(model.name) or Path(model.name).is_dir()):
        store = _from_hub(model, say)
    return converted(store, storage, say)


def _from_hub(model: Model, say: Say) -> Store:
    """The downloaded weights: safetensors, or what there is instead of them."""
    store = Store(snapshot(model, ("*.safetensors", "*.safetensors.index.json"), say))
    if any(name.endswith(".safetensors") for name in store.names()) or _is_here(model):
        return store
    others = weight_files(model.name, Repository(model, say).names())
    return Store(snapshot(model, [*SMALL_FILES, *others], say)) if others else store


def _is_here(model: Model) -> bool:
    """Whether the folder shows all that there is: the model is no hub id, or there is no network to ask."""
    return is_url(model.name) or Path(model.name).is_dir() or offline()


def base_name(model: Model) -> str:
    """What an adapter's config calls its base, so that it loads from anywhere: hub id, URL or absolute folder.

    Plain peft knows hub ids and folders only; `plain_peft_note` says so of a URL.
    """
    return str(Path(model.name).resolve()) if Path(model.name).is_dir() else model.name


def plain_peft_note(model: Model) -> str | None:
    """What a user of plain peft has to do first when the base is at a URL or in a GGUF file; None when peft finds it
    by itself."""
    if is_url(model.name):
        return (
            f"plain peft cannot load the base from {model.name}: copy it into a folder and write that folder "
            "as base_model_name_or_path into adapter_config.json"
        )
    if Path(model.name).is_dir() and is_gguf(weight_files(model.name, Store(model.name).names())):
        return (
            f"plain peft cannot load the base from the GGUF file in {model.name}: save it as safetensors and write "
            "that folder as base_model_name_or_path into adapter_config.json"
        )
    return None


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
    refuse_quantized(model, getattr(config, "quantization_config", None))
    return config


def _refuse_remote_code(folder: str, model: Model) -> None:
    written = parse_config_json(Path(folder, "config.json").read_bytes(), model)
    kind = written.get("model_type", "(none)")
    if "auto_map" in written and kind not in transformers.CONFIG_MAPPING and not model.trust_remote_code:
        raise ModelError(
            f"model.name: {model.name} has the architecture {kind}, which transformers does not know, and brings "
            "Python code for it, which is not run. Set model.trust_remote_code: true if you trust its authors"
        )
