"""What trains, out of DeepSpeed and back: fp32 masters and the optimizer's moments, with the parameters they belong to.

DeepSpeed flattens trained parameters into buffers and gives each rank a part. A checkpoint keeps a rank's buffers as
they are, beside the places of the parameters in them: the same ranks get theirs back bit for bit, any others are served
from the same pieces (see `Placed`). Attributes are deepspeed 0.19.8's, stage_1_and_2.py and stage3.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as blockwise
import torch

from job.errors import OutputError

MASTER = "master"
MOMENTS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "state1": "exp_avg", "state2": "exp_avg_sq"}
"""The moments' names in torch's and in bitsandbytes' optimizers, and by Adam's own."""
BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit optimizers."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened parameter `name` lie at `offset` of a buffer."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Flat:
    """One buffer of a rank, on the CPU: `tensors` are 1-D, the fp32 `master` and the optimizer's own state; `steps` is
    how many optimizer steps were applied to it."""

    pieces: tuple[Piece, ...]
    steps: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Live:
    """A buffer where DeepSpeed holds it."""

    number: int
    master: torch.Tensor
    pieces: tuple[Piece, ...]
    group: int
    length: int


class Trained:
    """The trained state of an engine.

    Args:
        inner: DeepSpeed's engine.
        names: the trained parameters' names by `id`.
        sharded: whether the engine is at stage 3.
        rank: this rank.
    """

    def __init__(self, inner: Any, names: Mapping[int, str], sharded: bool, rank: int):
        self.zero, self.sharded = inner.optimizer, sharded
        self.live = list(_sharded(self.zero, names, rank) if sharded else _flattened(self.zero, names))

    def places(self) -> "Placed":
        """Empty buffers of this rank's, to be filled from any ranks' state."""
        return Placed([live.pieces for live in self.live], [live.length for live in self.live])

    def same(self, flats: Sequence[Flat]) -> bool:
        """Whether these lie as this rank's buffers do, so that they can be put back as they are."""
        places = [(flat.pieces, flat.tensors[MASTER].numel()) for flat in flats]
        return places == [(live.pieces, live.length) for live in self.live]

    def read(self) -> list[Flat]:
        """Copies on the CPU; nothing is communicated."""
        flats = []
        for live in self.live:
            with self._at_hand(live, changes=False):
                state = self.zero.optimizer.state[live.master]
                found = {name: value for name, value in state.items() if torch.is_tensor(value) and value.dim()}
                copies = {name: _copy(value) for name, value in {MASTER: live.master, **found}.items()}
                flats.append(Flat(live.pieces, int(state.get("step", 0)), copies))
        return flats

    @torch.no_grad()
    def write(self, flats: Sequence[Flat]) -> None:
        """Put state back, buffer by buffer, and from the masters the weights that the model computes with; every rank
        calls."""
        if self.sharded:
            self.zero._partition_all_parameters()
        for live, flat in zip(self.live, flats, strict=True):
            with self._at_hand(live, changes=True):
                live.master.data.copy_(flat.tensors[MASTER])
                self._write_moments(live, flat)
        if self.sharded:
            self.zero._post_step(set())
        else:
            self.zero.update_lp_params()

    def _write_moments(self, live: _Live, flat: Flat) -> None:
        state = self.zero.optimizer.state[live.master]
        if not flat.steps:
            return  # made at the first step
        if not state:
            self._make_state(live)
        step = state["step"]
        state["step"] = torch.full_like(step, flat.steps) if torch.is_tensor(step) else flat.steps
        for name, there in state.items():
            if not torch.is_tensor(there) or not there.dim():
                continue
            if name in flat.tensors:
                there.copy_(flat.tensors[name])
            elif name in MOMENTS:
                _fill(state, name, flat.tensors[MOMENTS[name]])

    def _make_state(self, live: _Live) -> None:
        """What the optimizer itself makes at its first step."""
        optimizer = self.zero.optimizer
        group = optimizer.param_groups[live.group]
        if not hasattr(optimizer, "init_state"):
            zeros = {name: torch.zeros_like(live.master.data) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[live.master].update(step=torch.tensor(0.0), **zeros)
            return
        held, group["params"] = group["params"], [live.master]  # stage 3 leaves the list empty between steps
        optimizer.init_state(group, live.master, live.group, 0)
        group["params"] = held

    @contextmanager
    def _at_hand(self, live: _Live, changes: bool) -> Iterator[None]:
        """The buffer in memory, brought from its file when it is swapped, and taken back with what changed."""
        if not self.sharded:
            yield
            return
        swapped = self.zero._swappable_optimizer_subgroup(live.number)
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_in(live.number)
        yield
        if changes:
            self.zero._reassign_or_swap_out_partitioned_parameters(live.number)
        if swapped and changes:
            self.zero._optimizer_states_and_gradient_swap_out(live.number)
        elif swapped:
            self.zero._release_swap_buffers(live.number)


def _flattened(zero: Any, names: Mapping[int, str]) -> Iterator[_Live]:
    """Stages 1 and 2: a buffer a parameter group, cut where it happens to be."""
    for number, parameters in enumerate(zero.bit16_groups):
        pieces = []
        for parameter in parameters:
            if parameter._hp_mapping is not None:
                whole, here = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                pieces.append(Piece(names[id(parameter)], whole.start, whole.start + whole.numel, here.start))
        master = zero.single_partition_of_fp32_groups[number]
        yield _Live(number, master, tuple(pieces), number, master.numel())


def _sharded(zero: Any, names: Mapping[int, str], rank: int) -> Iterator[_Live]:
    """Stage 3: every parameter's part of this rank, behind each other."""
    for number, parameters in enumerate(zero.fp16_groups):
        pieces, offset = [], 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = rank * size
            stop = min(start + size, parameter.ds_numel)
            if start < stop:
                pieces.append(Piece(names[id(parameter)], start, stop, offset))
            offset += size
        # a buffer that is swapped out is empty: its length is not its numel
        master, group = zero.fp32_partitioned_groups_flat[number], zero.sub_group_to_group_id[number]
        yield _Live(number, master, tuple(pieces), group, offset)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cuda:  # pinned, or the copy goes through a small buffer of the driver's
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor.detach())
    return tensor.detach().to("cpu", copy=True)


