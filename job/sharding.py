"""The base over the ranks: who reads what, how scales and whole tensors come together, and the proof that what
arrived is what was quantized.

Every rank reads and quantizes the same share of every tensor, under every strategy. Those that replicate the base then
exchange the 4-bit pieces, so that N ranks read the checkpoint once. ZeRO-3 keeps them: they are its partitions.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from job.errors import JobError
from job.group import everyone, joined
from job.plan import Plan
from job.swap import STORAGE, stored, swapped, with_buffers
from job.weights import Exchange, Piece, Share, fingerprint, split
from job.world import World


def own_shares(shares: Iterable[Share], world: World) -> list[Share]:
    """What this rank reads."""
    return [split(share, world.world_size)[world.rank] for share in shares]


def scales_of_all(world: World) -> Exchange:
    """The exchange of scales over all ranks."""

    def exchange(own: torch.Tensor, share: Share) -> torch.Tensor:
        return joined(world, own, [part.scales for part in split(share, world.world_size)])

    return exchange


def whole(pieces: Iterable[Piece], world: World) -> Iterator[Piece]:
    """Every piece with the parts of all ranks; peak memory is one tensor more."""
    for piece in pieces:
        parts = split(piece.share, world.world_size)
        share = replace(piece.share, start=0, stop=piece.share.tensor.numel)
        if piece.row_scale is not None:
            rows = [(part.stop - part.start) // part.unit for part in parts]
            data = joined(world, piece.data.flatten(), [count * share.unit for count in rows])
            scale = joined(world, piece.row_scale, rows)
            yield Piece(share, data.view(share.shape), row_scale=scale)
        elif piece.state is not None:
            data = joined(world, piece.data.flatten(), [-(-(part.stop - part.start) // 2) for part in parts])
            yield Piece(share, data.view(-1, 1), state=piece.state)
        else:
            data = joined(world, piece.data.flatten(), [part.stop - part.start for part in parts])
            yield Piece(share, data.view(share.shape))


@dataclass
class Receipts:
    """What this rank quantized: bytes and fingerprint of each piece, by name."""

    world: World
    kept: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)

    def keep(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The same pieces, noted."""
        for piece in pieces:
            self.kept[piece.share.name] = (piece.data.numel() * piece.data.element_size(), fingerprint(piece.data))
            yield piece

    def prove(self, gathered: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Compare whole tensors, by name, with what each rank made of its share.

        Raises:
            JobError: names the tensor and the rank whose bytes are others now.
        """
        mine = {name: (size, int(mark)) for name, (size, mark) in self.kept.items()}
        ranks = everyone(self.world, mine)
        for name, tensor in gathered:
            data, start = tensor.detach().reshape(-1).view(torch.uint8), 0
            for rank, kept in enumerate(ranks):
                size, mark = kept[name]
                if int(fingerprint(data[start : start + size])) != mark:
                    raise JobError(
                        f"{name}: the bytes that rank {rank} quantized are not those that rank {self.world.rank} "
                        "holds. Check memory and network of both"
                    )
                start += size


def partitioner(plan: Plan, world: World, shares: Iterable[Share]) -> Callable[[Any, Piece], None]:
    """A function that turns a fresh parameter into a ZeRO-3 partition filled with this rank's piece.

    What it sets is what DeepSpeed's `zero.Init` leaves behind after it has partitioned a whole parameter, without
    there ever being one (deepspeed 0.19.8, partition_parameters.py).

    Args:
        shares: every parameter that will come, whole.
    """
    in_files = swapped(plan, world, shares)
    init = deepspeed.zero.Init(config_dict_or_path=with_buffers(plan, in_files))

    def hold(parameter: Any, piece: Piece) -> None:
        share = piece.share
        own = piece.data.flatten()
        if piece.state is not None:
            storage = STORAGE[plan.storage]
            own = F.pad(own, (0, -own.numel() % storage.itemsize)).view(storage)
            units = stored(share)
            shape: Sequence[int] = (units, 1)
        else:
            units, shape = share.tensor.numel, share.shape
        parameter.data = torch.empty(0, dtype=own.dtype, device=init.local_device)
        init._convert_to_deepspeed_param(parameter)
        parameter.ds_shape, parameter.ds_numel = torch.Size(shape), units
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        size = math.ceil(units / world.world_size)
        parameter.ds_numel_aligned = size * world.world_size
        parameter.ds_tensor = _home(init, parameter, own, size, share.name in in_files)
        if init.zero_param_process_group is not None:
            parameter.ds_secondary_tensor = _secondary(init, own, size, world)
        if parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme:
            init.param_swapper.swap_out_and_release([parameter])

    return hold


def _home(init: Any, parameter: Any, own: torch.Tensor, size: int, in_file: bool) -> torch.Tensor:
    """The partition, zero behind its end, where the settings want it: GPU, pinned host memory, or a swap buffer."""
    location = None
    if in_file:
        location = OffloadDeviceEnum.nvme
        buffer = init.param_swapper.get_buffer(parameter, size)
        partition = torch.empty(0, dtype=own.dtype, device=buffer.device)
        partition.data = buffer.data
    else:
        on_host = init.remote_device in (OffloadDeviceEnum.cpu, OffloadDeviceEnum.nvme)
        partition = torch.zeros(size, dtype=own.dtype, device="cpu" if on_host else init.local_device)
        if on_host and init.pin_memory:
            partition = get_accelerator().pin_memory(partition)
    partition[: own.numel()].copy_(own)
    return _labelled(partition, size, location)


def _secondary(init: Any, own: torch.Tensor, size: int, world: World) -> torch.Tensor:
    """hpZ's second partition: this rank's part of its node's copy, cut out of what all ranks bring."""
    padded = torch.zeros(size, dtype=own.dtype, device=own.device)
    padded[: own.numel()] = own
    everything = joined(world, padded, [size] * world.world_size)
    step = everything.numel() // init.num_ranks_in_param_group
    mine = everything[init.rank_in_group * step : (init.rank_in_group + 1) * step].clone()
    device = "cpu" if init.remote_device == OffloadDeviceEnum.cpu else init.local_device
    return _labelled(mine.to(device), step, None)


def _labelled(partition: torch.Tensor, size: int, location: Any) -> torch.Tensor:
    partition.requires_grad = False
    partition.ds_numel = size  # type: ignore[attr-defined]
    partition.status = PartitionedParamStatus.AVAILABLE  # type: ignore[attr-defined]
    partition.final_location = location  # type: ignore[attr-defined]
    return partition


def gathered(parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter whole, one at a time, over the very path that a forward takes; not in order of anything but
    the argument, which is the same on every rank."""
    for name, parameter in parameters:
        absent = getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
        if absent:
            parameter.all_gather_coalesced([parameter]).wait()
        yield name, parameter.data
        if absent:
            parameter.partition()
