"""What a safetensors checkpoint holds, from its headers alone: names, types, shapes and where the bytes lie.

Format: 8 bytes little-endian length, a JSON header, then the tensors (https://huggingface.co/docs/safetensors).
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from job.errors import ModelError
from job.store import reason

ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
INDEX = "model.safetensors.index.json"
FIRST_READ = 1 << 16
"""Bytes of the first ranged read: most headers fit, so most files cost one request."""


class Files(Protocol):
    """A folder of a checkpoint, as much of `job.store.Store` as headers need."""

    url: str

    def names(self) -> list[str]:
        """Names of the files directly inside, sorted."""

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The file's bytes [start, stop); fewer when the file ends before."""

    def size(self, name: str) -> int:
        """The file's length, bytes."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: `start` is its first byte in `file`, `dtype` safetensors' name of its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def item_size(self) -> int:
        """Bytes an element."""
        return ITEM_SIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.item_size


def read_headers(store: Files) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder by name, from the headers of its safetensors files.

    Raises:
        ModelError: there are no weights, a file of the index is missing, damaged or shorter than it says, or the
            storage does not give it out.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for file in _files(store):
            tensors |= _read_header(store, file)
    except ModelError:
        raise
    except Exception as fault:  # every driver has its own errors
        raise ModelError(f"{store.url}: the weights cannot be read: {reason(fault)}") from fault
    return tensors


def _files(store: Files) -> list[str]:
    there = store.names()
    if INDEX in there:
        return indexed_files(store, INDEX, there)
    found = [name for name in there if name.endswith(".safetensors")]
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if not found:
        raise ModelError(f"{store.url}: no weights. Expected model.safetensors or its parts. {_what_is_there(there)}")
    return found


def indexed_files(store: Files, index: str, there: Sequence[str]) -> list[str]:
    """The files that an index names, each once, sorted.

    Args:
        index: name of the index, a JSON file whose `weight_map` says which tensor is in which file.
        there: the names in the folder.

    Raises:
        ModelError: the index is damaged, or a file that it names is missing.
    """
    try:
        wanted = sorted(set(json.loads(store.read(index))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ModelError(f"{store.url}/{index} is damaged ({fault!r}). Copy the file again") from fault
    missing = [name for name in wanted if name not in there]
    if missing:
        named = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        raise ModelError(
            f"{store.url}: {index} names {len(wanted)} files, {len(missing)} are missing ({named}). "
            "Copy the checkpoint again"
        )
    return wanted


def _what_is_there(names: list[str]) -> str:
    if any(name.endswith((".bin", ".pt", ".pth", ".gguf")) for name in names):
        return (
            "Training converts pytorch_model.bin, its parts or one GGUF file; other weights, and what only headers "
            "are read of, have to be saved as safetensors"
        )
    return f"The folder holds {', '.join(names[:8])}" if names else "There is no such folder, or it is empty"


def _read_header(store: Files, file: str) -> dict[str, Tensor]:
    try:
        head = store.read(file, 0, FIRST_READ)
        if head.startswith(b"version https://git-lfs"):
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
