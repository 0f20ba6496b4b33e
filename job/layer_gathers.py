"""ZeRO-3's gathers of decoder layers in one collective each, the next layer's while this one computes.

DeepSpeed's coordinator follows every parameter of a layer through sets, queues and events, which on a fast GPU takes as
long as the layer's forward pass. Frozen weights need little of that: which of them comes next is known, and nothing
becomes of them. The layers' small parameters, which stay whole, DeepSpeed cuts at each step and gathers again one by
one; here they stay, and what learns is gathered into its place by one collective. Embeddings and the head, which would
wait for each other, come and go likewise. The optimizer and all else stay DeepSpeed's.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import nn

from job.all_at_once import in_front

ALIGNED = 256
"""Bytes at which a weight begins in its layer's buffer."""


def gather_layers_at_once(engine: Any, ahead: bool = True) -> bool:
    """Have a DeepSpeed engine's ZeRO-3 do so from now on, where its decoder layers are gathered as units, their trained
    parameters stay whole, and their frozen ones lie on the device, spread over all ranks.

    Args:
        ahead: gather the next layer while one computes, so that two are whole; while it learns, the head when the
            last layer has gone.

    Returns:
        Whether it does.
    """
    optimizer = engine.optimizer
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    # a unit inside a unit has no hooks of DeepSpeed's, and no number
    layers = [module for module in engine.module.modules() if z3_leaf_module(module) and hasattr(module, "ds_id")]
    found = [layer for layer in layers if not all(value.ds_persist for value in layer.parameters())]
    parameters = [value for layer in found for value in layer.parameters()]
    shared = len({id(value) for value in parameters}) < len(parameters)
    if not found or shared or not all(map(_takes_part, parameters)):
        return False
    embeddings, heads = _ends(engine.module, layers)
    coordinator.layers = optimizer.layers = _Layers(embeddings, found, heads, ahead)
    in_front(coordinator, _ByLayer)
    in_front(optimizer, _KeepsWhole)
    return True


