"""Checkpoints of any size without a disk that holds them: an fsspec file system whose files are headers and noise.

`synthetic:///FOLDER` shows the folder's files; in the place of each NAME.safetensors.header a NAME.safetensors, which
begins with the header and goes on with as many bytes of random bf16 numbers as it says. Tensors of one dimension, the
weights of norms, are ones. Bytes are a function of the place in the file, and copied from memory, so that what is
measured is what a rank asks for and what it does with that; `prepare` writes a model's folder, and `environment` has
processes know the file system the way fsspec's plugins are known.
"""

import bisect
import functools
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from fsspec.spec import AbstractFileSystem
from transformers import AutoModelForCausalLM, PretrainedConfig

HEADER = ".header"
PATTERN = 1 << 26
"""Bytes after which the noise repeats."""
ONE = b"\x80\x3f"
"""1 in bf16, little-endian."""
FILE = 16 << 30
"""Bytes of tensors after which a file ends."""


class SyntheticSource(AbstractFileSystem):
    """Read only; paths are those of this machine."""

    protocol = "synthetic"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The files in the folder."""
        folder = Path(self._strip_protocol(path))
        found = [self.info(str(one).removesuffix(HEADER)) for one in sorted(folder.iterdir()) if one.is_file()]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size and type of a file or folder.

        Raises:
            FileNotFoundError: there is none.
        """
        here = Path(self._strip_protocol(path))
        if here.is_dir():
            return {"name": str(here), "size": 0, "type": "directory"}
        size = _Noise.of(str(here)).size if _is_synthetic(here) else here.stat().st_size
        return {"name": str(here), "size": size, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Bytes [start, end) of the file; fewer when it ends before."""
        here = Path(self._strip_protocol(path))
        if not _is_synthetic(here):
            return here.read_bytes()[start:end]
        noise = _Noise.of(str(here))
        return noise.read(start or 0, noise.size if end is None else min(end, noise.size))


def _is_synthetic(path: Path) -> bool:
    return Path(f"{path}{HEADER}").is_file()


class _Noise:
    """One safetensors file of which only the header exists."""

    def __init__(self, path: str):
        self.header = Path(path + HEADER).read_bytes()
        entries = [entry for name, entry in json.loads(self.header[8:]).items() if name != "__metadata__"]
        spans = sorted((*entry["data_offsets"], len(entry["shape"])) for entry in entries)
        begin = len(self.header)
        self.size = begin + max(stop for _, stop, _ in spans)
        self.ones = [(begin + start, begin + stop) for start, stop, dimensions in spans if dimensions == 1]

    @staticmethod
    @functools.cache
    def of(path: str) -> "_Noise":
        return _Noise(path)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop)."""
        first = min(stop, max(start, len(self.header)))
        parts: list[bytes | memoryview] = [self.header[start:first]]
        at, pattern = first, _pattern()
        while at < stop:
            place = at % PATTERN
            length = min(stop - at, PATTERN - place)
            parts.append(pattern[place : place + length])
            at += length
        found = b"".join(parts)
        place = bisect.bisect(self.ones, (start, 0)) - 1
        ones = [span for span in self.ones[max(place, 0) :] if span[0] < stop and span[1] > start]
        if not ones:
            return found
        mended = bytearray(found)
        for begin, end in ones:
            low, high = max(begin, start), min(end, stop)
            shift = (low - begin) % len(ONE)
            mended[low - start : high - start] = (ONE * (high - low))[shift : shift + high - low]
        return bytes(mended)


@functools.cache
def _pattern() -> memoryview:
    """Normal numbers with the deviation that Llama's weights begin with, 0.02."""
    numbers = torch.randn(PATTERN // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    return memoryview(numbers.view(torch.uint8).numpy())


def prepare(folder: Path, config: PretrainedConfig) -> int:
    """Write the configuration and the headers of its model in bf16, as transformers names its tensors.

    Returns:
        Bytes of all tensors.
    """
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: list[dict[str, Any]] = [{}]
    index, at, total = {}, 0, 0
    for name, value in model.state_dict().items():
        nbytes = value.numel() * 2
        if at and at + nbytes > FILE:
            files.append({})
            at = 0
        files[-1][name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [at, at + nbytes]}
        index[name] = len(files)
        at, total = at + nbytes, total + nbytes
    names = [f"model-{place:05}-of-{len(files):05}.safetensors" for place in range(1, len(files) + 1)]
    for name, entries in zip(names, files, strict=True):
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # where the numbers begin is even, as in the noise
        (folder / f"{name}{HEADER}").write_bytes(struct.pack("<Q", len(text)) + text)
    weight_map = {name: names[place - 1] for name, place in index.items()}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def environment(work: Path) -> dict[str, str]:
    """This process's environment, in which fsspec finds the file system by its entry point."""
    plugin = work / "plugins" / "synthetic_source-1.dist-info"
    plugin.mkdir(parents=True, exist_ok=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: synthetic-source\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[fsspec.specs]\nsynthetic = synthetic_source:SyntheticSource\n")
    here = [str(plugin.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    # or what is copied here goes to memory that the system first has to clear, each time anew
    kept = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    return os.environ | kept | {"PYTHONPATH": os.pathsep.join(filter(None, here))}
