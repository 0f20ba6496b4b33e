"""People's own DeepSpeed JSON: what it sets is taken, what the run file decides must agree with it."""

import json
from pathlib import Path
from typing import Any

from job.config import RunConfig
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
}
"""Keys whose value the run file decides."""
REFUSED = {
    "optimizer": "train.optimizer, train.learning_rate and train.weight_decay decide. Remove it",
    "scheduler": "train.schedule and train.warmup_steps decide. Remove it",
    "zero_force_ds_cpu_optimizer": "torch's AdamW steps the adapter. Remove it",
    "activation_checkpointing.partition_activations": "does nothing without model parallelism. Remove it",
    "activation_checkpointing.contiguous_memory_optimization": "does nothing without model parallelism. Remove it",
    "activation_checkpointing.cpu_checkpointing": "train.recompute decides. Remove it",
    "zero_optimization.zero_quantized_weights": "would quantize 4-bit codes once more. Remove it",
    "zero_optimization.zero_quantized_nontrainable_weights": "would quantize 4-bit codes once more. Remove it",
    "zero_optimization.zero_quantized_gradients": "would change the losses. Remove it",
}
"""Keys that do not work here when they are set to anything but false."""


def read_own(config: RunConfig) -> Json:
    """The JSON that parallel.deepspeed names, without its "auto" values; empty when there is none.

    Raises:
        ConfigError: it is missing or no JSON object.
    """
    path = config.parallel.deepspeed
    if path is None:
        return {}
    try:
        own = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else fault
        raise ConfigError("parallel.deepspeed", [f"{path} cannot be read: {why}. Give a DeepSpeed JSON"]) from fault
    if not isinstance(own, dict) or not isinstance(own.get("zero_optimization", {}), dict):
        raise ConfigError("parallel.deepspeed", [f"{path} is no object with DeepSpeed's settings"])
    own = _without_auto(own)
    if own.get("zero_optimization", {}).get("stage") == 0:
        own["zero_optimization"] |= {"stage": 1}  # see zero.STAGE
    return own


def adopt(config: RunConfig, own: Json) -> tuple[RunConfig, list[str]]:
    """The settings with those of the JSON in `parallel`, and a sentence for each contradiction to the run file."""
    zero = own.get("zero_optimization", {})
    found: Json = {}
    if "stage" in zero:
        found["strategy"] = "hpz" if zero.get("zero_hpz_partition_size", 1) > 1 else STRATEGY_OF.get(zero["stage"])
    for block, setting in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if zero.get(block):
            found[setting] = zero[block].get("device", "none")
            found |= {"nvme_path": zero[block]["nvme_path"]} if zero[block].get("nvme_path") else {}
    for key, setting in SETTING_OF.items():
        if key in zero:
            found[setting] = zero[key] if isinstance(zero[key], bool) else int(zero[key])
    faults = [
        f"parallel.{setting}: {getattr(config.parallel, setting)} here, {value} in {config.parallel.deepspeed}. "
        "Keep one of them"
        for setting, value in found.items()
        if setting in config.parallel.model_fields_set and getattr(config.parallel, setting) not in (value, "auto")
    ]
    if faults:
        return config, faults
    taken = Parallel.model_validate(config.parallel.model_dump() | found)
    return config.model_copy(update={"parallel": taken}), []


def contradictions(generated: Json, own: Json, path: str) -> list[str]:
    """A sentence for each key of the JSON that the run file decides otherwise, or that does not work here."""
    faults = []
    for key, why in REFUSED.items():
        if _at(own, key) not in (None, False, {}):
            faults.append(f"parallel.deepspeed: {path} sets {key}: {why}")
    for key, setting in DECIDED.items():
        theirs, ours = _at(own, key), _at(generated, key)
        if theirs is not None and theirs != (ours or 0):
            faults.append(f"parallel.deepspeed: {path} has {key} {theirs}, {setting} makes it {ours or 0}. Remove it")
    return faults


def merged(generated: Json, own: Json) -> Json:
    """The generated dictionary with everything that the JSON says over it."""
    result = dict(generated)
    for key, value in own.items():
        inner = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if inner else value
    return result


def _without_auto(values: Json) -> Json:
    kept = {key: value for key, value in values.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _at(values: Json, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part, {}) if isinstance(values, dict) else {}
    return None if values == {} else values
