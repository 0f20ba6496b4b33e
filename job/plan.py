"""The arithmetic that settings and machine imply: precision, batches, steps, learning rates, DeepSpeed's dictionary."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from job.activations import Job
from job.config import RunConfig
from job.errors import ConfigError
from job.families import adapted
from job.faults import (
    attention_faults,
    batch_faults,
    expert_faults,
    fp8_faults,
    offload_faults,
    one_round,
    value_faults,
)
from job.fit import choose, fits, keeps_values, least_recompute
from job.gathered import gathers_layers
from job.memory import Memory, memory
from job.own_deepspeed import adopt, contradictions, merged, read_own
from job.shape import Shape
from job.trained import largest_trained
from job.world import Hardware, World
from job.zero import STAGE, Strategy, Zero, make_zero, zero_faults

Precision = Literal["bf16", "fp16", "fp32"]
Storage = Literal["uint8", "bf16", "fp16", "fp32"]
STORAGE_BYTES: dict[Storage, int] = {"uint8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
"""Types whose elements hold packed 4-bit weights, two to a byte."""

FP16_OVERFLOWS = ("gemma", "gemma2", "gemma3", "gemma3_text")
"""Model types whose activations exceed fp16's 65504, so that training in it diverges."""


@dataclass(frozen=True)
class Plan:
    """How a run will go. `steps` is 0 until the rows are counted (see `with_steps`); `own` is the user's DeepSpeed
    JSON, which wins over what is generated; `memory` is None when the model's headers were not at hand, `reason`
    says why the strategy is this one."""

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
    recompute: Literal["none", "full"] | int
    inputs_on_host: bool
    by_rows: bool
    dequantize: Literal["always", "once"]
    memory: Memory | None = None
    reason: str = ""
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


