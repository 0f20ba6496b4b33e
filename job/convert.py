"""Weights that are no safetensors, pickled (pytorch_model.bin) or GGUF, made into safetensors once, on the node's disk.

They stay in storage.cache_dir, where storage.cache_gib does not count them; without one the folder is temporary.
"""

import importlib
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from job.cache import Cache
from job.config.running import Storage
from job.errors import ModelError
from job.headers import INDEX
from job.hub import aside
from job.made_once import made_once
from job.pickled import PICKLED_INDEX, is_pickled, pickled_files, pickled_header
from job.reading import REQUEST, Range, read_ahead
from job.store import Store, reason
from job.telling import telling
from job.tensors import refuse_lfs_pointer

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
"""What a model's folder holds beside its weights."""
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
"""Files that a tokenizer is made from; one of them is enough."""
VERSION = 1
"""Part of a converted folder's name: raise it when the conversion gives something else."""


def weight_files(url: str, names: Sequence[str]) -> list[str]:
    """The files that have to be converted: a pickled checkpoint's, or the one GGUF file; none beside safetensors.

    Raises:
        ModelError: there are several GGUF files.
    """
    if any(name.endswith(".safetensors") for name in names):
        return []
    pickled = [name for name in names if is_pickled(name)]
    if pickled:
        return [*pickled, *(name for name in names if name == PICKLED_INDEX)]
    found = [name for name in names if name.endswith(".gguf")]
    if len(found) > 1:
        raise ModelError(
            f"{url} holds {len(found)} GGUF files ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}). "
            "Expected one: copy the one that is meant into a folder of its own; merge the parts of a split one first"
        )
    return found


def is_gguf(files: Sequence[str]) -> bool:
    """Whether these are the `weight_files` of a GGUF checkpoint, which carries configuration and tokenizer too."""
    return any(name.endswith(".gguf") for name in files)


