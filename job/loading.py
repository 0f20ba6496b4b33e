"""From a checkpoint to a filled module: each rank reads its share, and the strategy decides what becomes of it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from job.cache import Cache
from job.config import RunConfig
from job.hardware import peak_memory_gib
from job.model import DTYPE, place
from job.plan import Plan
from job.sharding import Receipts, own_shares, partitioner, scales_of_all, whole
from job.sinks import LoadingBar
from job.store import Store
from job.weights import Share, stream
from job.world import World


def fill(
    skeleton: Any,
    wanted: Sequence[Share],
    checkpoint: Store,
    config: RunConfig,
    plan: Plan,
    world: World,
    say: Callable[[str], None],
) -> Receipts:
    """Fill the module with the base, quantized on the way: whole on every rank, or this rank's partitions.

    Args:
        skeleton: the module on the meta device.
        wanted: its parameters in the checkpoint, whole.
        checkpoint: the folder with the weights.
        say: hears why a cache of the weights is not used.

    Returns:
        What this rank quantized, to prove that it is what every rank holds.

    Raises:
        ModelError: a file is missing or cut off.
        JobError: the storage failed.
    """
    begun, mine, receipts = time.monotonic(), own_shares(wanted, world), Receipts(world)
    with LoadingBar(sum(share.nbytes for share in mine), world.speaks) as bar:
        pieces = receipts.keep(
            stream(
                checkpoint,
                mine,
                config.quantization,
                DTYPE[plan.precision],
                plan.device,
                exchange=scales_of_all(world),
                progress=bar,
                cache=Cache.of(config.storage, say),
            )
        )
        if plan.zero.shards_base:
            place(skeleton, pieces, plan.device, hold=partitioner(plan, world, wanted))
        else:
            place(skeleton, whole(pieces, world), plan.device)
    read, total = (sum(share.nbytes for share in shares) / 1e9 for shares in (mine, wanted))
    seconds = time.monotonic() - begun
    said = f"base: {read:.2f} of {total:.2f} GB read by this rank, quantized and placed in {seconds:.1f} s"
    say(f"{said}; peak memory so far {peak_memory_gib('cpu'):.1f} GiB" + _on_gpu(plan))
    return receipts


def _on_gpu(plan: Plan) -> str:
    return f", {peak_memory_gib('cuda'):.1f} on the GPU" if plan.device == "cuda" else ""
