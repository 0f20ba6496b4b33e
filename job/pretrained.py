"""Where the pretrained model comes from: a folder, a URL or a hub id; its small files and its configuration."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from job.config.learning import Model
from job.config.running import Storage
from job.convert import SMALL_FILES, converted, has_tokenizer, is_gguf, small_files, weight_files
from job.errors import ModelError
from job.families import family_of
from job.families.llama_like import as_llama, is_like_llama
from job.families.native import native_config, native_tensors
from job.headers import read_headers
from job.hub import Repository, aside, offline, snapshot
from job.published import at_url, no_config, parse_config_json, reaching, refuse_quantized
from job.store import Store, is_url
from job.tensors import Tensor

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
    if (kind := _parsed(folder, model).get("model_type")) != as_written(folder, model).get("model_type"):
        say(f"transformers does not know {kind}; it has Llama's settings and is read as Llama")
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


def in_gguf(model: Model, storage: Storage, say: Say = aside) -> bool:
    """Whether the weights are a GGUF file's.

    Raises:
        ModelError: no such folder, hub id or bucket, or several GGUF files.
    """
    with reaching(model):
        if is_url(model.name):
            names = at_url(model, storage).names()
        elif Path(model.name).is_dir():
            names = Store(model.name).names()
        else:
            names = Store(snapshot(model, SMALL_FILES, say)).names() if offline() else Repository(model, say).names()
    return is_gguf(weight_files(model.name, names))


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


def plain_peft_note(model: Model, files: str | None = None) -> str | None:
    """What a user of plain peft has to do first when the base is at a URL, in a GGUF file, or not of the class that
    transformers would take; None when peft finds it by itself.

    Args:
        files: the local folder with its config.json; model.name where that is a folder.
    """
    folder = Path(files or model.name)
    if (folder / "config.json").is_file() and has_own_names(str(folder), model):
        return (
            f"plain peft cannot load the base from {model.name} as the class that was trained: job.load_base gives it "
            "the base"
        )
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
    """The checkpoint's transformers configuration; that of the native class, where a family's authors had their own.

    Raises:
        ModelError: it is unreadable, needs remote code that is not allowed, is quantized already, or has a setting that
            the native class cannot represent.
    """
    written = as_written(folder, model)
    refuse_quantized(model, written.get("quantization_config"))
    settings = native_config(written)
    _refuse_remote_code(settings, model)
    try:
        if has_own_names(folder, model):
            return transformers.AutoConfig.for_model(**settings)
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as fault:  # a damaged config.json fails in many ways
        raise ModelError(f"model.name: {model.name}: {' '.join(str(fault).split())[:300]}") from fault


def read_tensors(folder: str, checkpoint: Store, model: Model) -> dict[str, Tensor]:
    """The checkpoint's tensors by transformers' names, in place.

    Args:
        folder: what `fetch` gave, with config.json.
        checkpoint: the folder with the weights.

    Raises:
        ModelError: as `job.headers.read_headers` and `job.families.native.native_tensors`.
    """
    return native_tensors(read_headers(checkpoint), as_written(folder, model))


def as_written(folder: str, model: Model) -> dict[str, Any]:
    """The parsed config.json of a folder, as the model's publisher wrote it; as Llama's, of an architecture that nobody
    knows and that has Llama's settings.

    Raises:
        ModelError: it is damaged, or has besides Llama's settings one that Llama does not have.
    """
    written = _parsed(folder, model)
    known = family_of(written) or written.get("model_type") in transformers.CONFIG_MAPPING
    return as_llama(written) if not known and is_like_llama(written) else written


def _parsed(folder: str, model: Model) -> dict[str, Any]:
    return parse_config_json(Path(folder, "config.json").read_bytes(), model)


def has_own_names(folder: str, model: Model) -> bool:
    """Whether the model in the folder becomes another class than the one that transformers would take."""
    written = as_written(folder, model)
    family = family_of(written)
    own = family is not None and bool(family.original or family.inner)
    return own or written != _parsed(folder, model)


def _refuse_remote_code(written: Mapping[str, Any], model: Model) -> None:
    kind = written.get("model_type", "(none)")
    if "auto_map" in written and kind not in transformers.CONFIG_MAPPING and not model.trust_remote_code:
        raise ModelError(
            f"model.name: {model.name} has the architecture {kind}, which transformers does not know, and brings "
            "Python code for it, which is not run. Set model.trust_remote_code: true if you trust its authors"
        )
