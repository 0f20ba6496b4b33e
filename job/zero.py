"""How state is spread over ranks and memories: the strategies, what goes with what, and DeepSpeed's words for it."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from job.config import RunConfig
from job.world import World

Strategy = Literal["replicate", "zero2", "zero3", "hpz"]
Place = Literal["none", "cpu", "nvme"]

STAGE = {"replicate": 1, "zero2": 2, "zero3": 3, "hpz": 3}
"""replicate is stage 1: stage 0 takes a dummy optimizer step in bf16 and keeps no fp32 masters (deepspeed 0.19.8)."""
BUCKET = 50_000_000
PREFETCH_BYTES = 200_000_000
MAX_LIVE_BYTES = 400_000_000
"""Stored bytes of gathered weights, fetched ahead and alive at once: four layers of a 4-bit 7B base. DeepSpeed's
default of 1e9 elements may keep a third of it alive."""
SMALLEST_BUFFER = 1 << 21
"""Elements: adapters pass through the swap buffers once, on their way to where they stay."""
PERSISTENCE = 1_000_000
"""Norms and adapters of usual ranks stay whole on every rank; DeepSpeed's default of 1e5 gathers the larger of them."""


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's view of the strategy; sizes in stored elements (a byte of two weights, or `storage`'s type)."""

    strategy: Strategy
    ranks_per_node: int
    offload_optimizer: Place
    offload_parameters: Place
    nvme_path: str | None
    bucket: int
    prefetch: int
    persistence: int
    max_live: int
    layer_gathers: bool
    overlap_comm: bool
    contiguous_gradients: bool | None

    @property
    def gathers_layers(self) -> bool:
        """Whether layers of a sharded base are gathered in one collective each (`job.layer_gathers`)."""
        return self.strategy == "zero3" and self.layer_gathers and self.offload_parameters == "none"

    @property
    def gathers_ahead(self) -> bool:
        """Whether the next of these layers is gathered while one computes."""
        return self.prefetch > 0 and self.overlap_comm

    @property
    def shards_base(self) -> bool:
        """Whether a rank holds only its part of the base."""
        return STAGE[self.strategy] == 3

    def dictionary(self) -> dict[str, Any]:
        """The parts of DeepSpeed's configuration that spread state."""
        zero: dict[str, Any] = {
            "stage": STAGE[self.strategy],
            "overlap_comm": self.overlap_comm,
            "contiguous_gradients": copies_gradients(self.contiguous_gradients, self.strategy),
            "reduce_bucket_size": self.bucket,
            "allgather_bucket_size": self.bucket,
        }
        if self.shards_base:
            zero |= {
                "stage3_prefetch_bucket_size": self.prefetch,
                "stage3_param_persistence_threshold": self.persistence,
                "stage3_max_live_parameters": self.max_live,
                # what is kept for its next use keeps its swap buffer, of which there are as many as a layer has weights
                "stage3_max_reuse_distance": 0 if self.offload_parameters == "nvme" else self.max_live,
            }
        if self.strategy == "hpz":
            zero["zero_hpz_partition_size"] = self.ranks_per_node
        offloads = {"offload_optimizer": self.offload_optimizer, "offload_param": self.offload_parameters}
        for name, place in offloads.items():
            if place != "none":
                zero[name] = {"device": place, "pin_memory": True}
            if place == "nvme":
                zero[name]["nvme_path"] = self.nvme_path
        config: dict[str, Any] = {"zero_optimization": zero}
        if "nvme" in offloads.values():
            config["aio"] = {"block_size": 1 << 20, "queue_depth": 8, "intra_op_parallelism": 1}
        if self.offload_optimizer != "none":
            # torch's AdamW steps the few adapter parameters on the host; DeepSpeed's own would be compiled first
            config["zero_force_ds_cpu_optimizer"] = False
        return config


def copies_gradients(wanted: bool | None, strategy: Strategy) -> bool:
    """Whether gradients are copied into one buffer as they come. An adapter's are many and small: the copies take a
    tenth of a step on few tokens, and zero2 alone needs them: replicate reduces gradients where they are, stage 3 joins
    their parts in another buffer."""
    return strategy == "zero2" if wanted is None else wanted