def plain(flat: Flat) -> Flat:
    """The same with moments in fp32 under Adam's names, whatever the optimizer kept them in."""
    tensors = {MASTER: flat.tensors[MASTER]}
    for name, moment in MOMENTS.items():
        if name in flat.tensors:
            tensors[moment] = _dequantized(flat.tensors, name)
    return Flat(flat.pieces, flat.steps, tensors)


def _dequantized(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    stored = tensors[name]
    if stored.dtype != torch.uint8:
        return stored
    number = name[-1]
    scales, code = tensors[f"absmax{number}"], tensors[f"qmap{number}"]
    values: torch.Tensor = blockwise.dequantize_blockwise(stored, absmax=scales, code=code, blocksize=BLOCK)
    return values


def _fill(state: dict[str, Any], name: str, values: torch.Tensor) -> None:
    """Put an fp32 moment into the optimizer's own form."""
    there = state[name]
    if there.dtype != torch.uint8:
        there.copy_(values)
        return
    number = name[-1]
    codes, quantized = blockwise.quantize_blockwise(
        values.to(there.device), code=state[f"qmap{number}"], blocksize=BLOCK
    )
    there.copy_(codes)
    state[f"absmax{number}"].copy_(quantized.absmax)


class Placed:
    """Buffers for the pieces of this rank, filled from any other ranks' buffers, in fp32.

    Args:
        pieces: where this rank's parts lie, buffer by buffer.
        lengths: elements of each buffer.
    """

    def __init__(self, pieces: Sequence[tuple[Piece, ...]], lengths: Sequence[int]):
        self.pieces, self.lengths = pieces, lengths
        self.found: list[dict[str, torch.Tensor]] = [{} for _ in pieces]
        self.wanted = sum(piece.stop - piece.start for buffer in pieces for piece in buffer)
        self.filled, self.steps = 0, 0

    def take(self, flat: Flat) -> None:
        """Copy what of another rank's plain buffer belongs here."""
        self.steps = max(self.steps, flat.steps)
        others: dict[str, list[Piece]] = {}
        for piece in flat.pieces:
            others.setdefault(piece.name, []).append(piece)
        for number, buffer in enumerate(self.pieces):
            for piece in buffer:
                for other in others.get(piece.name, ()):
                    self._copy(number, piece, other, flat)

    def _copy(self, number: int, piece: Piece, other: Piece, flat: Flat) -> None:
        start, stop = max(piece.start, other.start), min(piece.stop, other.stop)
        if start >= stop:
            return
        self.filled += stop - start
        here, there = piece.offset + start - piece.start, other.offset + start - other.start
        for name, tensor in flat.tensors.items():
            if name not in self.found[number]:
                self.found[number][name] = torch.zeros(self.lengths[number])
            self.found[number][name][here : here + stop - start] = tensor[there : there + stop - start]

    def flats(self, source: str) -> list[Flat]:
        """The filled buffers.

        Args:
            source: what they were filled from, for the refusal.

        Raises:
            OutputError: some elements came from nowhere, or twice.
        """
        if self.filled != self.wanted:
            raise OutputError(
                f"output.url: {source} has {self.filled} of the trained values that belong on this rank, expected "
                f"{self.wanted}: it is not whole, or was taken of a model of another shape. Bring that model back, or "
                "remove that checkpoint, so that the one before is used"
            )
        names = {name for found in self.found for name in found} | {MASTER}
        for found, length in zip(self.found, self.lengths, strict=True):
            for name in names - found.keys():  # a buffer of padding alone
                found[name] = torch.zeros(length)
        return [Flat(pieces, self.steps, found) for pieces, found in zip(self.pieces, self.found, strict=True)]
