"""The process group: opened first of all, it is how ranks agree and how they exchange what each of them read."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from job.errors import InputError, JobError
from job.world import Hardware, World

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
import deepspeed
from deepspeed.utils import logger as deepspeed_logger

T = TypeVar("T")


def connect(world: World, device: str) -> None:
    """Open the process group; everything that communicates comes after this."""
    deepspeed_logger.setLevel("ERROR")
    # gloo reduces the few megabytes of an adapter as well as DeepSpeed's shared-memory operator, which takes 30 s to
    # compile at its first use
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device == "cuda" else "gloo"
    if world.world_size == 1 and not dist.is_initialized():
        alone = dist.HashStore()  # type: ignore[attr-defined]  # one rank needs no address
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    if world.world_size > 1 and not dist.is_initialized():
        _check_address()
    if backend == "gloo" and world.nodes > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(os.environ["MASTER_ADDR"]))
    if device == "cpu" and world.ranks_per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        # deepspeed's launcher leaves every rank all cores, and threads that wait for each other spin
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // world.ranks_per_node, 1))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def meet(world: World, limit_s: float) -> Any:
    """A store at the address where the group will be opened, with a connection of its own: it tells who has come
    before there is a group, which needs all of them.

    Args:
        limit_s: seconds until the first rank, which holds the store, has to be there.

    Raises:
        InputError: the environment does not say where.
        JobError: it cannot be reached, or its port is taken.
    """
    if world.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    _check_address()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun holds it itself
    try:
        if not holds:
            _reach(address, port, limit_s)
        return dist.TCPStore(  # type: ignore[attr-defined]
            address, port, None, holds, timedelta(seconds=limit_s), wait_for_workers=False, multi_tenant=True
        )
    except (OSError, RuntimeError) as fault:
        said = str(fault).splitlines()[0]
        cure = "Use another port" if holds else f"Is {address} up, and can this host connect to it?"
        what = "cannot be listened on" if holds else f"could not be reached within {limit_s:.0f} s"
        raise JobError(f"the first rank's {address}:{port} {what} ({said}). {cure}") from fault


def _reach(address: str, port: int, limit_s: float) -> None:
    """Wait until something listens there: torch does so too, and writes pages about each try."""
    end = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(end - time.monotonic(), 1.0)).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _check_address() -> None:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise InputError(
            f"WORLD_SIZE is above 1, MASTER_ADDR is {address or 'not set'} and MASTER_PORT is {port or 'not set'}. "
            "Use a launcher, or set them to the first host's address and a free port"
        )


def _interface(master: str) -> str:
    """The network interface through which other hosts reach this one.

    Left alone, gloo announces the address of the host's name, which Debian's /etc/hosts has on loopback.

    Raises:
        InputError: this host has no address but loopback.
    """
    family, kind, _, _, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: it asks the routing table
        own = probe.getsockname()[0]
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    outward = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == family and not entry.address.startswith(("127.", "::1", "fe80"))
    }
    if not outward:
        raise InputError(f"this host has no address but loopback, and {master} is another one. Connect it to a network")
    return outward.get(own) or next(iter(outward.values()))  # the first host may know itself by loopback alone


def disconnect() -> None:
    """Close the process group, at the very end of a process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_first_rank(world: World, decide: Callable[[], T]) -> T:
    """What `decide` gives on rank 0, on every rank; its refusal is every rank's refusal.

    Raises:
        JobError: what `decide` raised; any other fault of it stays what it is on rank 0.
    """
    verdict: list[Any] = [None, None]
    own: Exception | None = None
    if world.rank == 0:
        try:
            verdict[0] = decide()
        except Exception as fault:
            own = fault
            verdict[1] = fault if isinstance(fault, JobError) else JobError(f"rank 0: {type(fault).__name__}: {fault}")
    if world.world_size > 1:
        dist.broadcast_object_list(verdict)
    if own or verdict[1]:
        raise own or verdict[1]
    decided: T = verdict[0]
    return decided


def first_of_each_node(world: World, act: Callable[[], T]) -> T:
    """`act` on the first rank of each node, then on its others, which find on the node's disk what it left there.

    Raises:
        JobError: what `act` raised on any rank.
    """
    result: T | None = None
    fault: JobError | None = None
    for turn in (True, False):
        if (world.local_rank == 0) is turn:
            try:
                result = act()
            except JobError as found:
                fault = found
        faults = [found for found in everyone(world, fault) if found is not None]
        if faults:
            raise fault or faults[0]
    return result  # type: ignore[return-value]  # every rank had its turn


