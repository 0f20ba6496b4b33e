"""What will happen, before anything is held: `qlora plan`, from the run file, the model's headers and the rows."""

import json
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import psutil
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from job.config import RunConfig
from job.data.pack import epoch_order
from job.data.rows import Row
from job.data.split import read_split
from job.errors import ConfigError, InputError
from job.formats import format_of, segments_of
from job.hub import snapshot
from job.plan import Plan, make_plan
from job.published import published
from job.shape import Shape, read_shape
from job.store import Store, is_url
from job.trained import trained_elements
from job.world import Hardware, World, ranks_on

SAMPLE = 500
"""Rows whose tokens are counted for the estimate of steps."""


@dataclass(frozen=True)
class Outlook:
    """A run as it will go; `rows` and `tokens` are None when train.max_steps says how long it is."""

    config: RunConfig
    world: World
    hardware: Hardware
    shape: Shape
    plan: Plan
    rows: int | None
    tokens: int | None

    def lines(self) -> Iterator[str]:
        """For people."""
        config, plan, shape = self.config, self.plan, self.shape
        yield (
            f"model     {config.model.name}: {_count(shape.parameters)} parameters, {_count(shape.quantized)} in "
            f"{config.quantization.type}, {_count(shape.kept)} kept in {plan.precision}, "
            f"{_count(self.trained)} trained"
        )
        yield f"where     {self._where()}"
        yield f"strategy  {plan.zero.strategy}{f': {plan.reason}' if plan.reason else ''}"
        yield (
            f"batches   {plan.global_batch_size} sequences of at most {config.data.max_length} tokens a step: "
            f"{plan.micro_batch_size} a forward x {self.world.world_size} ranks x {plan.accumulation} accumulated"
        )
        if self.tokens is None:
            yield f"steps     {plan.steps} (train.max_steps), {plan.warmup_steps} of them warm-up"
        else:
            yield (
                f"steps     about {plan.steps}, {plan.warmup_steps} of them warm-up: {config.train.epochs:g} epochs of "
                f"{self.rows:,} rows, about {self.tokens:,} tokens"
            )
        again: object = plan.recompute
        if isinstance(again, int):
            again = f"{min(again, self.shape.layers)} of {self.shape.layers} layers"
        how = f"{config.train.optimizer}, recompute {again}"
        yield f"precision {plan.precision}, products in {plan.compute_dtype}, {how}"
        if plan.memory:
            yield "memory    estimated"
            yield from (f"          {line}" for line in plan.memory.lines())
        yield from (f"note      {note}" for note in plan.notes)

    def as_json(self) -> dict[str, Any]:
        """For programs; memory in GiB."""
        plan, need = self.plan, self.plan.memory
        items = {item.name: round(item.gib, 3) for item in need.items} if need else {}
        return {
            "model": {
                "name": self.config.model.name,
                "parameters": self.shape.parameters,
                "quantized": self.shape.quantized,
                "trained": self.trained,
            },
            "world": {"ranks": self.world.world_size, "ranks_per_node": self.world.ranks_per_node},
            "hardware": {"device": self.hardware.device, "name": self.hardware.name, "gib": self.hardware.memory_gib},
            "strategy": plan.zero.strategy,
            "reason": plan.reason,
            "precision": plan.precision,
            "recompute": plan.recompute,
            "dequantize": plan.dequantize,
            "global_batch_size": plan.global_batch_size,
            "micro_batch_size": plan.micro_batch_size,
            "accumulation": plan.accumulation,
            "steps": plan.steps,
            "steps_estimated": self.tokens is not None,
            "warmup_steps": plan.warmup_steps,
            "memory_gib": items,
            "total_gib": round(need.total_gib, 3) if need else None,
            "host_gib": round(need.host_gib, 3) if need else None,
            "notes": list(plan.notes),
        }

    @property
    def trained(self) -> int:
        """Elements of the adapter."""
        lora = self.config.lora
        return trained_elements(self.shape, lora.rank, lora.targets, lora.dora, lora.share_a)

    def _where(self) -> str:
        world, hardware = self.world, self.hardware
        if hardware.device == "cpu":
            return f"{world.world_size} rank{'s' * (world.world_size > 1)} on {hardware.name}"
        nodes = f"{world.nodes} nodes x " if world.nodes > 1 else ""
        return f"{nodes}{world.ranks_per_node} x {hardware.name}, {hardware.memory_gib:.1f} GiB each"


def look_ahead(config: RunConfig, world: World, hardware: Hardware) -> Outlook:
    """Plan a run without a GPU and without torch.

    Args:
        world: the ranks it will have; only their numbers count.
        hardware: what each will compute on.

    Raises:
        InputError: what `qlora train` would refuse, as far as run file, headers and rows show it.
    """
    described, headers = published(config.model, config.storage)
    shape = read_shape(headers, described)
    plan = make_plan(config, world, hardware, shape.model_type, shape)
    if config.train.max_steps:
        return Outlook(config, world, hardware, shape, plan.with_steps(config.train.max_steps), None, None)
    rows, _ = read_split(config)
    lengths = _lengths(config, rows)
    scale = len(rows) / len(lengths)
    data = config.data
    packed = epoch_order(lengths, data.max_length, data.packing, data.shuffle, config.train.seed, 0)
    sequences = max(math.ceil(len(packed) * scale), 1)
    steps = math.ceil(math.ceil(sequences / plan.global_batch_size) * config.train.epochs)
    tokens = round(int(lengths.sum()) * scale)
    return Outlook(config, world, hardware, shape, plan.with_steps(steps), len(rows), tokens)


