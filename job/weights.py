"""The frozen base, streamed from its checkpoint and quantized on the way; never whole in host memory.

A rank asks for its shares of the tensors (with one rank: all of each) and gets pieces whose bits equal those of
bitsandbytes' quantization of the whole tensor. Nothing here knows modules or DeepSpeed.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F

from job.cache import Cache
from job.config.learning import Quantization
from job.errors import ModelError
from job.reading import Range, read_ahead
from job.store import Store
from job.tensors import Tensor

BLOCK = 64
"""Weights that share one scale (bitsandbytes' default, and the QLoRA paper's)."""
_ODD = -7046029254386353131
"""0x9E3779B97F4A7C15 as int64: 2^64 over the golden ratio, which spreads neighbouring places."""
NESTED_BLOCK = 256
"""Scales that share one scale of their own under double quantization."""
CHUNK = 1 << 22
"""Elements quantized at once: 8 MiB of bf16, of which several come with one request. Whole blocks, so that chunking
never changes a scale."""

AHEAD = 192 << 20
"""Bytes read ahead: with what is being quantized, a rank takes about 256 MiB besides its share."""

TORCH_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Share:
    """Elements [start, stop) of a flattened checkpoint tensor, wanted under `name`, quantized or as they are.

    `unit` elements stay together when a share is split: those of a stored byte, or of a row for int8. A `transposed`
    tensor lies in its file as [in, out]: its elements are counted as of [out, in], and all are read for any share.
    """

    name: str
    tensor: Tensor
    start: int
    stop: int
    quantize: bool
    unit: int = 1
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape, as it is wanted."""
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the checkpoint that are read for it."""
        whole = self.transposed and self.start < self.stop
        return self.tensor.nbytes if whole else (self.stop - self.start) * self.tensor.item_size

    @property
    def scales(self) -> int:
        """Blocks of 4-bit weights that begin in this share: their scales are its own."""
        return -(-self.stop // BLOCK) + -self.start // BLOCK


@dataclass(frozen=True)
class Piece:
    """What became of a share.

    `data` is packed uint8 [bytes, 1] with `state` for 4-bit, int8 [out, in] with `row_scale` [out] for int8, else
    values in the compute dtype: the tensor's shape when the share is all of it, flat otherwise.
    """

    share: Share
    data: torch.Tensor
    state: bnb.QuantState | None = None
    row_scale: torch.Tensor | None = None


Exchange = Callable[[torch.Tensor, Share], torch.Tensor]
"""Gives every rank the scales of all ranks, in order; with one rank they are all there already."""


def split(share: Share, ranks: int) -> list[Share]:
    """What each rank holds of a whole tensor: ceil(units / ranks) units, as DeepSpeed partitions a parameter; the last
    ranks may get less, or nothing."""
    units = -(-share.tensor.numel // share.unit)
    step = -(-units // ranks) * share.unit
    cuts = [min(rank * step, share.tensor.numel) for rank in range(ranks + 1)]
    return [replace(share, start=start, stop=stop) for start, stop in pairwise(cuts)]


def stream(
    store: Store,
    shares: Iterable[Share],
    quantization: Quantization,
    dtype: torch.dtype,
    device: str,
    exchange: Exchange = lambda absmax, share: absmax,
    progress: Callable[[int], None] | None = None,
    cache: Cache | None = None,
) -> Iterator[Piece]:
    """Read and quantize the shares one after the other; in memory are at most one share and what is read ahead.

    Args:
        store: the checkpoint folder.
        shares: what this rank holds, in the same order on every rank (each quantized one is an exchange).
        quantization: how to store what is to be quantized.
        dtype: type of everything else, and what weights are rounded to before quantization (as transformers does).
        device: where pieces are made.
        exchange: how ranks share their scales.
        progress, cache: see `read_ahead`.
    """
    shares = list(shares)
    in_blocks = [share.quantize and quantization.type in ("nf4", "fp4") for share in shares]
    chunks = [_chunks(share, blocks) for share, blocks in zip(shares, in_blocks, strict=True)]
    ranges = [_bytes(share.tensor, *chunk) for share, own in zip(shares, chunks, strict=True) for chunk in own]
    with closing(read_ahead(store, ranges, AHEAD, progress=progress, cache=cache)) as contents:
        for share, own, blocks in zip(shares, chunks, in_blocks, strict=True):
            values: Iterable[torch.Tensor] = (_values(next(contents), share.tensor.dtype) for _ in own)
            if share.transposed:
                values = _turned(values, share, blocks)
            if blocks:
                yield _four_bits(values, share, quantization, dtype, device, exchange)
            elif share.quantize and quantization.type == "int8":
                rows = _plain(values, share, torch.float16, device).view(-1, share.shape[-1])
                data, row_scale, _ = bnb.int8_vectorwise_quant(rows)
                yield Piece(share, data, row_scale=row_scale)
            else:
                yield Piece(share, _plain(values, share, dtype, device))


def dequantized(pieces: Iterable[Piece], dtype: torch.dtype) -> Iterator[Piece]:
    """The same pieces as the values they stand for, the way round they have in their file: what a product sees, at 16
    bits a weight."""
    for piece in pieces:
        if piece.state is not None:
            values = bnb.dequantize_4bit(piece.data, piece.state).to(dtype)
        elif piece.row_scale is not None:
            values = bnb.int8_vectorwise_dequant(piece.data, piece.row_scale).to(dtype)
        else:
            yield piece
            continue
        yield Piece(piece.share, values.T.contiguous() if piece.share.transposed else values)


def _plain(values: Iterable[torch.Tensor], share: Share, dtype: torch.dtype, device: str) -> torch.Tensor:
    flat, filled = torch.empty(share.stop - share.start, dtype=dtype, device=device), 0
    odd = torch.zeros((), device=device)
    for part in values:
        here = part.to(device)
        odd += here.sum(dtype=torch.float32) * 0
        flat[filled : filled + here.numel()] = here.to(dtype)
        filled += here.numel()
    _refuse_not_finite(odd, share)
    return flat.view(share.shape) if flat.numel() == share.tensor.numel else flat


def _turned(values: Iterable[torch.Tensor], share: Share, in_blocks: bool) -> Iterator[torch.Tensor]:
    """The share's elements, in chunks, out of a whole tensor that lies the other way round."""
    parts = list(values)
    if parts:
        start, stop = _widened(share) if in_blocks else (share.start, share.stop)
        flat = torch.cat(parts).view(share.tensor.shape).T.reshape(-1)[start:stop]
        yield from torch.split(flat, CHUNK)


