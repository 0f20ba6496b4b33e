"""What a checkpoint holds, from its headers alone: names, types, shapes and where the bytes lie.

safetensors: 8 bytes little-endian length, a JSON header, then the tensors (https://huggingface.co/docs/safetensors).
"""

import json
import struct

from job.errors import ModelError
from job.pickled import pickled_files, pickled_header
from job.telling import telling
from job.tensors import ITEM_SIZE, LFS_POINTER, Files, Tensor, indexed_files

INDEX = "model.safetensors.index.json"
FIRST_READ = 1 << 16
"""Bytes of the first ranged read: most headers fit, so most files cost one request."""
CONVERTED = (
    "Training converts pytorch_model.bin, its parts or one GGUF file; other weights, and what only headers are read "
    "of, have to be saved as safetensors"
)


def read_headers(store: Files, places: bool = True) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder by name, from the headers of its files.

    Args:
        places: whether bytes will be read; without, `start` is 0 in pickled files, which tell it by more reads.

    Raises:
        ModelError: there are no weights, a file of the index is missing, damaged, shorter than it says or has to be
            converted first, or the storage does not give it out.
    """
    tensors: dict[str, Tensor] = {}
    with telling(ModelError, f"{store.url}: the weights cannot be read", cure=""):
        there = store.names()
        pickled = pickled_files(store, there)
        for file in pickled or _files(store, there):
            found = pickled_header(store, file, places) if pickled else _read_header(store, file)
            if found is None:
                raise ModelError(f"{store.url}/{file} cannot be read in place. {CONVERTED}")
            tensors |= found
    return tensors


def _files(store: Files, there: list[str]) -> list[str]:
    if INDEX in there:
        return indexed_files(store, INDEX, there)
    found = [name for name in there if name.endswith(".safetensors")]
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if not found:
        raise ModelError(f"{store.url}: no weights. Expected model.safetensors or its parts. {_what_is_there(there)}")
    return found


def _what_is_there(names: list[str]) -> str:
    if any(name.endswith((".bin", ".pt", ".pth", ".gguf")) for name in names):
        return CONVERTED
    return f"The folder holds {', '.join(names[:8])}" if names else "There is no such folder, or it is empty"


def _read_header(store: Files, file: str) -> dict[str, Tensor]:
    try:
        head = store.read(file, 0, FIRST_READ)
        if head.startswith(LFS_POINTER):
            raise ValueError("it is a git-lfs pointer, so run git lfs pull")
        (length,) = struct.unpack("<Q", head[:8])
        if length > 100_000_000:
            raise ValueError(f"a header of {length} bytes")
        text = head[8 : 8 + length]
        if len(text) < length:
            text += store.read(file, 8 + len(text), 8 + length)
        if len(text) < length:
            raise ValueError("the file ends within it")
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {
            name: Tensor(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ModelError(
            f"{store.url}/{file}: the safetensors header is damaged ({fault}). Copy the file again"
        ) from fault
    _refuse_odd_types(tensors, f"{store.url}/{file}")
    size, needed = store.size(file), max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=0)
    if size < needed:
        raise ModelError(f"{store.url}/{file} has {size:,} bytes, its header says {needed:,}. Copy the file again")
    return tensors


def _refuse_odd_types(tensors: dict[str, Tensor], file: str) -> None:
    odd = next((tensor for tensor in tensors.values() if tensor.dtype not in ITEM_SIZE), None)
    if odd:
        raise ModelError(
            f"{file}: {odd.name} has type {odd.dtype}, expected one of {', '.join(ITEM_SIZE)}. "
            "Give the 16-bit checkpoint it was made from"
        )