def _lengths(config: RunConfig, rows: Sequence[Row]) -> np.ndarray:
    """Tokens of each row of a sample, about: the contents, and the chat format around as many turns as the first row
    has. A tokenizer in another form than tokenizer.json is taken to make one token of four bytes."""
    sample = rows[:: math.ceil(len(rows) / SAMPLE)]
    name, kind = format_of(config.data.format, config.data.template, sample[0].fields)
    store = _small_files(config)
    tokenizer = _read_json(store, "tokenizer.json")
    encode = tokenizers.Tokenizer.from_str(json.dumps(tokenizer)).encode if tokenizer else None
    lengths: list[int] = []
    markup = 0
    for row in sample:
        try:
            segments = segments_of(kind, name, row.fields)
        except ValueError as fault:
            raise InputError(f"{row.where}: {fault}") from fault
        if not lengths and encode:
            around = len(encode(_rendered(store, [segment.role for segment in segments])).ids)
            markup = max(around - len(segments), 0)
        found = [
            len(encode(segment.content).ids) if encode else len(segment.content.encode()) // 4 + 1
            for segment in segments
        ]
        lengths.append(min(sum(found) + markup, config.data.max_length))
    return np.array(lengths)


def _rendered(store: Store, roles: Sequence[str]) -> str:
    """The model's chat template around turns of one letter each; nothing when it has none that renders so."""
    about = _read_json(store, "tokenizer_config.json") or {}
    template = about.get("chat_template")
    if template is None and store.exists("chat_template.jinja"):
        template = store.read("chat_template.jinja").decode()
    if not isinstance(template, str) or not {"user", "assistant"} >= set(roles):
        return "x" * len(roles)
    named = {key: value["content"] if isinstance(value, dict) else value for key, value in about.items()}
    specials = {key: value for key, value in named.items() if key.endswith("_token")}
    messages = [{"role": role, "content": "x"} for role in roles]
    try:
        compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        return str(compiled.render(messages=messages, add_generation_prompt=False, **specials))
    except (jinja2.TemplateError, TypeError):  # it wants what only transformers gives it: an estimate does without
        return "x" * len(roles)


def _small_files(config: RunConfig) -> Store:
    name = config.model.name
    if is_url(name) or Path(name).is_dir():
        return Store(name, config.storage)
    return Store(snapshot(config.model, ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")))


def _read_json(store: Store, name: str) -> Any:
    return json.loads(store.read(name)) if store.exists(name) else None


def planned_for(
    config: RunConfig, nodes: int, gpus: int | None, gpu_memory_gib: float | None
) -> tuple[World, Hardware]:
    """The ranks and what they compute on: what is asked for, else what this machine shows, else its CPU.

    Raises:
        ConfigError: GPUs are asked for whose memory is not known, or more ranks than GPUs.
    """
    here, wanted = seen_gpus(), config.parallel.processes
    if gpus is None and gpu_memory_gib is None and here is None:
        cores = len(os.sched_getaffinity(0))
        gib = psutil.virtual_memory().total / 2**30
        hardware = Hardware("cpu", f"{cores} CPU cores", True, gib, fp8=False, rows="none")
    elif gpu_memory_gib is not None:
        hardware = Hardware("cuda", "GPU", True, gpu_memory_gib, gpus or (1 if wanted == "all" else wanted))
    elif here is not None:
        hardware = replace(here, gpus=gpus or here.gpus)
    else:
        raise ConfigError("the command", ["--gpus: here is no GPU to ask for its memory. Give --gpu-memory too"])
    ranks = ranks_on(wanted, hardware.gpus)
    return World(world_size=ranks * nodes, local_world_size=ranks), hardware


def seen_gpus() -> Hardware | None:
    """The GPUs that NVIDIA's driver shows on this machine, without torch; None when there are none."""
    wanted = "--query-gpu=name,memory.total,compute_cap"
    try:
        done = subprocess.run(  # noqa: S603 - no word of it comes from outside
            ["nvidia-smi", wanted, "--format=csv,noheader,nounits"],  # noqa: S607 - wherever the driver put it
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    if done.returncode or not lines:
        return None
    name, mebibytes, capability = lines[0]
    newest = float(capability)
    return Hardware("cuda", name, newest >= 8, float(mebibytes) / 1024, len(lines), fp8=newest >= 9)


def as_text(values: dict[str, Any]) -> str:
    """JSON with two spaces, as DeepSpeed's users write it."""
    return json.dumps(values, indent=2)


def _count(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return str(number)
