"""What becomes of a base's tensors when an adapter is added to them: one after the other, a few rows at a time.

W + scale * B A is computed in fp32 and rounded once. Nothing here knows where files go.
"""

import json
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from job.adapter_file import Product
from job.errors import ModelError
from job.reading import Range, read_ahead
from job.renaming import Additions
from job.store import Store
from job.tensors import Tensor
from job.weights import TORCH_DTYPE

CHUNK = 1 << 22
"""Elements that are added to at once: 16 MiB in fp32."""
AHEAD = 64 << 20
"""Bytes of the base read ahead."""


@dataclass(frozen=True)
class Change:
    """A native parameter that the adapter changes, and where it lies in the base's files.

    `bias` is the adapter's own value; without it a product is added, to a weight that is [in, out] if `transposed`.
    """

    module: str
    tensor: Tensor
    transposed: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Result:
    """A tensor of the merged model: the base's, as this type, and the changes in it, in their order."""

    tensor: Tensor
    dtype: str
    changes: tuple[Change, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of it in the merged model."""
        return replace(self.tensor, dtype=self.dtype).nbytes


@dataclass(frozen=True)
class Stretch:
    """Elements [start, stop) of a result, all in one change or in none."""

    start: int
    stop: int
    change: Change | None = None


def results(
    tensors: Mapping[str, Tensor], changes: Sequence[Change], dtype: str | None, kept: tuple[str, ...]
) -> list[Result]:
    """Each tensor with the changes whose rows lie in it, in the order in which they lie in the files.

    Args:
        tensors: those that the merged model has.
        dtype: safetensors' name of the type they become; None is each one's own.
        kept: how the names of tensors end that stay as they are.
    """
    found = []
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.file, tensor.start)):
        inside = [change for change in changes if _lies_in(change.tensor, tensor)]
        plain = dtype is None or tensor.dtype not in TORCH_DTYPE or tensor.name.endswith(kept)
        found.append(Result(tensor, tensor.dtype if dtype is None or plain else dtype, tuple(inside)))
    return found


def _lies_in(part: Tensor, whole: Tensor) -> bool:
    end = whole.start + whole.nbytes
    return part.file == whole.file and whole.start <= part.start < end


def header(file: Sequence[Result]) -> bytes:
    """The head of a safetensors file with these tensors in this order."""
    stops = list(accumulate(result.nbytes for result in file))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for result, stop in zip(file, stops, strict=True):
        about = {"dtype": result.dtype, "shape": result.tensor.shape, "data_offsets": [stop - result.nbytes, stop]}
        entries[result.tensor.name] = about
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def contents(file: Sequence[Result], base: Store, adapter: Additions) -> Iterator[memoryview]:
    """The bytes of the tensors of one file, in their order. In memory are what is read ahead, one product of the
    adapter, and one chunk.

    Raises:
        ModelError: a sum is too large for its type; or as `read_ahead`.
        JobError: the storage failed.
    """
    stretches = [(result, stretch) for result in file for stretch in _stretches(result, adapter)]
    ranges = [_range(result.tensor, stretch) for result, stretch in stretches]
    held: tuple[Change, Product | torch.Tensor] | None = None
    with closing(read_ahead(base, ranges, AHEAD)) as read:
        for (result, stretch), content in zip(stretches, read, strict=True):
            change = stretch.change
            if change is None and result.dtype == result.tensor.dtype:
                yield content
                continue
            values = _values(content, result.tensor.dtype)
            if change:
                if held is None or held[0] is not change:
                    held = change, _addition(change, adapter)
                values = _changed(values, stretch, change, held[1], result, adapter.file.scale)
            yield _rounded(values, result)


def _stretches(result: Result, adapter: Additions) -> Iterator[Stretch]:
    at = 0
    for change in result.changes:
        start = (change.tensor.start - result.tensor.start) // result.tensor.item_size
        yield from _cut(at, start, CHUNK, None)
        at = start + change.tensor.numel
        rows = max(CHUNK // change.tensor.shape[-1], 1) * change.tensor.shape[-1]
        # DoRA's norms are those of whole columns then
        whole = change.transposed and adapter.has_magnitude(change.module)
        yield from _cut(start, at, change.tensor.numel if whole else rows, change)
    yield from _cut(at, result.tensor.numel, CHUNK, None)


def _cut(start: int, stop: int, step: int, change: Change | None) -> Iterator[Stretch]:
    for first in range(start, stop, step):
        yield Stretch(first, min(first + step, stop), change)


def _range(tensor: Tensor, stretch: Stretch) -> Range:
    size = tensor.item_size
    return Range(tensor.file, tensor.start + stretch.start * size, tensor.start + stretch.stop * size)


def _values(content: memoryview, dtype: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be written to: it is only read
        return torch.frombuffer(content, dtype=TORCH_DTYPE[dtype])


def _addition(change: Change, adapter: Additions) -> Product | torch.Tensor:
    return adapter.bias(change.module) if change.bias else adapter.product(change.module)


def _changed(
    values: torch.Tensor,
    stretch: Stretch,
    change: Change,
    addition: Product | torch.Tensor,
    result: Result,
    scale: float,
) -> torch.Tensor:
    """The stretch with what the adapter does to it, fp32."""
    first = stretch.start - (change.tensor.start - result.tensor.start) // result.tensor.item_size
    if isinstance(addition, torch.Tensor):
        return addition[first : first + len(values)].float()
    width = change.tensor.shape[-1]
    return _sum(values.view(-1, width), first // width, addition, scale, change.transposed).flatten()


def _sum(rows: torch.Tensor, first: int, product: Product, scale: float, transposed: bool) -> torch.Tensor:
    """Rows of a weight from number `first` on, with the product added; under DoRA (arXiv:2402.09353) scaled to its
    magnitudes."""
    left, right = (product.a.T, product.b.T) if transposed else (product.b, product.a)
    mine = slice(first, first + len(rows))
    total = torch.addmm(rows.float(), left[mine].float(), right.float(), alpha=scale)
    if product.magnitude is None:
        return total
    length: torch.Tensor = torch.linalg.vector_norm(total, dim=0 if transposed else 1)
    wanted = product.magnitude.float()
    return total * (wanted / length) if transposed else total * (wanted[mine] / length)[:, None]


def _rounded(values: torch.Tensor, result: Result) -> memoryview:
    rounded = values.to(TORCH_DTYPE[result.dtype])
    if not torch.isfinite(rounded).all():
        raise ModelError(
            f"{result.tensor.name} has values that are not finite in {result.dtype}. Give --dtype bfloat16, or copy "
            "the base again if it has them itself"
        )
    return rounded.contiguous().view(torch.uint8).numpy().data
