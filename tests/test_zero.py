"""The strategies' settings, and offloading: the same losses from host memory and from files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.config import parse_config
from job.errors import ConfigError
from job.plan import Plan, make_plan
from job.swap import folder_fault, lock_fault
from job.world import Hardware, World
from job.zero import layer_of, swap_buffers
from tests.conftest import REPOSITORY, losses, make_llama, make_tokenizer
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


Run = Callable[..., list[float]]


@pytest.fixture
def run(run_file: RunFile) -> Run:
    """Losses of some steps on so many ranks on nodes of so many."""

    def train(ranks: int, per_node: int = 0, model: Path | None = None, rank: int = 4, **parallel: Any) -> list[float]:
        name = "-".join([str(ranks), *map(str, parallel.values())]).replace("/", "_")
        config = run_file(
            name,
            train={"max_steps": 5, "micro_batch_size": 1, "learning_rate": 1e-3},
            lora={"rank": rank},
            parallel=parallel,
            **({"model": {"name": str(model)}} if model else {}),
        )
        done = run_ranks(ranks, "train", config, per_node=per_node)
        assert [one.code for one in done] == [0] * ranks, "\n".join(one.err for one in done)
        return losses(config.parent / "out" / name)

    return train


@pytest.fixture(scope="module")
def known() -> dict[Any, list[float]]:
    """Losses of one process without offload, by model and rank of the adapter."""
    return {}


@pytest.mark.parametrize(
    ("strategy", "optimizer", "parameters"),
    [
        ("replicate", "cpu", "none"),
        ("zero2", "cpu", "none"),
        ("zero3", "cpu", "none"),
        ("zero3", "none", "cpu"),
        ("zero3", "cpu", "cpu"),
        ("hpz", "cpu", "none"),
        ("hpz", "none", "cpu"),
        ("hpz", "cpu", "cpu"),
    ],
)
def test_offloading_to_host_memory_changes_no_loss(
    run: Run, known: dict[Any, list[float]], strategy: str, optimizer: str, parameters: str
) -> None:
    expected = known.setdefault("tiny", []) or run(1)
    known["tiny"] = expected
    places = {"offload_optimizer": optimizer, "offload_parameters": parameters}
    whole = {"persistence": 0} if strategy in ("zero3", "hpz") else {}
    ranks, per_node = (4, 2) if strategy == "hpz" else (2, 2)
    assert run(ranks, per_node, strategy=strategy, **places, **whole) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def file_operator() -> None:
    """DeepSpeed's operator, compiled once on this machine, which takes minutes; the gate has what it takes."""
    there = Path("/usr/include/libaio.h").exists() and shutil.which("g++")
    if not there and os.environ.get("QLORA_TEST_NVME") != "1":
        pytest.skip("needs libaio-dev and g++ (Debian: apt-get install libaio-dev g++)")
    load = "import sys; from job.swap import operator_fault; sys.exit(operator_fault())"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", load], check=True, timeout=590, env=environment, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose quantized linears are large enough for files, which begin at a megabyte a rank."""
    folder = tmp_path_factory.mktemp("wide-model")
    shape = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 8}
    make_llama(folder, **shape, num_key_value_heads=8)
    make_tokenizer(folder)
    return folder


def swap_files(folder: Path, kind: str) -> list[Path]:
    """Files of at least a megabyte that DeepSpeed left under this kind's folders."""
    return [path for path in folder.rglob("*.swp") if kind in str(path) and path.stat().st_size >= 1 << 20]


@pytest.mark.parametrize(
    ("strategy", "optimizer", "parameters"),
    [
        ("zero3", "none", "nvme"),
        ("zero3", "nvme", "none"),
        ("zero3", "nvme", "nvme"),
        ("zero3", "nvme", "cpu"),
        ("hpz", "nvme", "none"),
    ],
)
def test_offloading_to_files_writes_them_and_changes_no_loss(
    run: Run,
    known: dict[Any, list[float]],
    wide_model: Path,
    file_operator: None,
    tmp_path: Path,
    strategy: str,
    optimizer: str,
    parameters: str,
) -> None:
    rank = 64
    known["wide"] = known.get("wide") or run(1, model=wide_model, rank=rank)
    places = {"offload_optimizer": optimizer, "offload_parameters": parameters, "nvme_path": str(tmp_path / "nvme")}
    ranks, per_node = (4, 2) if strategy == "hpz" else (2, 2)
    found = run(ranks, per_node, wide_model, rank, strategy=strategy, persistence=0, **places)
    assert found == pytest.approx(known["wide"], rel=1e-5)
    # gate, up and down of four layers, and the parts of adapters that passed through
    assert len(swap_files(tmp_path / "nvme", "float32params")) >= (12 * ranks if parameters == "nvme" else 0)
    assert (tmp_path / "nvme/zero_stage_3/float32params").exists() == (parameters == "nvme")
    assert bool(swap_files(tmp_path / "nvme", "optimizer")) == (optimizer == "nvme")
