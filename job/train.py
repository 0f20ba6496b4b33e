"""The page: one run from its settings to its adapter."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from job import adapter, loop
from job.attention_out import AttentionOutputs
from job.config import RunConfig
from job.data.load import load_dataset
from job.dropout import Places
from job.engine import Engine
from job.errors import ModelError
from job.group import agree_on_hardware, agreed, connect, first_of_each_node, on_first_rank
from job.hardware import this_hardware
from job.host_inputs import HostInputs
from job.loading import fill
from job.lora_linear import in_one_step
from job.matching import matched
from job.model import (
    DTYPE,
    add_adapter,
    build,
    lora_targets,
    refuse_leaking_packs,
)
from job.plan import STORAGE_BYTES, Plan, make_plan
from job.pretrained import base_name, fetch, fetch_weights, plain_peft_note, read_config, read_tensors
from job.progress import Progress
from job.published import shape_of
from job.recompute import recompute_activations
from job.record import Record, metric_sinks, recorded
from job.resume import go_on
from job.row_attention import Rows, attend_by_rows
from job.run_folder import RunFolder
from job.saved import seed_random
from job.saving import Saver
from job.stop import WORDS, StopRequest, files_that_ask, limits
from job.swap import prepare_files
from job.tokenizer import Tokenizer
from job.uploads import patiently
from job.world import Hardware, World

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to; evaluation losses are None without held-out rows."""

    state: str
    step: int
    eval_before: float | None
    eval_after: float | None
    adapter_url: str


def train(config: RunConfig, world: World, say: Say = print) -> Outcome:
    """Fine-tune the model as the settings say.

    Args:
        config: the settings.
        world: this process among its peers.
        say: hears sentences about what was decided.

    Raises:
        InputError: settings, data, model or output URL are wrong; nothing was written.
        Interrupted: something asked to stop; a checkpoint and the adapter of that step were written.
        JobError: the training failed; status.json says why.
    """
    ends_at = limits(config, os.environ, time.time())
    hardware = this_hardware(world.local_rank)
    connect(world, hardware.device)
    world, hardware = agree_on_hardware(world, hardware)
    run = RunFolder(config)
    if on_first_rank(world, run.already_finished):
        return Outcome("already finished", run.status.step if run.status else 0, None, None, f"{run.store.url}/adapter")
    files, checkpoint = first_of_each_node(world, lambda: fetch(config.model, config.storage, say))
    architecture = read_config(files, config.model)
    shape, unknown = on_first_rank(world, lambda: shape_of(config.model, config.storage, say))
    plan = make_plan(config, world, hardware, architecture.model_type, shape)
    tokenizer = Tokenizer(files, config.model.trust_remote_code)
    made = partial(build, architecture, config.model, config.quantization, plan.precision, plan.compute_dtype)
    skeleton = made()
    lora_targets(skeleton, config.lora.targets)
    data = load_dataset(config, tokenizer, partial(on_first_rank, world))
    data.check(partial(_fits, architecture, config.model.name, config.data.packing))
    checkpoint = first_of_each_node(world, lambda: fetch_weights(config.model, checkpoint, config.storage, say))
    tensors = read_tensors(files, checkpoint, config.model)
    agree = partial(on_first_rank, world)
    skeleton, wanted = matched(
        skeleton, made, tensors, checkpoint, config.model.name, STORAGE_BYTES[plan.storage], agree
    )
    prepare_files(plan, world, wanted, say)
    plan = plan.with_steps(config.train.max_steps or data.train.steps(config.train.epochs))
    _say_all((*plan.notes, *unknown, *data.report(), _in_short(plan, world, hardware)), say)

    record = Record(run, world, say)
    asking = files_that_ask(config, os.environ)
    stop = StopRequest(config.train.stop_grace_s, asking, ends_at, record.stop_key, world.speaks)
    with stop, recorded(record):
        data.keep(say)
        seed_random(config.train.seed, world.rank)
        receipts = fill(skeleton, wanted, checkpoint, config, plan, world, say)
        model, places, rows = _adapted(skeleton, config, plan)
        engine = Engine(model, places, rows, plan, config.train, world)
        receipts.prove(engine.base())
        if config.data.packing:
            refuse_leaking_packs(engine.logits, type(skeleton).__name__)
        start = go_on(record, engine, plan, config, data.train.fingerprint, say)
        with metric_sinks(config, run, record, plan.steps, start.metrics) as on_row:
            saver = Saver(engine, plan, config, data.train.fingerprint, record, on_row.flush, start.point, start.stale)
            asked = partial(agreed, world, lambda: stop.asked, WORDS)
            loop.run(engine, data, plan, config, world, on_row, asked, record.progress, saver)
            saver.finish(record.progress)
        on_first_rank(world, lambda: _leave(config, record, model, tokenizer))
        record.interrupt()
    return _outcome(record.progress, run, plain_peft_note(config.model, files), say)


