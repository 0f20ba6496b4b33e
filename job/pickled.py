"""Pickled checkpoints (pytorch_model.bin) read in place: what each tensor is and where its bytes lie.

torch.save writes a zip archive, nothing in it compressed: `data.pkl`, a pickle that builds the dictionary, and each
storage's bytes in a file `data/KEY` (torch/serialization.py, since 1.6). So a tensor is a range of the file, as in
safetensors. The pickle is read by Python's own unpickler in Python, cut down to the few names of such a dictionary and
to changing nothing but dictionaries; what it does not understand (an older file, a view that is not contiguous,
anything but tensors) is left to `job.convert`.
"""

import io
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from job.errors import ModelError
from job.tensors import ITEM_SIZE, Files, Tensor, indexed_files

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
BUFFER = 1 << 16
"""Bytes of a ranged read while the archive is looked at."""
LONGEST_PICKLE = 100_000_000
CONNECTIONS = 8
DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""safetensors' names of types by torch's classes of storages."""
_PART = re.compile(r"pytorch_model(-\d+-of-0*(\d+))?\.bin")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Before each file of a zip archive: a mark, and at the end the lengths of its name and of an extra field."""


class _Other(Exception):
    """The file is none that can be read in place."""


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class _View:
    """A contiguous tensor: the elements of a storage from `offset` on."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def is_pickled(name: str) -> bool:
    """Whether a file's name is that of a pickled checkpoint or of a part of one."""
    return _PART.fullmatch(name) is not None


def as_safetensors(name: str) -> str:
    """What a checkpoint's file is called when its tensors are written as safetensors."""
    return f"{name.replace('pytorch_model', 'model').removesuffix('.bin')}.safetensors" if is_pickled(name) else name


def pickled_files(store: Files, names: Sequence[str]) -> list[str]:
    """The files of a pickled checkpoint in their order; none beside safetensors.

    Args:
        names: the names in the folder.

    Raises:
        ModelError: a part is missing, or the index is damaged.
    """
    parts = [name for name in names if is_pickled(name)]
    if not parts or any(name.endswith(".safetensors") for name in names):
        return []
    if PICKLED_INDEX in names:
        return indexed_files(store, PICKLED_INDEX, names)
    if PICKLED in parts:
        return [PICKLED]
    said = {int(part[2]) for name in parts if (part := _PART.fullmatch(name))}
    if said != {len(parts)}:
        raise ModelError(
            f"{store.url} holds {len(parts)} parts of pytorch_model.bin, their names say {max(said)}. "
            "Copy the checkpoint again"
        )
    return parts


def pickled_header(store: Files, file: str, places: bool = True) -> dict[str, Tensor] | None:
    """The tensors of a pickled file by name, of those that share memory the first; None for one that cannot be read in
    place. Storage faults are not caught.

    Args:
        places: whether bytes will be read, so that `start` is wanted: one more small read each.
    """
    raw = io.BufferedReader(_Ranged(store, file), BUFFER)
    try:
        with zipfile.ZipFile(raw) as archive:
            entries = _entries(archive)
            views = _views(archive, entries)
            found = {entries[f"data/{view.storage.key}"]: view for view in views.values()}
            if any(not _whole(entry, view.storage) for entry, view in found.items()):
                return None
    except (_Other, zipfile.BadZipFile, KeyError):
        return None
    starts = _starts(store, file, list(found)) if places else {}
    if starts is None:
        return None
    tensors: dict[str, Tensor] = {}
    seen: set[_View] = set()
    for name, view in views.items():
        if view in seen:  # tied
            continue
        seen.add(view)
        tensor = Tensor(name, view.storage.dtype, view.shape, file, 0)
        begin = starts.get(entries[f"data/{view.storage.key}"].filename, 0) + view.offset * tensor.item_size
        tensors[name] = replace(tensor, start=begin)
    return tensors


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's files by their names in its one folder.

    Raises:
        _Other: there are several folders, or a name twice.
    """
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    folders = {entry.filename.partition("/")[0] for entry in archive.infolist()}
    if len(folders) != 1 or len(entries) != len(archive.infolist()):
        raise _Other
    return entries


def _whole(entry: zipfile.ZipInfo, storage: _Storage) -> bool:
    """Whether an entry is a storage's bytes as they are."""
    return entry.compress_type == zipfile.ZIP_STORED and entry.file_size == storage.numel * ITEM_SIZE[storage.dtype]


