"""People's own DeepSpeed JSON: what it sets is taken, what the run file decides must agree with it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.config import RunConfig
from job.config.load import suggest
from job.config.running import Parallel
from job.errors import ConfigError

Json = dict[str, Any]

SETTING_OF = {
    "overlap_comm": "overlap_comm",
    "contiguous_gradients": "contiguous_gradients",
    "reduce_bucket_size": "bucket",
    "stage3_prefetch_bucket_size": "prefetch",
    "stage3_param_persistence_threshold": "persistence",
    "stage3_max_live_parameters": "max_live",
}
"""Keys of zero_optimization that are settings of parallel too."""
STRATEGY_OF = {1: "replicate", 2: "zero2", 3: "zero3"}
DECIDED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "zero_optimization.zero_hpz_partition_size": "the number of ranks on a node",
}
"""Keys whose value the run file decides."""
_NOTHING = "does nothing without model parallelism. Remove it"
_TWICE = "would quantize 4-bit codes once more. Remove it"
_MASTERS = "would train without fp32 masters. Remove it"
_SCATTERED = "DeepSpeed shards gradients without it. Remove it"
REFUSED = {
    "optimizer": "train.optimizer, train.learning_rate and train.weight_decay decide. Remove it",
    "scheduler": "train.schedule and train.warmup_steps decide. Remove it",
    "zero_force_ds_cpu_optimizer": "torch's AdamW steps the adapter. Remove it",
    "amp": "train.precision decides. Remove it",
    "torch_autocast": "train.precision decides. Remove it",
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "fp16.auto_cast": "train.precision decides. Remove it",
    "activation_checkpointing.partition_activations": _NOTHING,
    "activation_checkpointing.contiguous_memory_optimization": _NOTHING,
    "activation_checkpointing.cpu_checkpointing": "train.offload_activations decides. Remove it",
    "zero_optimization.zero_quantized_weights": _TWICE,
    "zero_optimization.zero_quantized_nontrainable_weights": _TWICE,
    "gradient_predivide_factor": _SCATTERED,
    "prescale_gradients": _SCATTERED,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": "fetches weights of one type alone. Remove it",
    "zero_optimization.zero_quantized_gradients": "would change the losses. Remove it",
    "aio.thread_count": "is an old name. Use intra_op_parallelism",
    "zero_optimization.cpu_offload": "is an old name. Use offload_optimizer: {device: cpu}",
}
"""Keys that do not work here when they are set to anything but false; stage3_... does no harm under other stages."""
_OFF = {"gradient_predivide_factor": 1}
"""What else than false turns them off."""

_SWITCH, _NUMBER, _TEXT, _BLOCK = "true or false", "a number", "text", "an object"
_WHOLE, _COUNT, _ANY_WHOLE = "a whole number, 0 or more", "a whole number, 1 or more", "a whole number"
_LIST = "a list"
_KINDS = {
    "": {
        _COUNT: "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print",
        _NUMBER: "gradient_clipping gradient_predivide_factor",
        _SWITCH: "wall_clock_breakdown memory_breakdown dump_state prescale_gradients zero_allow_untested_optimizer",
        _TEXT: "communication_data_type log_level",
        _BLOCK: "zero_optimization bf16 fp16 aio activation_checkpointing comms_logger flops_profiler",
    },
    "zero_optimization": {
        _COUNT: "reduce_bucket_size allgather_bucket_size sub_group_size",
        _WHOLE: "stage stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
        "stage3_max_reuse_distance zero_hpz_partition_size",
        _SWITCH: "overlap_comm contiguous_gradients reduce_scatter allgather_partitions round_robin_gradients "
        "stage3_gather_16bit_weights_on_model_save stage3_use_all_reduce_for_fetch_params "
        "ignore_unused_parameters allgather_sequential",
        _BLOCK: "offload_optimizer offload_param",
    },
    "zero_optimization.offload_optimizer": {
        _TEXT: "device nvme_path",
        _COUNT: "buffer_count",
        _SWITCH: "pin_memory pipeline_read pipeline_write fast_init",
    },
    "zero_optimization.offload_param": {
        _TEXT: "device nvme_path",
        _COUNT: "buffer_count buffer_size",
        _WHOLE: "max_in_cpu",
        _SWITCH: "pin_memory",
    },
    "bf16": {_SWITCH: "enabled"},
    "fp16": {
        _SWITCH: "enabled consecutive_hysteresis",
        _WHOLE: "initial_scale_power loss_scale_window hysteresis",
        _NUMBER: "loss_scale min_loss_scale",
    },
    "aio": {
        _COUNT: "block_size queue_depth intra_op_parallelism",
        _SWITCH: "single_submit overlap_events use_gds",
    },
    "activation_checkpointing": {
        _SWITCH: "synchronize_checkpoint_boundary profile",
        _WHOLE: "number_checkpoints",
    },
    "comms_logger": {_SWITCH: "enabled prof_all verbose debug", _LIST: "prof_ops"},
    "flops_profiler": {
        _SWITCH: "enabled detailed",
        _NUMBER: "recompute_fwd_factor",
        _COUNT: "profile_step top_modules",
        _ANY_WHOLE: "module_depth",
        _TEXT: "output_file",
    },
}
"""Keys that are taken, by block and kind of value."""
_CHOICES = {
    "communication_data_type": ("fp16", "bf16", "fp32"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "zero_optimization.stage": (0, 1, 2, 3),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
}
_ANY_CASE = ("communication_data_type", "log_level")
"""Those of them that DeepSpeed takes in capitals too."""


def read_own(config: RunConfig) -> tuple[Json, list[str]]:
    """The JSON that parallel.deepspeed names, without its "auto" and null values, and what is taken otherwise than it
    says, a sentence each; empty when there is none.

    Raises:
        ConfigError: it is missing or no JSON object, or has keys or values that DeepSpeed does not know; all of them.
    """
    path = config.parallel.deepspeed
    if path is None:
        return {}, []
    try:
        own = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else fault
        raise ConfigError("parallel.deepspeed", [f"{path} cannot be read: {why}. Give a DeepSpeed JSON"]) from fault
    if not isinstance(own, dict):
        raise ConfigError("parallel.deepspeed", [f"{path} is no object with DeepSpeed's settings"])
    own = _without_auto(own)
    if faults := list(_faults(own)):
        raise ConfigError(path, faults)
    zero, notes = own.get("zero_optimization", {}), []
    if zero.get("zero_hpz_partition_size", 1) < 2:
        zero.pop("zero_hpz_partition_size", None)
    if "zero_hpz_partition_size" in zero and zero.get("stage", 3) != 3:
        size = f"zero_optimization.zero_hpz_partition_size: {zero['zero_hpz_partition_size']}"
        raise ConfigError(path, [f"{size} needs stage 3, and stage is {zero['stage']}. Use stage 3, or remove it"])
    if zero.get("stage") == 0:
        zero["stage"] = 1  # see zero.STAGE
        notes = [f"stage 0 of {path} is taken as stage 1: it would train without fp32 masters"]
    return own, notes


def _faults(values: Json, block: str = "") -> Iterator[str]:
    """What in this block is unknown or of the wrong kind, a sentence each."""
    kinds = {name: kind for kind, names in _KINDS[block].items() for name in names.split()}
    for name, value in values.items():
        key = f"{block}.{name}" if block else name
        if key in REFUSED and name not in kinds:
            continue  # told with all other contradictions
        if name not in kinds:
            refused = {other.rpartition(".")[2] for other in REFUSED if other.rpartition(".")[0] == block}
            yield f"{key}: unknown name. {suggest(name, kinds.keys() | refused)}"
        elif not _is(value, kinds[name]):
            yield f"{key}: {json.dumps(value)} is wrong: expected {kinds[name]}"
        elif key in _CHOICES and (value.lower() if key in _ANY_CASE else value) not in _CHOICES[key]:
            *others, last = map(str, _CHOICES[key])
            yield f"{key}: {json.dumps(value)} is wrong: expected {', '.join(others)} or {last}"
        elif key in _KINDS:
            yield from _faults(value, key)


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return {
        _SWITCH: isinstance(value, bool),
        _WHOLE: isinstance(value, int) and number and value >= 0,
        _COUNT: isinstance(value, int) and number and value >= 1,
        _ANY_WHOLE: isinstance(value, int) and number,
        _NUMBER: number,
        _TEXT: isinstance(value, str),
        _BLOCK: isinstance(value, dict),
        _LIST: isinstance(value, list),
    }[kind]


def adopt(config: RunConfig, own: Json) -> tuple[RunConfig, list[str]]:
    """The settings with those of the JSON in `parallel`, and a sentence for each contradiction to the run file."""
    zero, path = own.get("zero_optimization", {}), config.parallel.deepspeed
    found: Json = {}
    if "stage" in zero:
        found["strategy"] = "hpz" if "zero_hpz_partition_size" in zero else STRATEGY_OF[zero["stage"]]
    for block, setting in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if zero.get(block):
            found[setting] = zero[block].get("device", "none")
            if found[setting] == "nvme" and "nvme_path" in zero[block]:  # many name a path beside device: cpu
                found["nvme_path"] = zero[block]["nvme_path"]
    for key, setting in SETTING_OF.items():
        sharded = zero.get("stage", 3) == 3 or not key.startswith("stage3_")  # DeepSpeed has no use for the others
        if key in zero and sharded:
            found[setting] = zero[key]
    faults = [
        f"parallel.{setting}: {_said(getattr(config.parallel, setting))} here, {_said(value)} in {path}. "
        "Keep one of them"
        for setting, value in found.items()
        if setting in config.parallel.model_fields_set
        and getattr(config.parallel, setting) not in (value, "auto", None)
    ]
    if "nvme" in found.values() and not (found.get("nvme_path") or config.parallel.nvme_path):
        faults.append(
            f"parallel.deepspeed: {path} offloads to nvme without nvme_path. Name a folder on a fast local disk"
        )
    if faults:
        return config, faults
    taken = Parallel.model_validate(config.parallel.model_dump() | found)
    return config.model_copy(update={"parallel": taken}), []


def contradictions(generated: Json, own: Json, path: str) -> list[str]:
    """A sentence for each key of the JSON that the run file decides otherwise, or that does not work here."""
    faults = []
    sharded = _at(generated, "zero_optimization.stage") == 3
    for key, why in REFUSED.items():
        idle = "stage3_" in key and not sharded
        if _at(own, key) not in (None, False, {}, _OFF.get(key)) and not idle:
            faults.append(f"parallel.deepspeed: {path} sets {key}: {why}")
    decided = dict(DECIDED)
    if _at(generated, "zero_optimization.offload_param.device") == "nvme":
        decided["zero_optimization.stage3_max_reuse_distance"] = "offload to nvme"
    for key, setting in decided.items():
        theirs, ours = _at(own, key), _at(generated, key)
        if theirs is not None and theirs != (ours or 0):
            made = _said(ours or type(theirs)(0))
            faults.append(f"parallel.deepspeed: {path} has {key} {_said(theirs)}, {setting} makes it {made}. Remove it")
    return faults


def merged(generated: Json, own: Json) -> Json:
    """The generated dictionary with everything that the JSON says over it."""
    result = dict(generated)
    for key, value in own.items():
        inner = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if inner else value
    return result


def _said(value: Any) -> str:
    """A value as the files write it."""
    return value if isinstance(value, str) else json.dumps(value)


def _without_auto(values: Json) -> Json:
    """Without what is left to the run file, and 5e7 as the whole number it means."""
    kept = {key: value for key, value in values.items() if value not in ("auto", None)}
    return {key: _without_auto(value) if isinstance(value, dict) else _whole(value) for key, value in kept.items()}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at(values: Json, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part, {}) if isinstance(values, dict) else {}
    return None if values == {} else values