def agreed(world: World, say: Callable[[], str | None], words: Sequence[str]) -> str | None:
    """The last of `words` that any rank says, on every rank; None when none says one."""
    word = say()
    if world.world_size == 1:
        return word
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    place = torch.tensor(0 if word is None else 1 + words.index(word), device=device)
    dist.all_reduce(place, dist.ReduceOp.MAX)
    return words[int(place) - 1] if place else None


def any_of(world: World, *said: bool) -> list[bool]:
    """For each of these, whether any rank says so, on every rank."""
    if world.world_size == 1:
        return list(said)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(said, dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def told(world: World, source: int, value: T | None) -> T:
    """What rank `source` says, on every rank; the others bring None."""
    said: list[Any] = [value]
    if world.world_size > 1:
        dist.broadcast_object_list(said, src=source)
    found: T = said[0]
    return found


def shown(world: World, source: int, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """What rank `source` brings, on the CPU of every rank; the others bring None."""
    if world.world_size == 1:
        return tensors or {}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    about: list[Any] = [{name: (value.shape, value.dtype) for name, value in (tensors or {}).items()}]
    dist.broadcast_object_list(about, src=source)
    found = {}
    for name, (shape, dtype) in about[0].items():
        whole = tensors[name].to(device) if tensors else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(whole, src=source)
        found[name] = whole.cpu()
    return found


class PostBox:
    """Notes between the background threads of ranks, through the store that the group was opened with: no collective,
    so it disturbs none of the main thread's."""

    def __init__(self, world: World):
        self.world = world
        self.store = dist.PrefixStore(  # type: ignore[attr-defined]
            "notes", dist.distributed_c10d._get_default_store()
        )

    def post(self, about: str, note: str) -> None:
        """Leave this rank's note."""
        self.store.set(f"{about}/{self.world.rank}", note)

    def collect(self, about: str) -> list[str] | None:
        """All ranks' notes in their order, None while one is missing; asks without waiting, for a wait would hold the
        connection that the main thread may need."""
        keys = [f"{about}/{rank}" for rank in range(self.world.world_size)]
        return [self.store.get(key).decode() for key in keys] if self.store.check(keys) else None


def lost_peer(fault: BaseException) -> bool:
    """Whether communication failed because another rank is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
    return isinstance(fault, RuntimeError) and any(sign in str(fault) for sign in signs)


def agree_on_hardware(world: World, hardware: Hardware) -> tuple[World, Hardware]:
    """The least that any rank has: what is planned by it, all ranks plan alike.

    Raises:
        InputError: some ranks have a GPU and others none.
    """
    found = everyone(world, (world.ranks_per_node, hardware))
    if len({other.device for _, other in found}) > 1:
        places = ", ".join(f"rank {rank} {other.name}" for rank, (_, other) in enumerate(found))
        raise InputError(f"some ranks have a GPU and others none ({places}). Give all of them the same")
    least = min(other.memory_gib for _, other in found)
    bf16, fp8 = all(other.bf16 for _, other in found), all(other.fp8 for _, other in found)
    rows = min((other.rows for _, other in found), key=("none", "plain", "grouped").index)
    here = {ranks for ranks, _ in found}
    return replace(world, local_world_size=max(here), even=len(here) == 1), replace(
        hardware, memory_gib=least, bf16=bf16, fp8=fp8, rows=rows
    )


def everyone(world: World, mine: T) -> list[T]:
    """What each rank brings, in the order of ranks."""
    if world.world_size == 1:
        return [mine]
    found: list[Any] = [None] * world.world_size
    dist.all_gather_object(found, mine)
    return found


def joined(world: World, own: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The ranks' flat tensors behind each other.

    Args:
        own: this rank's part, 1-D, of sizes[rank] elements.
        sizes: how many elements each rank brings.
    """
    most = max(sizes)
    if world.world_size == 1 or not most:
        return own
    padded = torch.zeros(most, dtype=own.dtype, device=own.device)
    padded[: own.numel()] = own
    gathered = torch.empty(most * world.world_size, dtype=own.dtype, device=own.device)
    # bytes: gloo does not know all types
    dist.all_gather_into_tensor(gathered.view(torch.uint8), padded.view(torch.uint8))
    filled = -(-sum(sizes) // most)
    if all(size == most for size in sizes[: filled - 1]) and sum(sizes[filled:]) == 0:
        return gathered[: sum(sizes)]  # all full but the last: they lie as they should
    return torch.cat([part[:size] for part, size in zip(torch.split(gathered, most), sizes, strict=True)])
