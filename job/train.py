"""The page: one run from its settings to its adapter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from job import adapter, loop
from job.config import RunConfig
from job.data import Dataset, load_dataset
from job.engine import Engine
from job.errors import Interrupted, JobError, ModelError
from job.group import agreed, connect, first_of_each_node, lost_peer, on_first_rank
from job.hardware import out_of_memory, this_hardware
from job.headers import read_headers
from job.model import (
    DTYPE,
    add_adapter,
    build,
    lora_targets,
    place,
    recompute_activations,
    refuse_leaking_packs,
    shares,
)
from job.plan import STORAGE_BYTES, make_plan
from job.pretrained import base_name, fetch, fetch_weights, plain_peft_note, read_config
from job.run_folder import STATUS, RunFolder
from job.sharding import Receipts, own_shares, partitioner, scales_of_all, whole
from job.sinks import ConsoleSink, JsonlSink, Metrics, Sink
from job.stop import NAMES, StopRequest
from job.store import reason
from job.tokenizer import Tokenizer
from job.weights import stream
from job.world import World

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
        Interrupted: a signal asked to stop; the adapter of that step was written.
        JobError: the training failed; status.json says why.
    """
    hardware = this_hardware(world.local_rank)
    connect(world, hardware.device)
    run = RunFolder(config)
    if on_first_rank(world, run.already_finished):
        done = run.status.step if run.status else 0
        return Outcome("already finished", done, None, None, f"{run.store.url}/adapter")
    files, checkpoint = first_of_each_node(world, lambda: fetch(config.model, config.storage))
    architecture = read_config(files, config.model)
    plan = make_plan(config, world, hardware, architecture.model_type)
    tokenizer = Tokenizer(files, config.model.trust_remote_code)
    skeleton = build(architecture, config, plan.precision, plan.compute_dtype)
    lora_targets(skeleton, config.lora.targets)
    data = load_dataset(config, tokenizer)
    _fits(data, architecture, config.model.name)
    checkpoint = first_of_each_node(world, lambda: fetch_weights(config.model, checkpoint))
    wanted = shares(skeleton, read_headers(checkpoint), config.model.name, STORAGE_BYTES[plan.storage])
    plan = plan.with_steps(config.train.max_steps or data.train.steps(config.train.epochs))
    for line in (*plan.notes, *data.report(), f"{plan.steps} steps in {plan.precision} on {hardware.name}"):
        say(line)

    with _recorded(run, world) as record, StopRequest() as stop:
        dtype, device = DTYPE[plan.precision], hardware.device
        receipts, exchange = Receipts(world), scales_of_all(world)
        pieces = stream(checkpoint, own_shares(wanted, world), config.quantization, dtype, device, exchange)
        pieces = receipts.keep(pieces)
        if plan.zero.shards_base:
            place(skeleton, pieces, device, hold=partitioner(plan, world))
        else:
            place(skeleton, whole(pieces, world), device)
        model, places = add_adapter(skeleton, config.lora, config.train.seed, base_name(config.model), dtype)
        if config.train.recompute == "full":
            recompute_activations(model)
        engine = Engine(model, places, plan, config.train, world)
        receipts.prove(engine.base())
        if config.data.packing:
            refuse_leaking_packs(engine.logits, type(skeleton).__name__)
        with _sinks(config, run, world, plan.steps) as on_row:
            loop.run(
                engine, data, plan, config, world, on_row, lambda: agreed(world, stop.asked, NAMES), record.progress
            )
        if world.speaks:
            target = run.store.child("adapter")
            trained = record.progress.step > 0
            adapter.write(model, record.progress.adapter, tokenizer, target, trained, config.model.revision)
        record.finish()
    if note := plain_peft_note(config.model):
        say(note)
    progress = record.progress
    after = progress.last_eval if progress.kept_eval is None else progress.kept_eval
    return Outcome("finished", progress.step, progress.first_eval, after, f"{run.store.url}/adapter")


def _fits(data: Dataset, architecture: object, name: str) -> None:
    """Refuse tokens the model has no embedding for, and rows longer than its positions."""
    tables = [batches.tokens for batches in (data.train, data.held_out) if batches is not None]
    largest, longest = max(int(t.ids.max()) for t in tables), max(int(t.lengths.max()) for t in tables)
    vocabulary = getattr(architecture, "vocab_size", largest + 1)
    positions = getattr(architecture, "max_position_embeddings", longest)
    if largest >= vocabulary:
        raise ModelError(
            f"{name}: the tokenizer gives id {largest}, the model knows {vocabulary}. They do not belong together"
        )
    if longest > positions:
        raise ModelError(
            f"{name}: a row has {longest} tokens, the model has {positions} positions. Lower data.max_length"
        )


class _Record:
    """Keeps status.json true whatever happens."""

    def __init__(self, run: RunFolder, world: World):
        self.run, self.world = run, world
        self.progress = loop.Progress()

    def finish(self) -> None:
        """Finished, or interrupted when that was asked for."""
        why = self.progress.interrupted
        if why:
            self.write("interrupted", why)
            which = "The adapter of this step" if self.progress.kept_eval is None else "The best adapter so far"
            raise Interrupted(
                f"{why} after step {self.progress.step}. {which} is in {self.run.store.url}/adapter; "
                "this version cannot continue the run, start it with another output.url"
            )
        self.write("finished", self.progress.stopped or "")

    def write(self, state: str, why: str) -> None:
        if self.world.speaks:
            self.run.write_status(state, why, self.progress.step)  # type: ignore[arg-type]


@contextmanager
def _recorded(run: RunFolder, world: World) -> Iterator[_Record]:
    record = _Record(run, world)
    if world.speaks:
        run.begin()
    try:
        yield record
    except Interrupted:
        raise
    except KeyboardInterrupt:
        record.write("interrupted", "a second Ctrl-C")
        raise
    except BaseException as fault:
        known = _in_words(fault, record.progress.step)
        try:
            record.write("failed", str(known or f"{type(fault).__name__}: {fault}"))
        except Exception as second:  # such as the full disk that was the fault
            fault.add_note(f"{STATUS} could not be written either: {reason(second)}")
        if known is None or known is fault:
            raise
        raise known from fault


def _in_words(fault: BaseException, step: int) -> JobError | None:
    """The faults that a user can cure, in a sentence; None for those that are ours."""
    if isinstance(fault, JobError):
        return fault
    if out_of_memory(fault):
        return JobError(
            f"the GPU's memory ran out after step {step} ({str(fault).splitlines()[0][:160]}). Lower "
            "train.micro_batch_size or data.max_length, set train.recompute: full, or parallel.strategy: zero3"
        )
    if isinstance(fault, OSError):
        return JobError(f"storage failed after step {step}: {reason(fault)}. Check space, network and keys")
    if lost_peer(fault):
        return JobError(f"another rank ended after step {step}; what it said tells why")
    return None


@contextmanager
def _sinks(config: RunConfig, run: RunFolder, world: World, steps: int) -> Iterator[loop.OnRow]:
    """The sinks of the rank that speaks, as one function."""
    sinks: list[Sink] = []
    if world.speaks and "console" in config.tracking.sinks:
        sinks.append(ConsoleSink(config.tracking.every_steps))
    if world.speaks and "jsonl" in config.tracking.sinks:
        sinks.append(JsonlSink(run.store))
    for sink in sinks:
        sink.start(config.run_name, steps)

    def on_row(row: Metrics) -> None:
        for sink in sinks:
            sink.row(row)

    try:
        yield on_row
    finally:
        for sink in sinks:
            sink.close()