def make_plan(
    config: RunConfig, world: World, hardware: Hardware, model_type: str = "", shape: Shape | None = None
) -> Plan:
    """Decide how the run goes on this machine.

    Args:
        model_type: transformers' name of the architecture, for what is known not to work in fp16.
        shape: the model's sizes, for the memory and what strategy auto is.

    Raises:
        ConfigError: settings and machine do not go together; all faults at once.
    """
    own, notes = read_own(config)
    config, faults = adopt(config, own)
    train = config.train
    precision, said = _precision(config, hardware, model_type, faults)
    notes += said
    faults += batch_faults(config, world)
    if train.optimizer == "paged_adamw_8bit" and hardware.device == "cpu":
        notes.append("paged_adamw_8bit has no pages on a CPU: it is adamw_8bit here")
    faults += expert_faults(config, model_type, shape)
    faults += attention_faults(config, hardware)
    faults += offload_faults(config, hardware)
    faults += fp8_faults(config, hardware, precision)
    # DeepSpeed swaps to files through buffers of the computing type alone
    storage: Storage = precision if config.parallel.offload_parameters == "nvme" else "uint8"
    zero = make_zero(config, "replicate", world.ranks_per_node, STORAGE_BYTES[storage])
    need = _Need(config, world, hardware, precision, zero, STORAGE_BYTES[storage], shape)
    strategy, reason = need.strategy(faults)
    notes += need.notes(strategy)
    faults += zero_faults(config, strategy, world) + value_faults(config, STAGE[strategy] == 3)
    wanted = config.quantization.compute_dtype
    plan = Plan(
        zero=replace(zero, strategy=strategy),
        own=own,
        storage=storage,
        precision=precision,
        compute_dtype=precision if wanted == "auto" else wanted,
        device=hardware.device,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        accumulation=max(train.global_batch_size // one_round(config, world), 1),
        peak_rate=train.learning_rate,
        schedule=train.schedule,
        warmup=train.warmup_steps,
        max_grad_norm=train.max_grad_norm,
        recompute=need.settled(strategy).recompute,
        inputs_on_host=train.offload_activations and need.settled(strategy).recompute != "none",
        by_rows=need.by_rows,
        dequantize="once" if need.settled(strategy).values_kept else "always",
        memory=need.memory(strategy),
        reason=reason,
        notes=tuple(notes),
    )
    faults += contradictions(replace(plan, own={}).deepspeed(), own, str(config.parallel.deepspeed))
    if faults:
        raise ConfigError("the settings for this machine", faults)
    return plan


@dataclass(frozen=True)
class _Need:
    """What decides the memory of a rank, and with it the strategy that auto is."""

    config: RunConfig
    world: World
    hardware: Hardware
    precision: Precision
    zero: Zero
    storage_bytes: int
    shape: Shape | None

    @property
    def job(self) -> Job:
        config, zero = self.config, self.zero
        return Job(
            ranks=self.world.world_size,
            ranks_per_node=self.world.ranks_per_node,
            quantization=config.quantization.type,
            double_quant=config.quantization.double_quant,
            precision=self.precision,
            rank=config.lora.rank,
            targets=adapted(config.lora.targets, self.shape.model_type) if self.shape else None,
            dropout=config.lora.dropout,
            share_a=config.lora.share_a,
            dora=config.lora.dora,
            micro_batch=config.train.micro_batch_size,
            length=config.data.max_length,
            masked=(config.data.packing or config.train.micro_batch_size > 1) and not self.by_rows,
            eager=config.model.attention == "eager",
            fused=config.train.fused,
            values_kept=config.train.dequantize == "once",
            recompute="full" if config.train.recompute == "auto" else config.train.recompute,
            offload_activations=config.train.offload_activations,
            attention_away=self.by_rows,
            optimizer=config.train.optimizer,
            offload_optimizer=zero.offload_optimizer,
            offload_parameters=zero.offload_parameters,
            bucket=zero.bucket,
            overlap_comm=zero.overlap_comm,
            contiguous_gradients=zero.contiguous_gradients,
            layer_gathers=zero.layer_gathers,
            gathers_ahead=zero.gathers_ahead,
            persistence=zero.persistence,
            max_live=zero.max_live,
            storage_bytes=self.storage_bytes,
            evaluation_micro_batch=config.evaluation.micro_batch_size,
            device=self.hardware.device,
        )

    @property
    def by_rows(self) -> bool:
        """Whether attention is told where rows begin instead of what to leave out, by a kernel for 16 bits."""
        on_gpu = self.hardware.device == "cuda"
        if self.shape is None or not on_gpu or self.precision == "fp32" or self.config.model.attention != "auto":
            return False
        rows = self.hardware.rows if self.hardware.bf16 else "none"
        alike = self.shape.heads == self.shape.kv_heads
        return self.shape.causal and (rows == "grouped" or (rows == "plain" and alike))

    def settled(self, strategy: Strategy) -> Job:
        """The job under a strategy, with what auto comes to: first as many activations are kept as fit, then values."""
        job, gib = replace(self.job, strategy=strategy), self.hardware.memory_gib
        if self.shape is None or self.hardware.device == "cpu":
            return job
        if self.config.train.recompute == "auto":
            job = replace(job, recompute=least_recompute(self.shape, job, gib))
        may = self.config.train.dequantize == "auto" and job.in_one_step and job.quantization in ("nf4", "fp4")
        if may and STAGE[strategy] != 3 and keeps_values(self.shape, job, gib):
            job = replace(job, values_kept=True)
        return job

    def notes(self, strategy: Strategy) -> list[str]:
        """What makes a strategy slower than it could be."""
        job = replace(self.job, strategy=strategy)
        if self.shape is None or job.ranks == 1 or not replace(self.zero, strategy=strategy).gathers_layers:
            return []
        if gathers_layers(self.shape, job):
            return []
        most = largest_trained(self.shape, job)
        return [
            f"the adapter has a tensor of {most:,} elements, more than stay whole: DeepSpeed gathers layers its own, "
            f"slower way. Set parallel.persistence: {most} if it fits"
        ]

    def memory(self, strategy: Strategy) -> Memory | None:
        """The memory of a rank under a strategy."""
        if self.shape is None:
            return None
        return memory(self.shape, self.settled(strategy))

    def strategy(self, faults: list[str]) -> tuple[Strategy, str]:
        """The strategy asked for, or for auto the simplest that fits, and why."""
        wanted, available = self.config.parallel.strategy, self.hardware.memory_gib
        simplest: Strategy = "zero3" if self.config.parallel.offload_parameters != "none" else "replicate"
        if self.shape is None or self.hardware.device == "cpu":  # ranks on a CPU share the host's memory
            return (simplest, "") if wanted == "auto" else (wanted, "as set")
        if wanted == "auto":
            choice = choose(self.shape, self.job, available)
            if choice.strategy:
                choice = choose(self.shape, self.settled(choice.strategy), available)
            if choice.strategy is None and choice.memory.total_gib > available:
                faults.append(f"parallel.strategy: {choice.reason}")
            return choice.strategy or ("zero3" if self.world.world_size > 1 else simplest), choice.reason
        need = memory(self.shape, self.settled(wanted))
        tight = "" if fits(need, available) else ", which will hardly do"
        return wanted, f"as set: {need.total_gib:.1f} GiB of {available:.1f} GiB a GPU{tight}"


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
