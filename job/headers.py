"""What a safetensors checkpoint holds, from its headers alone: names, types, shapes and where the bytes lie.

Format: 8 bytes little-endian length, a JSON header, then the tensors (https://huggingface.co/docs/safetensors).
"""

import json
import math
import struct
from dataclasses import dataclass

from job.errors import ModelError
from job.store import Store

ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FIRST_READ = 1 << 16
"""Bytes of the first ranged read: most headers fit, so most files cost one request."""


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


def read_headers(store: Store) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder by name, from the headers of its safetensors files.

    Raises:
        ModelError: there are no weights, a file of the index is missing, or a header is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(store):
        tensors |= _read_header(store, file)
    return tensors


def _files(store: Store) -> list[str]:
    there = store.names()
    if "model.safetensors.index.json" in there:
        wanted = sorted(set(json.loads(store.read("model.safetensors.index.json"))["weight_map"].values()))
        missing = [name for name in wanted if name not in there]
        if missing:
            raise ModelError(f"{store.url}: the index names {missing[0]}, which is missing. Copy the checkpoint again")
        return wanted
    found = [name for name in there if name.endswith(".safetensors")]
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if not found:
        raise ModelError(f"{store.url}: no weights. Expected model.safetensors or its parts. {_what_is_there(there)}")
    return found


def _what_is_there(names: list[str]) -> str:
    if any(name.endswith((".bin", ".pt", ".pth", ".gguf")) for name in names):
        return "Pickled and GGUF weights are not read: save the model as safetensors"
    return f"The folder holds {', '.join(names[:8])}" if names else "There is no such folder, or it is empty"


def _read_header(store: Store, file: str) -> dict[str, Tensor]:
    try:
        head = store.read(file, 0, FIRST_READ)
        (length,) = struct.unpack("<Q", head[:8])
        if length > 100_000_000:
            raise ValueError(f"a header of {length} bytes")
        text = head[8 : 8 + length]
        if len(text) < length:
            text += store.read(file, 8 + len(text), 8 + length)
        entries = json.loads(text)
    except (struct.error, ValueError) as fault:
        raise ModelError(
            f"{store.url}/{file}: the safetensors header is damaged ({fault}). Copy the file again"
        ) from fault
    entries.pop("__metadata__", None)
    return {
        name: Tensor(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
