"""ZeRO-3's gathers of decoder layers in one collective each, the next layer's while this one computes.

DeepSpeed's coordinator follows every parameter of a layer through sets, queues and events, which on a fast GPU takes as
long as the layer's forward pass. Frozen weights need little of that: which of them comes next is known, and nothing
becomes of them. What is trained, and all that is in no decoder layer, stays DeepSpeed's.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import nn

ALIGNED = 256
"""Bytes at which a weight begins in its layer's buffer."""


def gather_layers_at_once(engine: Any, ahead: bool = True) -> bool:
    """Have a DeepSpeed engine's ZeRO-3 do so from now on, where its decoder layers are gathered as units, their trained
    parameters stay whole, and their frozen ones lie on the device, spread over all ranks.

    Args:
        ahead: gather the next layer while one computes, so that two are whole.

    Returns:
        Whether it does.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    layers = [module for module in engine.module.modules() if z3_leaf_module(module)]
    found = [layer for layer in layers if not all(value.ds_persist for value in layer.parameters())]
    if not found or not all(_takes_part(value) for layer in found for value in layer.parameters()):
        return False
    coordinator.layers = _Layers(found, ahead)
    kind = type(coordinator)
    coordinator.__class__ = type(kind.__name__, (_ByLayer, kind), {"__module__": kind.__module__})
    return True


def _takes_part(parameter: Any) -> bool:
    if parameter.ds_persist:
        return True
    own = parameter.ds_tensor
    plain = parameter.ds_secondary_tensor is None and own.final_location is None
    alone = torch.distributed.get_world_size(parameter.ds_process_group) == 1
    return not parameter.requires_grad and plain and not alone


class _Layer:
    """A decoder layer: its parameters that stay whole, those that are gathered, and where these lie in a buffer of
    `size` bytes: (start, stop) for each, what fills up its last rank's part included."""

    def __init__(self, parameters: Iterable[Any]):
        self.whole: list[Any] = []
        self.gathered: list[Any] = []
        self.spans: list[tuple[int, int]] = []
        self.size = 0
        for parameter in parameters:
            if parameter.ds_persist:
                self.whole.append(parameter)
                continue
            nbytes = parameter.ds_zero_partition_world_size * parameter.ds_tensor.nbytes
            self.gathered.append(parameter)
            self.spans.append((self.size, self.size + nbytes))
            self.size += -(-nbytes // ALIGNED) * ALIGNED


@dataclass
class _Held:
    """A layer's buffer and, until it was waited for, the collective that fills it."""

    buffer: torch.Tensor
    work: Any


class _Layers:
    """The layers in the order of a forward pass, and which are here."""

    def __init__(self, modules: list[nn.Module], ahead: bool):
        self.ahead = ahead
        self.places = {module: place for place, module in enumerate(modules)}
        self.layers = [_Layer(module.parameters()) for module in modules]
        self.held: dict[int, _Held] = {}
        self.free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.whole_are_here = False

    def fetch(self, module: nn.Module, forward: bool) -> None:
        """Have the layer's weights here, and the next one's on their way."""
        if not self.whole_are_here:
            self._gather_whole()
        place = self.places[module]
        held = self.held.get(place) or self._begin(place)
        if held.work is not None:
            held.work.wait()  # on a GPU it is the stream that waits
            held.work = None
            self._show(place, held)
        following = place + 1 if forward and not _in_backward() else place - 1
        if self.ahead and 0 <= following < len(self.layers) and following not in self.held:
            self._begin(following)

    def release(self, module: nn.Module, forward: bool) -> None:
        """Let the layer go, unless its backward pass comes now: it is computed again, or was the last."""
        place = self.places[module]
        if forward and (_in_backward() or (module.training and place == len(self.layers) - 1)):
            return
        self._let_go(place)

    def release_all(self) -> None:
        """Let all go that are here or on their way."""
        for place in list(self.held):
            self._let_go(place)

    def _begin(self, place: int) -> _Held:
        layer = self.layers[place]
        own = [parameter.ds_tensor.view(torch.uint8) for parameter in layer.gathered]
        # of a buffer that was used before, its readers are on the stream that the collective waits for
        fitting = self.free.get(layer.size)
        buffer = fitting.pop() if fitting else own[0].new_empty(layer.size)
        outputs = [buffer[start:stop] for start, stop in layer.spans]
        group = layer.gathered[0].ds_process_group
        self.held[place] = _Held(buffer, group.allgather_into_tensor_coalesced(outputs, own))
        return self.held[place]

    def _show(self, place: int, held: _Held) -> None:
        layer = self.layers[place]
        for (start, stop), parameter in zip(layer.spans, layer.gathered, strict=True):
            filled = held.buffer[start:stop].view(parameter.ds_tensor.dtype)
            parameter.data = filled[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def _let_go(self, place: int) -> None:
        held = self.held.pop(place, None)
        if held is None:
            return
        if held.work is not None:
            held.work.wait()
        for parameter in self.layers[place].gathered:
            parameter.data = parameter.ds_tensor.new_empty(0)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        self.free[len(held.buffer)].append(held.buffer)

    def _gather_whole(self) -> None:
        """What stays whole was cut by the optimizer's step, or has never been here."""
        missing = [
            parameter
            for layer in self.layers
            for parameter in layer.whole
            if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        ]
        if missing:
            missing[0].all_gather(missing)
        self.whole_are_here = True


class _ByLayer:
    """Before DeepSpeed's PartitionedParameterCoordinator, which never hears of the layers."""

    layers: _Layers

    def trace_prologue(self, sub_module: nn.Module) -> None:
        if sub_module not in self.layers.places:
            super().trace_prologue(sub_module)  # type: ignore[misc]

    def record_module(self, sub_module: nn.Module) -> None:
        if sub_module not in self.layers.places:
            super().record_module(sub_module)  # type: ignore[misc]

    def fetch_sub_module(self, current_submodule: nn.Module, forward: bool) -> None:
        if current_submodule in self.layers.places:
            with torch.no_grad():
                self.layers.fetch(current_submodule, forward)
        else:
            super().fetch_sub_module(current_submodule, forward)  # type: ignore[misc]

    def release_sub_module(self, submodule: nn.Module, forward: bool = False) -> None:
        if submodule in self.layers.places:
            self.layers.release(submodule, forward)
        else:
            super().release_sub_module(submodule, forward)  # type: ignore[misc]

    def reset_step(self) -> None:
        self.layers.release_all()
        super().reset_step()  # type: ignore[misc]

    def release_and_reset_all(self, module: nn.Module) -> None:
        self.layers.release_all()
        self.layers.whole_are_here = False
        super().release_and_reset_all(module)  # type: ignore[misc]


def _in_backward() -> bool:
    """Whether autograd is at work: a forward pass is then computed again."""
    return torch._C._current_graph_task_id() != -1