def _adapted(base: Any, config: RunConfig, plan: Plan) -> tuple[Any, Places, Rows | None]:
    """The filled base with an adapter on it, as training calls it; the places that dropout reads, and the rows that
    attention reads where it takes no mask."""
    model, places = add_adapter(base, config.lora, config.train.seed, base_name(config.model), DTYPE[plan.precision])
    if config.train.fused:
        in_fp8 = places if config.train.base_compute == "fp8" else None
        in_one_step(model, in_fp8, values_kept=plan.dequantize == "once")
    rows = attend_by_rows(model) if plan.by_rows else None
    if plan.recompute != "none":
        layers = None if plan.recompute == "full" else plan.recompute
        on_host = HostInputs() if plan.inputs_on_host else None
        recompute_activations(model, on_host, layers)
        if rows is not None and on_host is not None:
            rows.outputs = AttentionOutputs(on_host)
    return model, places, rows


def _say_all(lines: Iterable[str], say: Say) -> None:
    for line in lines:
        say(line)


def _in_short(plan: Plan, world: World, hardware: Hardware) -> str:
    said = f"{plan.steps} steps in {plan.precision} on {world.world_size} x {hardware.name}, {plan.zero.strategy}"
    return said + (f" ({plan.reason})" if plan.reason else "")


def _outcome(progress: Progress, run: RunFolder, note: str | None, say: Say) -> Outcome:
    if note:
        say(note)
    after = progress.last_eval if progress.kept_eval is None else progress.kept_eval
    return Outcome("finished", progress.step, progress.first_eval, after, f"{run.store.url}/adapter")


def _leave(config: RunConfig, record: Record, model: object, tokenizer: Tokenizer) -> None:
    """What a run leaves: the adapter, then its state. No rank goes before this is done: launchers end all with one."""
    trained = record.progress.step > 0
    target = record.run.store.child("adapter")
    tensors, revision = record.progress.adapter, config.model.revision
    if record.lease is not None:
        record.lease.check()
    write = partial(adapter.write, model, tensors, tokenizer, target, trained, revision)
    patiently(write, "adapter", record.retry_s, record.say, target)
    record.uploads.wait(inf)
    record.finish()


def _fits(architecture: object, name: str, packing: bool, largest: int, longest: int, rows: str) -> None:
    """Refuse tokens the model has no embedding for, rows longer than its positions, and packing where a long row would
    change its neighbours."""
    vocabulary = getattr(architecture, "vocab_size", largest + 1)
    positions = getattr(architecture, "max_position_embeddings", longest)
    if largest >= vocabulary:
        raise ModelError(
            f"{name}: the tokenizer gives id {largest}, the model knows {vocabulary}. They do not belong together"
        )
    if longest > positions:
        raise ModelError(f"{name}: {rows} {longest} tokens, the model has {positions} positions. Lower data.max_length")
    rope = getattr(architecture, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or positions
    if packing and rope.get("rope_type") == "longrope" and longest > original:
        raise ModelError(
            f"{name}: above {original} positions its longrope scaling depends on the longest row of a "
            "sequence, so packed rows would change each other. Set data.packing: false, or lower data.max_length"
        )