def layer_of(parameter: str) -> str | None:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; None outside of numbered layers."""
    found = re.match(r"(.*?\.)?\d+(?=\.)", parameter)
    return found[0] if found else None


def swap_buffers(sizes: Mapping[str, int]) -> dict[str, int]:
    """DeepSpeed's buffers between files and GPU: as large as the largest part, and one for each parameter of a layer.

    ZeRO-3 fetches a decoder layer at once, and a parameter holds its buffer until it is released. DeepSpeed's default,
    five of 1e8 elements, does not hold one layer.

    Args:
        sizes: stored elements of this rank's part of each parameter that goes to files, by name.
    """
    most = max(Counter(map(layer_of, sizes)).values(), default=1)
    return {"buffer_count": most, "buffer_size": max([SMALLEST_BUFFER, *sizes.values()])}


def make_zero(config: RunConfig, strategy: Strategy, ranks_per_node: int, storage_bytes: int) -> Zero:
    """The settings for a strategy.

    Args:
        storage_bytes: bytes of a stored element, for the limits that count elements.
    """
    return Zero(
        strategy=strategy,
        ranks_per_node=ranks_per_node,
        offload_optimizer=config.parallel.offload_optimizer,
        offload_parameters=config.parallel.offload_parameters,
        nvme_path=config.parallel.nvme_path,
        bucket=BUCKET if config.parallel.bucket is None else config.parallel.bucket,
        prefetch=_prefetch(config, storage_bytes),
        persistence=PERSISTENCE if config.parallel.persistence is None else config.parallel.persistence,
        max_live=MAX_LIVE_BYTES // storage_bytes if config.parallel.max_live is None else config.parallel.max_live,
        layer_gathers=config.parallel.layer_gathers,
        overlap_comm=config.parallel.overlap_comm,
        contiguous_gradients=config.parallel.contiguous_gradients,
    )


def _prefetch(config: RunConfig, storage_bytes: int) -> int:
    if config.parallel.prefetch is not None:
        return config.parallel.prefetch
    return 0 if config.parallel.offload_parameters == "nvme" else PREFETCH_BYTES // storage_bytes


def zero_faults(config: RunConfig, strategy: Strategy, world: World) -> list[str]:
    """What does not go with this strategy, one `section.key: sentence` each."""
    faults = []
    sharded = STAGE[strategy] == 3
    ranks, per_node = world.world_size, world.ranks_per_node
    if strategy == "hpz" and world.nodes == 1:
        faults.append("parallel.strategy: hpz replicates between nodes, and here is one. Use zero3")
    elif strategy == "hpz" and (ranks % per_node or not world.even):
        found = f"{ranks} ranks are not a multiple of {per_node} a node" if ranks % per_node else "here some have fewer"
        faults.append(
            f"parallel.strategy: hpz needs as many ranks on every node, and {found}. "
            "Start as many on each, or use zero3"
        )
    if sharded and config.quantization.type == "int8":
        faults.append(
            f"quantization.type: int8 does not train under {strategy}, which would shard its rows without their "
            "scales. Use nf4, or parallel.strategy: zero2"
        )
    if sharded and config.lora.dora:
        faults.append(
            f"lora.dora: needs each weight's norm, and {strategy} holds no whole weights. Use false, or "
            "parallel.strategy: zero2"
        )
    if not sharded and config.parallel.offload_parameters != "none":
        faults.append(f"parallel.offload_parameters: {strategy} holds the base on every GPU. Use zero3")
    if strategy == "hpz" and config.parallel.offload_parameters == "nvme":
        faults.append("parallel.offload_parameters: hpz keeps the node's copy in memory. Use cpu or none, or zero3")
    if sharded and config.parallel.offload_parameters == "nvme" and config.parallel.prefetch:
        # after an evaluation it releases what it no longer fetches, by decisions cached for another order of modules
        # (deepspeed 0.19.8, partitioned_param_coordinator.py), while what comes later holds all buffers
        faults.append("parallel.prefetch: DeepSpeed runs out of buffers when it reads ahead from files. Use 0")
    if not sharded and config.parallel.offload_optimizer == "nvme":
        faults.append(f"parallel.offload_optimizer: {strategy} cannot use nvme. Use cpu, or parallel.strategy: zero3")
    if config.parallel.offload_optimizer != "none" and config.train.optimizer != "adamw":
        faults.append(
            f"train.optimizer: {config.train.optimizer} works in GPU memory, and parallel.offload_optimizer is "
            f"{config.parallel.offload_optimizer}. Use adamw, or offload_optimizer: none"
        )
    if not sharded:
        for name in ("prefetch", "persistence", "max_live"):
            if getattr(config.parallel, name) is not None:
                faults += [f"parallel.{name}: {strategy} gathers no weights. Leave it out, or use zero3"]
    return faults
