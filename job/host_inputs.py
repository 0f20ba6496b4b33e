"""Layers' inputs in pinned host memory between a forward pass and its backward pass, copied while layers compute.

What recomputation keeps is read once and in the opposite order: while a layer is computed again, the input of the one
before is on its way back. torch's own `save_on_cpu` copies too, and has the GPU wait for each copy.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(eq=False)
class _Away:
    """A tensor that is in host memory.

    Attributes:
        device: where it came from.
        before: what was sent away before it, which is wanted back after it.
        back: the tensor on its device again, or on its way.
    """

    host: torch.Tensor
    device: torch.device
    before: "weakref.ref[_Away] | None"
    back: torch.Tensor | None = None


class HostInputs:
    """Sends away what autograd saves under `away()`; buffers stay for the next pass.

    Args:
        leaves: whether a tensor goes; all that is on a GPU does.
    """

    def __init__(self, leaves: Callable[[torch.Tensor], bool] = lambda tensor: tensor.is_cuda):
        self.leaves = leaves
        self.free: dict[Any, list[torch.Tensor]] = defaultdict(list)
        self.latest: weakref.ref[_Away] | None = None
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def away(self) -> AbstractContextManager[Any]:
        """While this is entered, what autograd saves goes to the host."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Away:
        if not self.leaves(tensor):
            return tensor
        key = (tensor.shape, tensor.dtype)
        host = self.free[key].pop() if self.free[key] else None
        if host is None:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        with self._beside(tensor.device):
            host.copy_(tensor, non_blocking=True)
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))  # or its memory would be given away
        found = _Away(host, tensor.device, self.latest)
        self.latest = weakref.ref(found)
        return found

    def _unpack(self, packed: torch.Tensor | _Away) -> torch.Tensor:
        if not isinstance(packed, _Away):
            return packed
        value = self._on_the_way_back(packed)
        if value.is_cuda:
            torch.cuda.current_stream(value.device).wait_stream(self.streams[value.device])
        before = packed.before() if packed.before else None
        if before is not None and before.back is None:
            self._on_the_way_back(before)
        return value

    def _on_the_way_back(self, packed: _Away) -> torch.Tensor:
        """The tensor on its device; the copy is begun, and on a GPU not waited for."""
        if packed.back is None:
            packed.back = torch.empty_like(packed.host, device=packed.device)
            with self._beside(packed.device):
                packed.back.copy_(packed.host, non_blocking=True)
            # the next that fills the buffer is behind this copy, on the same stream
            self.free[packed.host.shape, packed.host.dtype].append(packed.host)
        return packed.back

    def _beside(self, device: torch.device) -> AbstractContextManager[Any]:
        """The stream of copies, behind all that was begun until now."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self.streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)
