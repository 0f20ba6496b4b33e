"""Layers' inputs in pinned host memory between a forward pass and its backward pass, copied while layers compute.

What recomputation keeps is read once and in the opposite order: while a layer is computed again, the input of the one
before is on its way back. torch's own `save_on_cpu` copies too, and has the GPU wait for each copy.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

HELD = 2
"""Tensors on their way to the host that still take memory of the GPU."""
AHEAD = 2
"""Tensors that are on their way back while one is used: a layer may have its input there and what attention gave."""


@dataclass(eq=False)
class _Away:
    """A tensor that is in host memory.

    Attributes:
        buffer: uint8, of which the first bytes are the tensor's.
        shape: the tensor's, and so are `dtype` and `device`.
        stride: how it lies in memory, without gaps.
        before: what was sent away before it, which is wanted back after it.
        back: the tensor on its device again, or on its way until the GPU has passed `arrived`.
    """

    buffer: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    before: "weakref.ref[_Away] | None"
    back: torch.Tensor | None = None
    arrived: torch.cuda.Event | None = None

    @property
    def host(self) -> torch.Tensor:
        """The tensor in host memory."""
        flat = self.buffer[: self.shape.numel() * self.dtype.itemsize].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


class HostInputs:
    """Sends away what autograd saves under `away()`; buffers stay for the next pass, which may be of other lengths.

    Args:
        leaves: whether a tensor goes; all that is on a GPU does.
    """

    def __init__(self, leaves: Callable[[torch.Tensor], bool] = lambda tensor: tensor.is_cuda):
        self.leaves = leaves
        self.free: list[torch.Tensor] = []
        self.leaving: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self.latest: weakref.ref[_Away] | None = None
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def away(self) -> AbstractContextManager[Any]:
        """While this is entered, what autograd saves goes to the host."""
        return torch.autograd.graph.saved_tensors_hooks(self.put, self.get)

    def put(self, tensor: torch.Tensor) -> "torch.Tensor | _Away":
        """What `get` gives the tensor back for; wanted back in the opposite order."""
        if not self.leaves(tensor):
            return tensor
        stride = torch.empty_like(tensor, device="meta").stride()
        found = _Away(self._buffer(tensor), tensor.shape, stride, tensor.dtype, tensor.device, self.latest)
        with self._beside(tensor.device) as stream:
            found.host.copy_(tensor, non_blocking=True)
        if stream is not None:
            self.leaving.append((tensor, stream.record_event()))
            self._let_go(HELD)
        self.latest = weakref.ref(found)
        return found

    def get(self, packed: torch.Tensor | _Away) -> torch.Tensor:
        """The tensor that was put away; the next ones are on their way."""
        if not isinstance(packed, _Away):
            return packed
        self._let_go(0)
        value = self._on_the_way_back(packed)
        if packed.arrived is not None:  # this copy, not those that were begun since
            torch.cuda.current_stream(value.device).wait_event(packed.arrived)
        following: _Away | None = packed
        for _ in range(AHEAD):
            following = following.before() if following is not None and following.before is not None else None
            if following is not None:
                self._on_the_way_back(following)
        return value

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory of at least the tensor's bytes. torch pins powers of two; rows of other lengths fit into them."""
        fitting = [place for place, buffer in enumerate(self.free) if len(buffer) >= tensor.nbytes]
        if fitting:
            return self.free.pop(min(fitting, key=lambda place: len(self.free[place])))
        if self.free:  # a larger one takes the smallest one's place
            self.free.pop(min(range(len(self.free)), key=lambda place: len(self.free[place])))
        size = 2 ** math.ceil(math.log2(max(tensor.nbytes, 1)))
        return torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)

    def _on_the_way_back(self, packed: _Away) -> torch.Tensor:
        """The tensor on its device; the copy is begun, and on a GPU not waited for."""
        if packed.back is None:
            packed.back = torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype, device=packed.device)
            with self._beside(packed.device) as stream:
                packed.back.copy_(packed.host, non_blocking=True)
            if stream is not None:
                packed.back.record_stream(stream)  # should nobody come for it
                packed.arrived = stream.record_event()
            # the next that fills the buffer is behind this copy, on the same stream
            self.free.append(packed.buffer)
        return packed.back

    def _let_go(self, held: int) -> None:
        """Give up tensors that are being copied but for so many: their memory is free once the GPU has copied them,
        which the stream that takes it next waits for."""
        while len(self.leaving) > held:
            tensor, copied = self.leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(copied)

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """The stream of copies, behind all that was begun until now; None without a GPU."""
        if device.type != "cuda":
            yield None
            return
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self.streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield stream
