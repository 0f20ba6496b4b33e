"""The arithmetic that settings and machine imply: precision, batches, steps, learning rates, DeepSpeed's dictionary."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from job.config import RunConfig
from job.errors import ConfigError
from job.own_deepspeed import adopt, contradictions, merged, read_own
from job.world import Hardware, World
from job.zero import Strategy, Zero, make_zero, zero_faults

Precision = Literal["bf16", "fp16", "fp32"]
Storage = Literal["uint8", "bf16", "fp16", "fp32"]
STORAGE_BYTES: dict[Storage, int] = {"uint8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
"""Types whose elements hold packed 4-bit weights, two to a byte."""

FP16_OVERFLOWS = ("gemma", "gemma2", "gemma3", "gemma3_text")
"""Model types whose activations exceed fp16's 65504, so that training in it diverges."""


@dataclass(frozen=True)
class Plan:
    """How a run will go. `steps` is 0 until the rows are counted (see `with_steps`); `own` is the user's DeepSpeed
    JSON, which wins over what is generated."""

    zero: Zero
    own: dict[str, Any]
    storage: Storage
    precision: Precision
    compute_dtype: Precision
    device: Literal["cpu", "cuda"]
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    peak_rate: float
    schedule: Literal["linear", "cosine", "constant"]
    warmup: float
    max_grad_norm: float
    steps: int = 0
    notes: tuple[str, ...] = ()

    def with_steps(self, steps: int) -> Self:
        """The same plan for so many optimizer steps."""
        return replace(self, steps=steps)

    @property
    def warmup_steps(self) -> int:
        """Steps of rising learning rate: a share of all steps below 1, else a number."""
        return math.ceil(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, 0 <= step < steps: transformers' schedules, with the warm-up
        one step ahead so that the first step already learns."""
        warmup = self.warmup_steps
        if step < warmup:
            return self.peak_rate * (step + 1) / warmup
        progress = (step - warmup) / max(self.steps - warmup, 1)
        falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.peak_rate * falling[self.schedule]

    def deepspeed(self) -> dict[str, Any]:
        """The DeepSpeed configuration."""
        config: dict[str, Any] = {
            "train_batch_size": self.global_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            **self.zero.dictionary(),
        }
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if self.precision == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
        return merged(config, self.own)


def make_plan(config: RunConfig, world: World, hardware: Hardware, model_type: str = "") -> Plan:
    """Decide how the run goes on this machine.

    Args:
        model_type: transformers' name of the architecture, for what is known not to work in fp16.

    Raises:
        ConfigError: settings and machine do not go together; all faults at once.
    """
    own = read_own(config)
    config, faults = adopt(config, own)
    train = config.train
    precision, notes = _precision(config, hardware, model_type, faults)
    one_round = train.micro_batch_size * world.world_size
    if train.global_batch_size % one_round:
        below = max(train.global_batch_size - train.global_batch_size % one_round, one_round)
        faults.append(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of {one_round} "
            f"({train.micro_batch_size} per rank x {world.world_size} ranks). Try {below} or {below + one_round}"
        )
    if train.optimizer == "paged_adamw_8bit" and hardware.device == "cpu":
        notes.append("paged_adamw_8bit has no pages on a CPU: it is adamw_8bit here")
    faults += _attention_faults(config, hardware)
    strategy: Strategy = "replicate" if config.parallel.strategy == "auto" else config.parallel.strategy
    faults += zero_faults(config, strategy, world.nodes)
    # DeepSpeed swaps to files through buffers of the computing type alone
    storage: Storage = precision if config.parallel.offload_parameters == "nvme" else "uint8"
    wanted = config.quantization.compute_dtype
    plan = Plan(
        zero=make_zero(config, strategy, world.ranks_per_node, STORAGE_BYTES[storage]),
        own=own,
        storage=storage,
        precision=precision,
        compute_dtype=precision if wanted == "auto" else wanted,
        device=hardware.device,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        accumulation=train.global_batch_size // one_round,
        peak_rate=train.learning_rate,
        schedule=train.schedule,
        warmup=train.warmup_steps,
        max_grad_norm=train.max_grad_norm,
        notes=tuple(notes),
    )
    faults += contradictions(replace(plan, own={}).deepspeed(), own, str(config.parallel.deepspeed))
    if faults:
        raise ConfigError("the settings for this machine", faults)
    return plan


def _attention_faults(config: RunConfig, hardware: Hardware) -> list[str]:
    attention, faults = config.model.attention, []
    if attention.startswith("flash") and hardware.device == "cpu":
        faults.append(f"model.attention: {attention} needs a GPU. Use sdpa")
    if attention.startswith("flash") and max(config.train.micro_batch_size, config.evaluation.micro_batch_size) > 1:
        faults.append(
            f"model.attention: {attention} keeps packed rows apart only at train.micro_batch_size and "
            "evaluation.micro_batch_size 1. Set both to 1, or use sdpa"
        )
    return faults


def _precision(
    config: RunConfig, hardware: Hardware, model_type: str, faults: list[str]
) -> tuple[Precision, list[str]]:
    wanted = config.train.precision
    precision: Precision = "bf16" if wanted == "auto" else wanted
    notes = []
    if precision == "bf16" and not hardware.bf16:
        if wanted == "bf16":
            faults.append(f"train.precision: {hardware.name} has no bf16. Use auto or fp16")
        else:
            precision = "fp16"
            notes.append(f"{hardware.name} has no bf16: fp16 with loss scaling instead")
    if precision == "fp16" and hardware.device == "cpu":
        faults.append("train.precision: fp16 does not train on a CPU. Use auto, bf16 or fp32")
    if precision == "fp16" and model_type in FP16_OVERFLOWS:
        faults.append(f"train.precision: {model_type} overflows in fp16. Use bf16 on a GPU that has it, or fp32")
    return precision, notes
