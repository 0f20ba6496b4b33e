"""The strategies' settings, and offloading: the same losses from host memory and from files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from job.config import parse_config
from job.errors import ConfigError
from job.plan import Plan, make_plan
from job.swap import folder_fault, lock_fault
from job.world import Hardware, World
from job.zero import layer_of, swap_buffers
from tests.ranks import run_ranks
from tests.test_config import LEAST

RunFile = Callable[..., Path]
CPU = Hardware("cpu", "this CPU", bf16=True, memory_gib=8)
TWO_NODES = World(0, 4, local_world_size=2)


def plan(*overrides: str, world: World = TWO_NODES) -> Plan:
    return make_plan(parse_config(LEAST, overrides), world, CPU)


@pytest.mark.parametrize(
    ("strategy", "stage", "keys"),
    [("replicate", 1, set()), ("zero2", 2, set()), ("zero3", 3, set()), ("hpz", 3, {"zero_hpz_partition_size"})],
)
def test_a_strategy_is_a_stage(strategy: str, stage: int, keys: set[str]) -> None:
    zero = plan(f"parallel.strategy={strategy}").deepspeed()["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["contiguous_gradients"] == (strategy == "zero2")
    assert keys <= zero.keys()
    assert ("stage3_param_persistence_threshold" in zero) == (stage == 3)
    assert zero.get("zero_hpz_partition_size") == (2 if strategy == "hpz" else None)


def test_every_number_set_by_hand_reaches_deepspeed() -> None:
    numbers = {"bucket": 11, "prefetch": 12, "persistence": 13, "max_live": 14}
    words = [f"parallel.{name}={value}" for name, value in numbers.items()]
    switches = ["parallel.overlap_comm=false", "parallel.contiguous_gradients=false"]
    zero = plan("parallel.strategy=zero3", *words, *switches).deepspeed()["zero_optimization"]
    assert zero == {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_bucket_size": 11,
        "allgather_bucket_size": 11,
        "stage3_prefetch_bucket_size": 12,
        "stage3_param_persistence_threshold": 13,
        "stage3_max_live_parameters": 14,
        "stage3_max_reuse_distance": 14,
    }


def test_offloads_are_pinned_and_files_get_the_aio_block() -> None:
    config = plan(
        "parallel.strategy=zero3",
        "parallel.offload_optimizer=cpu",
        "parallel.offload_parameters=nvme",
        "parallel.nvme_path=/fast",
    ).deepspeed()
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/fast"}
    assert config["aio"] == {"block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1}
    assert config["zero_force_ds_cpu_optimizer"] is False


NVME = "parallel.nvme_path=/fast"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (
            ["strategy=hpz", "nodes=1"],
            "parallel.strategy: hpz replicates between nodes, and here is one. Use zero3",
        ),
        (
            ["strategy=zero3", "quantization.type=int8"],
            "quantization.type: int8 does not train under zero3, which would shard its rows without their scales. "
            "Use nf4, or parallel.strategy: zero2",
        ),
        (
            ["strategy=hpz", "lora.dora=true"],
            "lora.dora: needs each weight's norm, and hpz holds no whole weights. Use false, or parallel.strategy: "
            "zero2",
        ),
        (
            ["strategy=zero2", "offload_parameters=cpu"],
            "parallel.offload_parameters: zero2 holds the base on every GPU. Use zero3",
        ),
        (
            ["strategy=hpz", "offload_parameters=nvme", NVME],
            "parallel.offload_parameters: hpz keeps the node's copy in memory. Use cpu or none, or zero3",
        ),
        (
            ["strategy=zero3", "offload_parameters=nvme", "prefetch=9", NVME],
            "parallel.prefetch: DeepSpeed runs out of buffers when it reads ahead from files. Use 0",
        ),
        (
            ["strategy=replicate", "offload_optimizer=nvme", NVME],
            "parallel.offload_optimizer: replicate cannot use nvme. Use cpu, or parallel.strategy: zero3",
        ),
        (
            ["strategy=zero2", "offload_optimizer=cpu", "train.optimizer=adamw_8bit"],
            "train.optimizer: adamw_8bit works in GPU memory, and parallel.offload_optimizer is cpu. Use adamw, or "
            "offload_optimizer: none",
        ),
        (
            ["strategy=zero2", "persistence=0"],
            "parallel.persistence: zero2 gathers no weights. Leave it out, or use zero3",
        ),
    ],
)
def test_what_does_not_go_with_a_strategy_is_refused(words: list[str], fault: str) -> None:
    world = World(0, 4) if "nodes=1" in words else TWO_NODES
    full = [word if "." in word.partition("=")[0] else f"parallel.{word}" for word in words if word != "nodes=1"]
    with pytest.raises(ConfigError) as refused:
        plan(*full, world=world)
    assert refused.value.faults == (fault,)


def test_hpz_on_nodes_with_different_numbers_of_ranks_is_refused() -> None:
    uneven = World(0, 3, local_world_size=2)
    with pytest.raises(ConfigError) as refused:
        plan("parallel.strategy=hpz", "train.global_batch_size=3", world=uneven)
    assert refused.value.faults == (
        "parallel.strategy: hpz needs as many ranks on every node, and 3 ranks are not a multiple of 2 a node. "
        "Start as many on each, or use zero3",
    )
    assert plan("parallel.strategy=zero3", "train.global_batch_size=3", world=uneven).zero.strategy == "zero3"
    dividing = World(0, 6, local_world_size=3, even=False)  # 3, 1 and 2 ranks
    with pytest.raises(ConfigError, match="hpz needs as many ranks on every node, and here some have fewer"):
        plan("parallel.strategy=hpz", "train.global_batch_size=6", world=dividing)


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.layers.13.mlp.up_proj.weight", "model.layers.13"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0"),
        ("0.weight", "0"),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_a_parameter_knows_its_layer_by_its_number(parameter: str, layer: str | None) -> None:
    assert layer_of(parameter) == layer


def test_buffers_hold_one_layer_and_the_largest_part() -> None:
    names = ["h.0.q.weight", "h.0.up.weight", "h.1.q.weight", "h.1.up.weight", "h.1.down.weight"]
    assert swap_buffers(dict.fromkeys(names, 10) | {"h.0.up.weight": 10**7}) == {
        "buffer_count": 3,
        "buffer_size": 10**7,
    }
    assert swap_buffers({}) == {"buffer_count": 1, "buffer_size": 1 << 21}, "adapters pass through one"


def test_a_folder_for_files_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert folder_fault(str(file / "swap")) == (
        f"parallel.nvme_path: {file}/swap cannot be made: Not a directory. Name a folder on a fast local disk"
    )
    assert folder_fault(str(tmp_path / "a/b")) is None


def test_buffers_beyond_the_lock_limit_are_refused_before_deepspeed_dies_of_them() -> None:
    assert lock_fault(4096) is None
    assert lock_fault(1 << 44) == (
        "parallel.offload_parameters: nvme locks 16777216 MiB in memory for its buffers, more than this process may. "
        "Raise the limit (ulimit -l unlimited), or use cpu"
    )


def test_a_machine_without_libaio_is_told_what_to_install_before_anything_is_loaded(
    run_file: RunFile, tmp_path: Path
) -> None:
    where = {"strategy": "zero3", "offload_optimizer": "nvme", "nvme_path": str(tmp_path / "swap")}
    # no such compiler: DeepSpeed's probe for libaio fails as it does without the library
    (done,) = run_ranks(1, "train", run_file(parallel=where), env={"CC": "/nonexistent/cc"})
    assert done.code == 2, done.err
    assert (
        "InputError: parallel.nvme_path: DeepSpeed's file operator cannot be compiled here. Install libaio-dev, g++ "
        "and ninja (Debian: apt-get install libaio-dev g++), or offload to cpu (Unable to JIT load the async_io op"
    ) in done.err
    assert not (tmp_path / "out/run/status.json").exists()
