"""People's own DeepSpeed JSON: taken where it says more than the run file, refused where it says otherwise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.config import parse_config
from job.errors import ConfigError
from job.plan import Plan, make_plan
from job.world import Hardware, World
from job.zero import STAGE
from tests.conftest import REPOSITORY, losses
from tests.forked import run
from tests.ranks import run_ranks
from tests.test_config import LEAST
from tests.test_offload import file_operator  # noqa: F401 - a fixture

RunFile = Callable[..., Path]
Json = dict[str, Any]
OURS = REPOSITORY / "configs/deepspeed"
CPU = Hardware("cpu", "this CPU", bf16=True, memory_gib=8)
TWO = World(0, 2)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a least run file on two ranks with this JSON, a value or a text; words are further settings."""

    def make(own: Any, *words: str, world: World = TWO) -> Plan:
        path = tmp_path / "ds.json"
        path.write_text(own if isinstance(own, str) else json.dumps(own))
        return make_plan(parse_config(LEAST, [f"parallel.deepspeed={path}", *words]), world, CPU)

    return make


@pytest.fixture
def faults(plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """What is refused, with PATH for the JSON's path."""

    def found(own: Any, *words: str, world: World = TWO) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as refused:
            plan(own, *words, world=world)
        return tuple(fault.replace(str(tmp_path / "ds.json"), "PATH") for fault in refused.value.faults)

    return found


def zero(**keys: Any) -> Json:
    return {"zero_optimization": keys}


@pytest.mark.parametrize(
    ("name", "strategy", "optimizer", "parameters"),
    [
        ("zero2", "zero2", "cpu", "none"),
        ("zero3", "zero3", "none", "none"),
        ("zero3_offload", "zero3", "cpu", "cpu"),
        ("zero3_nvme", "zero3", "nvme", "nvme"),
    ],
)
def test_the_ready_files_give_their_strategy_to_a_plain_run_file(
    plan: Callable[..., Plan], name: str, strategy: str, optimizer: str, parameters: str
) -> None:
    made = plan((OURS / f"{name}.json").read_text())
    found = made.zero
    assert (found.strategy, found.offload_optimizer, found.offload_parameters) == (strategy, optimizer, parameters)
    assert (found.bucket, found.overlap_comm, found.contiguous_gradients) == (50_000_000, True, True)
    config = made.deepspeed()
    assert config["train_batch_size"] == 16
    assert config["bf16"] == {"enabled": True}
    assert "auto" not in json.dumps(config)
    if strategy == "zero3":
        assert (found.prefetch, found.persistence) == (0 if optimizer == "nvme" else 50_000_000, 100_000)
    if optimizer == "nvme":
        assert config["aio"]["block_size"] == 1048576
        assert (config["aio"]["queue_depth"], config["aio"]["intra_op_parallelism"]) == (8, 1)
        assert found.nvme_path == "/local_nvme"
    for block in ("offload_optimizer", "offload_param"):
        assert config["zero_optimization"].get(block, {"pin_memory": True})["pin_memory"] is True


@pytest.mark.parametrize("name", sorted(file.stem for file in OURS.glob("*.json")))
@pytest.mark.usefixtures("file_operator")
def test_the_ready_files_train(run_file: RunFile, tmp_path: Path, name: str) -> None:
    text = (OURS / f"{name}.json").read_text().replace("/local_nvme", str(tmp_path / "nvme"))
    own = tmp_path / "own.json"
    own.write_text(text)
    config = run_file(name, train={"micro_batch_size": 1}, parallel={"deepspeed": str(own)})
    plain = run_file("plain")
    done = [*run_ranks(2, "train", config), *run_ranks(1, "train", plain)]
    assert [one.code for one in done] == [0, 0, 0], "\n".join(one.err for one in done)
    assert losses(tmp_path / "out" / name) == pytest.approx(losses(tmp_path / "out/plain"), rel=1e-5)


def test_what_the_json_says_wins_over_what_is_generated(plan: Callable[..., Plan]) -> None:
    own = zero(stage=3, sub_group_size=7, stage3_max_live_parameters=5e6, offload_param={"device": "cpu"})
    config = plan(own | {"wall_clock_breakdown": True, "comms_logger": {"enabled": False, "verbose": True}}).deepspeed()
    assert config["wall_clock_breakdown"] is True
    assert config["comms_logger"] == {"enabled": False, "verbose": True}
    made = config["zero_optimization"]
    assert (made["sub_group_size"], made["stage3_max_live_parameters"]) == (7, 5_000_000)
    assert isinstance(made["stage3_max_live_parameters"], int)
    assert made["offload_param"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("keys", "strategy"),
    [
        ({"stage": 0}, "replicate"),
        ({"stage": 1}, "replicate"),
        ({"stage": 2}, "zero2"),
        ({"stage": 3}, "zero3"),
        ({"stage": 3, "zero_hpz_partition_size": 1}, "zero3"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "hpz"),
        ({"stage": "auto"}, "zero2"),
        ({"stage": None}, "zero2"),
        ({}, "zero2"),
    ],
)
def test_a_stage_is_a_strategy_and_none_leaves_it_to_the_run_file(
    plan: Callable[..., Plan], keys: Json, strategy: str
) -> None:
    words = () if isinstance(keys.get("stage"), int) else ("parallel.strategy=zero2",)
    made = plan(zero(**keys), *words, world=World(0, 4, local_world_size=2))
    assert made.zero.strategy == strategy
    assert made.deepspeed()["zero_optimization"]["stage"] == STAGE[strategy]


def test_a_path_beside_an_offload_to_memory_and_stage_3_keys_under_stage_2_do_no_harm(
    plan: Callable[..., Plan],
) -> None:
    block = {"device": "cpu", "nvme_path": "/local_nvme"}
    made = plan(zero(stage=2, offload_optimizer=block, stage3_prefetch_bucket_size=5e7))
    assert (made.zero.strategy, made.zero.offload_optimizer, made.zero.nvme_path) == ("zero2", "cpu", None)


@pytest.mark.parametrize(
    ("own", "words", "fault"),
    [
        (
            {"train_batch_size": 8},
            (),
            "parallel.deepspeed: PATH has train_batch_size 8, train.global_batch_size makes it 16. Remove it",
        ),
        (
            {"train_micro_batch_size_per_gpu": 4},
            (),
            "parallel.deepspeed: PATH has train_micro_batch_size_per_gpu 4, train.micro_batch_size makes it 1. "
            "Remove it",
        ),
        (
            {"gradient_accumulation_steps": 2},
            (),
            "parallel.deepspeed: PATH has gradient_accumulation_steps 2, train.global_batch_size and "
            "train.micro_batch_size makes it 8. Remove it",
        ),
        (
            {"gradient_clipping": 0.5},
            (),
            "parallel.deepspeed: PATH has gradient_clipping 0.5, train.max_grad_norm makes it 1.0. Remove it",
        ),
        (
            {"fp16": {"enabled": True}},
            (),
            "parallel.deepspeed: PATH has fp16.enabled true, train.precision makes it false. Remove it",
        ),
        (
            {"bf16": {"enabled": False}},
            (),
            "parallel.deepspeed: PATH has bf16.enabled false, train.precision makes it true. Remove it",
        ),
        (
            {"bf16": {"enabled": True}},
            ("train.precision=fp32",),
            "parallel.deepspeed: PATH has bf16.enabled true, train.precision makes it false. Remove it",
        ),
        (zero(stage=3), ("parallel.strategy=zero2",), "parallel.strategy: zero2 here, zero3 in PATH. Keep one of them"),
        (
            zero(stage=2, offload_optimizer={"device": "cpu"}),
            ("parallel.offload_optimizer=none",),
            "parallel.offload_optimizer: none here, cpu in PATH. Keep one of them",
        ),
        (
            zero(stage=3, offload_param={"device": "cpu"}),
            ("parallel.offload_parameters=none",),
            "parallel.offload_parameters: none here, cpu in PATH. Keep one of them",
        ),
        (
            zero(stage=3, reduce_bucket_size=5e8),
            ("parallel.bucket=50",),
            "parallel.bucket: 50 here, 500000000 in PATH. Keep one of them",
        ),
        (
            zero(overlap_comm=False),
            ("parallel.overlap_comm=true",),
            "parallel.overlap_comm: true here, false in PATH. Keep one of them",
        ),
        (
            zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/x"}, stage3_max_reuse_distance=1e9),
            (),
            "parallel.deepspeed: PATH has zero_optimization.stage3_max_reuse_distance 1000000000, offload to nvme "
            "makes it 0. Remove it",
        ),
        (
            zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/x"}, stage3_prefetch_bucket_size=5e7),
            (),
            "parallel.prefetch: DeepSpeed runs out of buffers when it reads ahead from files. Use 0",
        ),
        (
            zero(stage=3, offload_param={"device": "nvme"}),
            (),
            "parallel.deepspeed: PATH offloads to nvme without nvme_path. Name a folder on a fast local disk",
        ),
    ],
)
def test_a_contradiction_to_the_run_file_is_one_sentence(
    faults: Callable[..., tuple[str, ...]], own: Json, words: tuple[str, ...], fault: str
) -> None:
    assert faults(own, *words) == (fault,)


def test_a_part_of_the_node_that_is_not_the_node_is_a_contradiction(faults: Callable[..., tuple[str, ...]]) -> None:
    own = zero(stage=3, zero_hpz_partition_size=2)
    assert faults(own, world=World(0, 8, local_world_size=4)) == (
        "parallel.deepspeed: PATH has zero_optimization.zero_hpz_partition_size 2, the number of ranks on a node makes "
        "it 4. Remove it",
    )


NOTHING = "does nothing without model parallelism. Remove it"
TWICE = "would quantize 4-bit codes once more. Remove it"
MASTERS = "would train without fp32 masters. Remove it"
SCATTERED = "DeepSpeed shards gradients without it. Remove it"


@pytest.mark.parametrize(
    ("own", "key", "why"),
    [
        (
            {"optimizer": {"type": "AdamW"}},
            "optimizer",
            "train.optimizer, train.learning_rate and train.weight_decay decide. Remove it",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "train.schedule and train.warmup_steps decide. Remove it"),
        (
            {"zero_force_ds_cpu_optimizer": True},
            "zero_force_ds_cpu_optimizer",
            "torch's AdamW steps the adapter. Remove it",
        ),
        ({"amp": {"enabled": True}}, "amp", "train.precision decides. Remove it"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast", "train.precision decides. Remove it"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads", MASTERS),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads", MASTERS),
        ({"fp16": {"auto_cast": True}}, "fp16.auto_cast", "train.precision decides. Remove it"),
        *(
            ({"activation_checkpointing": {name: True}}, f"activation_checkpointing.{name}", why)
            for name, why in (
                ("partition_activations", NOTHING),
                ("contiguous_memory_optimization", NOTHING),
                ("cpu_checkpointing", "train.offload_activations decides. Remove it"),
            )
        ),
        *(
            (zero(**{name: True}), f"zero_optimization.{name}", why)
            for name, why in (
                ("zero_quantized_weights", TWICE),
                ("zero_quantized_nontrainable_weights", TWICE),
                ("zero_quantized_gradients", "would change the losses. Remove it"),
                ("cpu_offload", "is an old name. Use offload_optimizer: {device: cpu}"),
            )
        ),
        ({"aio": {"thread_count": 1}}, "aio.thread_count", "is an old name. Use intra_op_parallelism"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor", SCATTERED),
        ({"prescale_gradients": True}, "prescale_gradients", SCATTERED),
        (
            zero(stage=3, stage3_use_all_reduce_for_fetch_params=True),
            "zero_optimization.stage3_use_all_reduce_for_fetch_params",
            "fetches weights of one type alone. Remove it",
        ),
    ],
)
def test_what_does_not_work_here_is_refused_with_its_reason(
    faults: Callable[..., tuple[str, ...]], own: Json, key: str, why: str
) -> None:
    assert faults(own) == (f"parallel.deepspeed: PATH sets {key}: {why}",)


def test_what_does_not_work_may_be_there_when_it_is_off(plan: Callable[..., Plan]) -> None:
    own = {"optimizer": None, "activation_checkpointing": {"partition_activations": False}, "amp": {}}
    own |= {"gradient_predivide_factor": 1.0, "prescale_gradients": False}
    assert plan(own | zero(stage=2, zero_quantized_weights=False)).zero.strategy == "zero2"
    assert plan(zero(stage=2, stage3_use_all_reduce_for_fetch_params=True)).zero.strategy == "zero2"


def test_stage_0_is_stage_1_and_the_plan_says_so(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = plan(zero(stage=0))
    assert made.deepspeed()["zero_optimization"]["stage"] == 1
    assert made.notes == (f"stage 0 of {tmp_path}/ds.json is taken as stage 1: it would train without fp32 masters",)
    assert plan(zero(stage=1)).notes == ()


def test_profilers_and_choices_in_capitals_are_taken_as_deepspeed_takes_them(plan: Callable[..., Plan]) -> None:
    own = {
        "communication_data_type": "BF16",
        "log_level": "Warning",
        "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "output_file": None},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
    }
    config = plan(own).deepspeed()
    assert (config["communication_data_type"], config["log_level"]) == ("BF16", "Warning")
    assert config["flops_profiler"] == {"enabled": True, "profile_step": 1, "module_depth": -1}
    assert config["comms_logger"] == own["comms_logger"]


@pytest.mark.parametrize(
    ("own", "fault"),
    [
        (zero(stage=4), "zero_optimization.stage: 4 is wrong: expected 0, 1, 2 or 3"),
        (zero(stage=True), "zero_optimization.stage: true is wrong: expected a whole number, 0 or more"),
        (zero(stage="3"), 'zero_optimization.stage: "3" is wrong: expected a whole number, 0 or more'),
        (zero(stage=[3]), "zero_optimization.stage: [3] is wrong: expected a whole number, 0 or more"),
        (
            zero(reduce_bucket_size=0),
            "zero_optimization.reduce_bucket_size: 0 is wrong: expected a whole number, 1 or more",
        ),
        (
            zero(reduce_bucket_size=0.5),
            "zero_optimization.reduce_bucket_size: 0.5 is wrong: expected a whole number, 1 or more",
        ),
        (
            zero(stage3_max_live_parameters="1e9"),
            'zero_optimization.stage3_max_live_parameters: "1e9" is wrong: expected a whole number, 0 or more',
        ),
        (zero(overlap_comm=1), "zero_optimization.overlap_comm: 1 is wrong: expected true or false"),
        (zero(offload_param="cpu"), 'zero_optimization.offload_param: "cpu" is wrong: expected an object'),
        (
            zero(offload_param={"device": "disk"}),
            'zero_optimization.offload_param.device: "disk" is wrong: expected none, cpu or nvme',
        ),
        (
            zero(offload_optimizer={"device": 3}),
            "zero_optimization.offload_optimizer.device: 3 is wrong: expected text",
        ),
        ({"zero_optimization": 3}, "zero_optimization: 3 is wrong: expected an object"),
        ({"gradient_clipping": True}, "gradient_clipping: true is wrong: expected a number"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping: NaN is wrong: expected a number"),
        ({"bf16": True}, "bf16: true is wrong: expected an object"),
        (
            zero(stage=2, zero_hpz_partition_size=2),
            "zero_optimization.zero_hpz_partition_size: 2 needs stage 3, and stage is 2. Use stage 3, or remove it",
        ),
        (
            zero(stage=0, zero_hpz_partition_size=2),
            "zero_optimization.zero_hpz_partition_size: 2 needs stage 3, and stage is 0. Use stage 3, or remove it",
        ),
        (
            zero(stage=2, stage3_use_all_reduce_for_fetch_params=3),
            "zero_optimization.stage3_use_all_reduce_for_fetch_params: 3 is wrong: expected true or false",
        ),
        (
            {"communication_data_type": "int8"},
            'communication_data_type: "int8" is wrong: expected fp16, bf16 or fp32',
        ),
        (
            {"log_level": "loud"},
            'log_level: "loud" is wrong: expected debug, info, warning, error or critical',
        ),
        (
            {"flops_profiler": {"profile_stop": 1}},
            'flops_profiler.profile_stop: unknown name. Did you mean "profile_step"? Valid: detailed, enabled, '
            "module_depth, output_file, profile_step, recompute_fwd_factor, top_modules.",
        ),
        ({"comms_logger": {"prof_ops": "all"}}, 'comms_logger.prof_ops: "all" is wrong: expected a list'),
        (
            {"aio": {"block_sise": 1}},
            'aio.block_sise: unknown name. Did you mean "block_size"? Valid: block_size, intra_op_parallelism, '
            "overlap_events, queue_depth, single_submit, thread_count, use_gds.",
        ),
    ],
)
def test_values_and_names_that_deepspeed_does_not_know_are_refused(
    faults: Callable[..., tuple[str, ...]], own: Json, fault: str
) -> None:
    assert faults(own) == (fault,)


@pytest.mark.parametrize(
    ("own", "start"),
    [
        ({"zero_optimisation": {"stage": 3}}, 'zero_optimisation: unknown name. Did you mean "zero_optimization"?'),
        (zero(stage3_prefetch_bucket=1), "zero_optimization.stage3_prefetch_bucket: unknown name. Did you mean"),
        ({"elasticity": {"enabled": True}}, "elasticity: unknown name. "),
    ],
)
def test_near_names_are_offered_for_those_that_deepspeed_would_ignore(
    faults: Callable[..., tuple[str, ...]], own: Json, start: str
) -> None:
    (fault,) = faults(own)
    assert fault.startswith(start)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "parallel.deepspeed: PATH cannot be read: Expecting property name enclosed in double quotes: line 1"),
        ("[]", "PATH is no object with DeepSpeed's settings"),
        ('"zero3"', "PATH is no object with DeepSpeed's settings"),
    ],
)
def test_a_broken_json_is_told(faults: Callable[..., tuple[str, ...]], text: str, fault: str) -> None:
    (found,) = faults(text)
    assert found.startswith(fault.removeprefix("parallel.deepspeed: "))


def test_all_faults_of_a_json_come_together(faults: Callable[..., tuple[str, ...]]) -> None:
    assert len(faults({"bf16": 1, "fp16": 2, "zero_optimization": {"stage": 9}})) == 3
    assert len(faults({"train_batch_size": 1, "optimizer": {"type": "Adam"}})) == 2


def test_a_missing_json_is_exit_code_2_and_one_sentence(run_file: RunFile, tmp_path: Path) -> None:
    done = run("train", run_file(parallel={"deepspeed": str(tmp_path / "none.json")}))
    assert done.code == 2
    assert done.err.splitlines()[-2:] == [
        "ConfigError: 1 problem in parallel.deepspeed",
        f"  {tmp_path}/none.json cannot be read: No such file or directory. Give a DeepSpeed JSON",
    ]