def _views(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> dict[str, _View]:
    """What data.pkl builds.

    Raises:
        _Other: anything but a dictionary of contiguous tensors of this machine's byte order.
        KeyError: there is no data.pkl.
    """
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise _Other
    if entries["data.pkl"].file_size > LONGEST_PICKLE:
        raise _Other
    with archive.open(entries["data.pkl"]) as file:
        text = file.read()
    try:
        content = _Unpickler(io.BytesIO(text)).load()
    except Exception as fault:  # a damaged or hostile pickle fails in many ways
        raise _Other from fault
    if not (isinstance(content, dict) and content and all(type(one) is _View for one in content.values())):
        raise _Other
    if any(type(name) is not str for name in content):
        raise _Other
    return dict(content)


def _starts(store: Files, file: str, entries: Sequence[zipfile.ZipInfo]) -> dict[str, int] | None:
    """The first byte of each entry's content; None when one is not where the archive's directory says."""

    def start(entry: zipfile.ZipInfo) -> int:
        head = store.read(file, entry.header_offset, entry.header_offset + _LOCAL_HEADER.size)
        if len(head) < _LOCAL_HEADER.size or not head.startswith(b"PK\3\4"):
            return -1
        _, name, extra = _LOCAL_HEADER.unpack(head)
        return int(entry.header_offset + _LOCAL_HEADER.size + name + extra)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        starts = dict(zip([entry.filename for entry in entries], pool.map(start, entries), strict=True))
    return None if -1 in starts.values() else starts


class _Ranged(io.RawIOBase):
    """A file of a store, sought and read in part."""

    def __init__(self, store: Files, file: str):
        self.store, self.file, self.size, self.at = store, file, store.size(file), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        stop = min(self.at + len(buffer), self.size)
        content = self.store.read(self.file, self.at, stop) if self.at < stop else b""
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)


def _tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: object = None,
    hooks: object = None,
    metadata: object = None,
) -> _View:
    """torch._utils._rebuild_tensor_v2.

    Raises:
        _Other: it is not contiguous, not within its storage, or more than its bytes say (negated, say).
    """
    if metadata or type(storage) is not _Storage or any(type(one) is not int for one in (offset, *shape, *stride)):
        raise _Other
    numel = math.prod(shape)
    expected = 1
    for size, step in reversed(list(zip(shape, stride, strict=True))):
        if numel and size != 1 and step != expected:
            raise _Other
        expected *= size
    if min((offset, *shape)) < 0 or offset + numel > storage.numel:
        raise _Other
    return _View(storage, offset, tuple(shape))


def _parameter(data: _View, *of_training: object) -> _View:
    """torch._utils._rebuild_parameter."""
    return data


class _Unpickler(pickle._Unpickler):
    """Builds dictionaries of `_View`. Nothing that a pickle names is imported; what it may call are the functions here,
    which it may not change. (The one in C fills its memory for a number that a pickle makes up.)"""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    KNOWN: Mapping[tuple[str, str], Callable[..., Any] | str] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        **{("torch", name): dtype for name, dtype in DTYPES.items()},
    }

    def load_build(self) -> None:
        """Leave out a dictionary's attributes, where state_dict() keeps versions.

        Raises:
            _Other: something else is to be changed.
        """
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        stack.pop()
        if type(stack[-1]) is not OrderedDict:
            raise _Other

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        """One of KNOWN.

        Raises:
            _Other: it is none of them.
        """
        if (module, name) not in self.KNOWN:
            raise _Other
        return self.KNOWN[module, name]

    def persistent_load(self, saved: Any) -> _Storage:
        """A storage: ("storage", type, key, device, elements)."""
        kind, dtype, key, _, numel = saved
        if kind != "storage" or dtype not in DTYPES.values():
            raise _Other
        return _Storage(dtype, str(key), int(numel))
