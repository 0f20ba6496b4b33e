"""What a checkpoint's files have to say of their tensors, whatever their format: names, types, shapes, places."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from job.errors import ModelError

LFS_POINTER = b"version https://git-lfs"
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


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


def refuse_lfs_pointer(head: bytes, name: str) -> None:
    """Refuse what git left in a file's place.

    Raises:
        ModelError: `head`, the first bytes of the file, are those of a pointer.
    """
    if head.startswith(LFS_POINTER):
        raise ModelError(f"{name} is a git-lfs pointer. Run git lfs pull")


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