def _ends(model: nn.Module, layers: list[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """Embeddings before the layers, and the head behind them, as far as they are frozen, spread and not tied: left to
    DeepSpeed they would wait for each other, whole. The rest is small."""
    inside = {module for layer in layers for module in layer.modules()}
    outside: list[Any] = [one for one in model.modules() if one not in inside and not [*one.children()]]
    owners = Counter(id(value) for module in outside for value in module.parameters())
    fit = [
        module
        for module in outside
        if not all(value.ds_persist for value in module.parameters())
        and all(_takes_part(value) and owners[id(value)] == 1 for value in module.parameters())
    ]
    embeddings: list[nn.Module] = [module for module in fit if isinstance(module, nn.Embedding)]
    return embeddings, [module for module in fit if isinstance(module, nn.Linear) and module is outside[-1]]


def _takes_part(parameter: Any) -> bool:
    if parameter.ds_persist:
        return True
    own = parameter.ds_tensor
    here = own.final_location is None and own.device.type == parameter.device.type
    plain = parameter.ds_secondary_tensor is None and here
    alone = torch.distributed.get_world_size(parameter.ds_process_group) == 1
    return not parameter.requires_grad and plain and not alone


class _Together:
    """Parameters that are gathered in one collective, and where they lie in a buffer of `size` bytes: (start, stop) for
    each, what fills up its last rank's part included."""

    def __init__(self, parameters: Iterable[Any]):
        self.parameters = list(parameters)
        self.places: list[int] = []
        self.own: list[torch.Tensor] = []
        self.spans: list[tuple[int, int]] = []
        self.size = 0
        for parameter in self.parameters:
            nbytes = parameter.ds_zero_partition_world_size * parameter.ds_tensor.nbytes
            self.spans.append((self.size, self.size + nbytes))
            self.size += -(-nbytes // ALIGNED) * ALIGNED

    def buffer(self) -> torch.Tensor:
        """A new one, uint8 [size]."""
        return torch.empty(self.size, dtype=torch.uint8, device=self.parameters[0].ds_tensor.device)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The places of parameters in a buffer."""
        return [buffer[start:stop] for start, stop in self.spans]

    def gather(self, views: list[torch.Tensor]) -> Any:
        """Begin to fill a buffer with every rank's parts."""
        parts = [parameter.ds_tensor for parameter in self.parameters]
        places = [part.data_ptr() for part in parts]
        if places != self.places:  # making views of many small tensors takes longer than their gather
            self.own, self.places = [part.view(torch.uint8) for part in parts], places
        return self.parameters[0].ds_process_group.allgather_into_tensor_coalesced(views, self.own)

    def show(self, buffer: torch.Tensor) -> None:
        """Have the parameters be what is in the buffer."""
        for (start, stop), parameter in zip(self.spans, self.parameters, strict=True):
            filled = buffer[start:stop].view(parameter.ds_tensor.dtype)
            parameter.data = filled[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def let_go(self) -> None:
        """Have the parameters be nothing."""
        for parameter in self.parameters:
            parameter.data = parameter.ds_tensor.new_empty(0)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


@dataclass
class _Held:
    """A layer's buffer and, until it was waited for, the collective that fills it."""

    buffer: torch.Tensor
    work: Any


class _Layers:
    """Embeddings, layers and a head in the order of a forward pass, and which are here."""

    def __init__(self, embeddings: list[nn.Module], layers: list[nn.Module], heads: list[nn.Module], ahead: bool):
        self.ahead = ahead
        modules = [*embeddings, *layers, *heads]
        self.places = {module: place for place, module in enumerate(modules)}
        self.first, self.last = len(embeddings), len(embeddings) + len(layers) - 1
        self.done = set(range(self.first))
        """Whose weights the backward pass does not read: the gradient of what a frozen embedding gives goes nowhere."""
        each: list[list[Any]] = [list(module.parameters()) for module in modules]
        self.layers = [_Together(one for one in layer if not one.ds_persist) for layer in each]
        self.held: dict[int, _Held] = {}
        whole = [one for layer in each for one in layer if one.ds_persist]
        self.learns = _Together(one for one in whole if one.requires_grad)
        self.frozen = _Together(one for one in whole if not one.requires_grad)
        self.views: dict[int, list[torch.Tensor]] = {}

    def fetch(self, module: nn.Module, forward: bool) -> None:
        """Have the layer's weights here, and the next one's on their way."""
        for whole in (self.learns, self.frozen):
            if id(whole) not in self.views:
                self.refresh(whole)
        place, onward = self.places[module], forward and not _in_backward()
        if place in self.done and not forward:
            return
        held = self.held.get(place) or self._begin(place)
        if held.work is not None:
            held.work.wait()  # on a GPU it is the stream that waits
            held.work = None
            self.layers[place].show(held.buffer)
        following = place + 1 if onward else place - 1
        end = self.last if module.training else len(self.layers) - 1
        if following <= end if onward else following >= self.first:
            self._send_for(following)

    def release(self, module: nn.Module, forward: bool) -> None:
        """Let the layer go, unless its backward pass comes now: it is computed again, or nothing comes behind it.

        Where activations are kept most are there at the end: so the head is sent for when the last layer has gone, and
        this one again when the head has taken the loss, though neither gather has then much to hide behind.
        """
        place, end = self.places[module], len(self.layers) - 1
        if place > self.last and forward:
            (self.done.add if getattr(module, "took_loss", False) else self.done.discard)(place)
        if forward and place not in self.done and (_in_backward() or (module.training and place == end)):
            return
        self._let_go(place)
        if forward and place == self.last < end:
            self._send_for(end)
        elif forward and place > self.last and module.training:
            self._send_for(self.last)

    def release_all(self) -> None:
        """Let all layers go that are here or on their way, or were gathered because another one asked for them."""
        for place in list(self.held):
            self._let_go(place)
        for layer in self.layers:
            if any(parameter.ds_status == ZeroParamStatus.AVAILABLE for parameter in layer.parameters):
                layer.let_go()

    def refresh(self, whole: _Together) -> None:
        """Have parameters that stay whole be what the ranks' parts are now."""
        if not whole.parameters:
            return
        if id(whole) not in self.views:
            buffer = whole.buffer()
            self.views[id(whole)] = whole.views(buffer)
            whole.show(buffer)
        whole.gather(self.views[id(whole)]).wait()

    def _send_for(self, place: int) -> None:
        if self.ahead and place not in self.held:
            self._begin(place)

    def _begin(self, place: int) -> _Held:
        layer = self.layers[place]
        # made anew and not kept for reuse: autograd may hold a view of it. What read the memory before is on the stream
        # that the collective waits for
        buffer = layer.buffer()
        self.held[place] = _Held(buffer, layer.gather(layer.views(buffer)))
        return self.held[place]

    def _let_go(self, place: int) -> None:
        held = self.held.pop(place, None)
        if held is None:
            return
        if held.work is not None:
            held.work.wait()
        self.layers[place].let_go()


class _ByLayer:
    """Before DeepSpeed's PartitionedParameterCoordinator, which never hears of the layers."""

    layers: _Layers
    rest: "_Rest | None" = None

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
        if self.rest is None:
            self.rest = _Rest(module, self.layers)
        super().release_and_reset_all(self.rest)  # type: ignore[misc]


class _KeepsWhole:
    """Before DeepSpeed's optimizer of stage 3."""

    layers: _Layers

    def _partition_all_parameters(self: Any) -> None:
        # DeepSpeed's own looks behind it whether nothing at all is whole
        self.parameter_offload.get_param_coordinator().release_and_reset_all(self.module)

    def _post_step(self, timer_names: Any) -> None:
        self.layers.refresh(self.layers.learns)
        super()._post_step(timer_names)  # type: ignore[misc]


class _Rest:
    """The parameters of a module that are in no layer, as DeepSpeed asks a module for its parameters."""

    def __init__(self, module: Any, layers: _Layers):
        ours = {id(one) for layer in layers.places for one in layer.parameters()}
        self.external = module.ds_external_parameters
        self.named = [(name, value) for name, value in module.named_parameters() if id(value) not in ours]

    def named_parameters(self, recurse: bool = True) -> list[tuple[str, Any]]:
        return self.named

    def ds_external_parameters(self) -> Any:
        return self.external()


def _in_backward() -> bool:
    """Whether autograd is at work: a forward pass is then computed again."""
    return torch._C._current_graph_task_id() != -1