def small_files(names: Sequence[str]) -> list[str]:
    """Those of the names that are a model's configuration, tokenizer or code."""
    return [name for name in names if any(Path(name).match(pattern) for pattern in SMALL_FILES)]


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether one of the names is what a tokenizer is made from."""
    return any(Path(name).match(pattern) for name in names for pattern in TOKENIZERS)


def converted(store: Store, storage: Storage, say: Callable[[str], None] = aside) -> Store:
    """The folder with the same weights as safetensors; the store itself when it has nothing to convert.

    A GGUF file's folder has configuration and tokenizer as well: those beside the file, else those within it.

    Args:
        store: the model's folder.
        storage: storage.cache_dir keeps the result for the node's next run.
        say: hears once where the result goes.

    Raises:
        ModelError: the weights are damaged, incomplete, hold more than weights, or do not fit on the disk.
        JobError: the storage failed.
    """
    with telling(ModelError, f"{store.url}: the weights cannot be read", cure=""):
        names = store.names()
        files = weight_files(store.url, names)
        if not files:
            return store
        beside = {name: store.read(name) for name in small_files(names)} if is_gguf(files) else {}
        parts = files if is_gguf(files) else pickled_files(store, names)
        if not is_gguf(files) and all(pickled_header(store, part, places=False) for part in parts):
            return store
    kind = "GGUF" if is_gguf(files) else "pickled"

    def fill(draft: Path, folder: Path, stays: bool) -> None:
        how = "once" if stays else "for this run (storage.cache_dir would keep them)"
        say(f"{store.url} holds {kind} weights: converted to safetensors {how}, into {folder}")
        if is_gguf(files):
            _convert_gguf(store, files[0], beside, draft)
        else:
            _convert_pickled(store, parts, draft)

    cache = Path(storage.cache_dir).expanduser() / "converted" if storage.cache_dir else None
    return Store(str(made_once(cache, _key(store, [*parts, *beside], storage, say), fill)))


def _key(store: Store, sources: Sequence[str], storage: Storage, say: Callable[[str], None]) -> str | None:
    """A name for these files as they are now; None when the storage does not tell whether they change."""
    cache = Cache(storage.cache_dir or "", say=say if storage.cache_dir else lambda line: None)
    identities = [_local_identity(store, name) if store.is_local else cache.identity(store, name) for name in sources]
    known = [identity for identity in identities if identity]
    return sha256(json.dumps([VERSION, *known]).encode()).hexdigest() if len(known) == len(identities) else None


def _local_identity(store: Store, name: str) -> str:
    """Of a link the file behind it: its own dates say nothing about that."""
    path = Path(store.path(name)).resolve()
    about = path.stat()
    return json.dumps([name, str(path), about.st_size, about.st_mtime_ns, about.st_ino])


def _convert_pickled(store: Store, files: Sequence[str], draft: Path) -> None:
    """Write each pickled file as a safetensors file, one in memory at a time, and their index."""
    places: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        part = f"model-{number:05}-of-{len(files):05}.safetensors"
        with _on_disk(store, file, draft) as path:
            sizes = _convert_pickle(path, draft / part, f"{store.url}/{file}")
        places |= dict.fromkeys(sizes, part)
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (draft / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _convert_pickle(path: Path, target: Path, name: str) -> dict[str, int]:
    """Write one pickled file as safetensors; returns the bytes of each tensor in it."""
    tensors = _each_once(_unpickled(path, name))
    save_file(tensors, target, metadata={"format": "pt"})
    return {key: tensor.nbytes for key, tensor in tensors.items()}


def _unpickled(path: Path, name: str) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        head = file.read(32)
    refuse_lfs_pointer(head, name)
    try:
        # files from before torch 1.6 are no zip archives and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except pickle.UnpicklingError as fault:
        if not re.search(r"Unsupported (global|class)|GLOBAL", str(fault)):
            raise _damaged(name, fault) from fault
        (found,) = re.findall(r"GLOBAL (\S+)", str(fault))[:1] or ["something"]
        raise ModelError(
            f"{name} holds more than weights ({found}) and is not opened, because that could run code. Where you trust "
            "its authors, load it and save the model as safetensors"
        ) from fault
    except Exception as fault:  # a damaged archive fails in many ways
        raise _damaged(name, fault) from fault
    if not (isinstance(content, dict) and content and all(isinstance(each, torch.Tensor) for each in content.values())):
        raise ModelError(f"{name} holds no dictionary of tensors by name. Save the model as safetensors")
    return content


def _damaged(name: str, fault: Exception) -> ModelError:
    # torch's own sentence recommends to load it without weights_only
    why = "no pickle of tensors" if isinstance(fault, pickle.UnpicklingError) else reason(fault)
    return ModelError(f"{name} is damaged ({why}). Copy the file again")


def _each_once(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory: of names for the same tensor the first, as tied weights are saved."""
    kept, seen, storages = {}, set(), set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        same = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and same in seen:
            continue
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
        kept[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
        seen.add(same)
        storages.add(storage.data_ptr())
    return kept


def _convert_gguf(store: Store, file: str, beside: Mapping[str, bytes], draft: Path) -> None:
    """Write the dequantized model; configuration and tokenizer `beside` the file win over those within it."""
    url = f"{store.url}/{file}"
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as fault:
        raise ModelError(f"{url}: GGUF files are read by the package gguf. Install it, or give safetensors") from fault
    with _on_disk(store, file, draft) as path:
        try:
            how = {"gguf_file": path.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=_stored_type(gguf.GGUFReader(path)), output_loading_info=True, **how
            )
            tokenizer = None
            if not has_tokenizer(beside):
                tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as fault:  # unknown architectures, damaged files: each fails in its own way
            raise ModelError(
                f"{url} cannot be read ({' '.join(str(fault).split())[:200]}). "
                "Copy the file again, or give the safetensors it was made from"
            ) from fault
    if missing := sorted(loaded["missing_keys"]):  # they would be random
        raise ModelError(f"{url} lacks {', '.join(missing[:3])}. Give the safetensors that it was made from")
    model.save_pretrained(draft)
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    for name, content in beside.items():
        (draft / name).write_bytes(content)


def _stored_type(reader: Any) -> torch.dtype:
    """The type that holds a GGUF file's matrices: their own when they are plain floats, else bf16."""
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return {("F32",): torch.float32, ("F16",): torch.float16}.get(tuple(types), torch.bfloat16)


@contextmanager
def _on_disk(store: Store, file: str, folder: Path) -> Iterator[Path]:
    """The file on this machine: itself, or downloaded for the while."""
    if store.is_local:
        yield Path(store.path(file))
        return
    path = folder / file
    with telling(ModelError, f"{store.url}: the weights cannot be read", cure=""):
        size = store.size(file)
    ranges = [Range(file, start, min(start + REQUEST, size)) for start in range(0, size, REQUEST)]
    try:
        with open(path, "wb") as target:
            for content in read_ahead(store, ranges):
                target.write(content)
        yield path
    finally:
        path.unlink(missing_ok=True)