def _four_bits(
    values: Iterable[torch.Tensor],
    share: Share,
    quantization: Quantization,
    dtype: torch.dtype,
    device: str,
    exchange: Exchange,
) -> Piece:
    kind: Literal["nf4", "fp4"] = "nf4" if quantization.type == "nf4" else "fp4"
    wide_start, wide_stop = _widened(share)
    packed = torch.empty((wide_stop - wide_start + 1) // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-(wide_stop - wide_start) // BLOCK), device=device)
    filled, odd = 0, torch.zeros((), device=device)
    for part in values:
        here = part.to(device)
        odd += here.sum(dtype=torch.float32) * 0
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(here.to(dtype), BLOCK, kind, torch.uint8)
        packed[filled // 2 : filled // 2 + codes.numel()] = codes.view(-1)
        scales[filled // BLOCK : filled // BLOCK + absmax.numel()] = absmax
        filled += part.numel()
    _refuse_not_finite(odd, share)
    skip, size = (share.start - wide_start) // 2, (share.stop - share.start + 1) // 2
    data = packed if size == packed.numel() else packed[skip : skip + size].clone()
    skip = -(-share.start // BLOCK) - wide_start // BLOCK
    absmax = exchange(scales[skip : skip + share.scales], share)
    return Piece(share, data.view(-1, 1), _state(absmax, share.shape, kind, dtype, quantization.double_quant))


def _refuse_not_finite(odd: torch.Tensor, share: Share) -> None:
    """`odd` is zero times the sum of all values: not a number as soon as one of them is infinite or none."""
    if not torch.isfinite(odd):
        raise ModelError(
            f"{share.tensor.file}: {share.tensor.name} holds values that are not finite. Copy the checkpoint again"
        )


def fingerprint(data: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum over the bytes of `data`, each word weighted by a hash of its place, made where the data lie: equal
    for equal bytes, and as good as never for others. It finds corruption, not malice."""
    flat = data.detach().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for place, part in enumerate(torch.split(flat, 1 << 24)):
        words = F.pad(part, (0, -part.numel() % 8)).clone().view(torch.int64)
        weights = torch.arange(1, words.numel() + 1, device=data.device).add_(place << 40).mul_(_ODD)
        weights ^= weights >> 29
        total += (words * (weights | 1)).sum()
    return total


def _state(absmax: torch.Tensor, shape: tuple[int, ...], kind: str, dtype: torch.dtype, double: bool) -> bnb.QuantState:
    """bitsandbytes' state of the whole tensor. Double quantization is around the mean of all its scales."""
    about = {
        "shape": torch.Size(shape),
        "dtype": dtype,
        "blocksize": BLOCK,
        "code": bnb.get_4bit_type(kind, device=absmax.device),
        "quant_type": kind,
    }
    if not double:
        return bnb.QuantState(absmax=absmax, **about)
    offset = absmax.mean()
    nested, state2 = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return bnb.QuantState(absmax=nested, offset=offset, state2=state2, **about)


def _chunks(share: Share, in_blocks: bool) -> list[tuple[int, int]]:
    """The share in stretches of elements that are read at once. A block of weights has one scale: those that a share
    has in common with its neighbours are read whole."""
    start, stop = _widened(share) if in_blocks else (share.start, share.stop)
    if share.transposed and start < stop:
        start, stop = 0, share.tensor.numel
    return [(first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK)]


def _widened(share: Share) -> tuple[int, int]:
    """The share with the whole of its first and last block; nothing when it is empty."""
    if share.start == share.stop:
        return share.start, share.stop
    return share.start - share.start % BLOCK, min(share.stop + -share.stop % BLOCK, share.tensor.numel)


def _bytes(tensor: Tensor, start: int, stop: int) -> Range:
    """Where elements [start, stop) of the flattened tensor lie."""
    return Range(tensor.file, tensor.start + start * tensor.item_size, tensor.start + stop * tensor.item_size)


def _values(content: memoryview, dtype: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be written to: it is only read
        return torch.frombuffer(content, dtype=TORCH_DTYPE[dtype])
