"""What a model's publisher wrote about it: config.json and the headers of the weights, wherever they are.

Nothing is downloaded but these, and no library that computes is loaded.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from job.config.learning import Model
from job.config.running import Storage
from job.errors import ModelError
from job.families.native import native_config, native_tensors
from job.headers import read_headers
from job.hub import aside, published_files
from job.shape import Shape, read_shape
from job.store import Store, is_url
from job.telling import telling
from job.tensors import Files, Tensor


def published(
    model: Model, storage: Storage, say: Callable[[str], None] = aside
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parsed config.json and all tensors by name, of a folder, URL or hub id; by the names that transformers has
    for them, where a family's authors had others.

    Args:
        say: hears of each pause that a busy hub asks for.

    Raises:
        ModelError: no such folder, hub id or bucket; no config.json, a damaged one, or one that the family's native
            class cannot represent; or as `job.headers.read_headers`.
    """
    files: Files
    if is_url(model.name):
        with reaching(model):
            files = at_url(model, storage)
            text = _config_text(files, model)
    else:
        files = Store(model.name) if Path(model.name).is_dir() else published_files(model, say)
        text = _config_text(files, model)
    written = parse_config_json(text, model)
    refuse_quantized(model, written.get("quantization_config"))
    config = native_config(written)
    return config, native_tensors(read_headers(files, places=False), written)


def shape_of(
    model: Model, storage: Storage, say: Callable[[str], None] = aside
) -> tuple[Shape | None, tuple[str, ...]]:
    """The model's sizes; None, and a note, for one whose weights or layers are not of the usual form. Whether it can be
    trained all the same is not decided here."""
    try:
        config, headers = published(model, storage, say)
        return read_shape(headers, config), ()
    except ModelError as fault:
        return None, (f"the memory it takes is not known ({fault})",)


def reaching(model: Model) -> AbstractContextManager[None]:
    """Says what a storage driver raises in our words."""
    return telling(ModelError, f"model.name: {model.name}")


def at_url(model: Model, storage: Storage) -> Store:
    """The model's folder at a URL.

    Raises:
        ModelError: there is no such bucket.
    """
    store = Store(model.name, storage)
    if bucket := store.missing_bucket():
        raise ModelError(f"model.name: {model.name}: no bucket {bucket}. Check the URL and storage.endpoint")
    return store


def no_config(model: Model) -> ModelError:
    """The refusal of a folder without config.json."""
    return ModelError(f"model.name: {model.name} has no config.json. Give a transformers checkpoint")


def parse_config_json(text: bytes, model: Model) -> dict[str, Any]:
    """The settings that a config.json holds.

    Raises:
        ModelError: it is damaged.
    """
    try:
        written = json.loads(text)
    except ValueError as fault:
        raise ModelError(f"model.name: {model.name}: config.json is damaged ({fault}). Copy it again") from fault
    if not isinstance(written, dict):
        raise ModelError(f"model.name: {model.name}: config.json is no object with settings. Copy it again")
    return written


def refuse_quantized(model: Model, quantization: object) -> None:
    """Refuse a checkpoint whose configuration says how it is quantized."""
    if quantization:
        raise ModelError(
            f"model.name: {model.name} has a quantization_config, so it is quantized already. Give the 16-bit "
            "checkpoint it was made from"
        )


def _config_text(files: Files, model: Model) -> bytes:
    if "config.json" not in files.names():
        raise no_config(model)
    return files.read("config.json")
