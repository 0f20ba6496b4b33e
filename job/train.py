"""The page: one run from its settings to its adapter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from job import adapter, loop
from job.config import RunConfig
from job.data import Dataset, load_dataset
from job.engine import Engine, connect, on_first_rank
from job.errors import Interrupted, JobError, ModelError
from job.hardware import this_hardware
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
from job.plan import make_plan
from job.pretrained import base_name, fetch, fetch_weights, read_config
from job.run_folder import RunFolder
from job.sinks import ConsoleSink, JsonlSink, Metrics, Sink
from job.stop import StopRequest
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
    files, checkpoint = fetch(config.model, config.storage)
    architecture = read_config(files, config.model)
    plan = make_plan(config, world, hardware, architecture.model_type)
    tokenizer = Tokenizer(files, config.model.trust_remote_code)
    skeleton = build(architecture, config, plan.precision, plan.compute_dtype)
    lora_targets(skeleton, config.lora.targets)
    data = load_dataset(config, tokenizer)
    _fits(data, architecture, config.model.name)
    checkpoint = fetch_weights(config.model, checkpoint)
    wanted = shares(skeleton, read_headers(checkpoint), config.model.name)
    plan = plan.with_steps(config.train.max_steps or data.train.steps(config.train.epochs))
    for line in (*plan.notes, *data.report(), f"{plan.steps} steps in {plan.precision} on {hardware.name}"):
        say(line)

    with _recorded(run, world) as record, StopRequest() as stop:
        dtype = DTYPE[plan.precision]
        place(skeleton, stream(checkpoint, wanted, config.quantization, dtype, hardware.device), hardware.device)
        if config.data.packing:
            refuse_leaking_packs(skeleton, hardware.device)
        model, places = add_adapter(skeleton, config.lora, config.train.seed, base_name(config.model), dtype)
        if config.train.recompute == "full":
            recompute_activations(model)
        engine = Engine(model, places, plan, config.train, world)
        with _sinks(config, run, world, plan.steps) as on_row:
            loop.run(engine, data, plan, config, world, on_row, lambda: stop.asked, record.progress)
        if world.speaks:
            target = run.store.child("adapter")
            adapter.write(model, record.progress.adapter, tokenizer, target, trained=record.progress.step > 0)
        record.finish()
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
        record.write("failed", str(fault) if isinstance(fault, JobError) else f"{type(fault).__name__}: {fault}")
        raise


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
