"""What is written about a run while it goes: status.json, true whatever happens, and the rows of metrics."""

from collections.abc import Iterator
from contextlib import contextmanager

from job import loop
from job.config import RunConfig
from job.errors import Interrupted, JobError
from job.group import lost_peer
from job.hardware import out_of_memory
from job.run_folder import STATUS, RunFolder
from job.sinks import ConsoleSink, JsonlSink, Metrics, Sink
from job.store import reason
from job.world import World


class Record:
    """Keeps status.json true whatever happens."""

    def __init__(self, run: RunFolder, world: World):
        self.run, self.world = run, world
        self.progress = loop.Progress()

    def finish(self) -> None:
        """Write that it is finished, or interrupted when that was asked for."""
        why = self.progress.interrupted
        self.write("interrupted" if why else "finished", why or self.progress.stopped or "")

    def interrupt(self) -> None:
        """Raise Interrupted when that was asked for, on every rank."""
        progress = self.progress
        if progress.interrupted and not progress.step:
            raise Interrupted(f"{progress.interrupted} before the first step. Start the run again when you like")
        if progress.interrupted:
            which = "The adapter of this step" if progress.kept_eval is None else "The best adapter so far"
            raise Interrupted(
                f"{progress.interrupted} after step {progress.step}. {which} is in {self.run.store.url}/adapter; "
                "this version cannot continue the run, start it with another output.url"
            )

    def write(self, state: str, why: str) -> None:
        if self.world.speaks:
            self.run.write_status(state, why, self.progress.step)  # type: ignore[arg-type]


@contextmanager
def recorded(run: RunFolder, world: World) -> Iterator[Record]:
    record = Record(run, world)
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
            known = JobError(f"{known or fault}. {STATUS} could not be written either: {reason(second)}")
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
    if isinstance(fault, MemoryError) or "can't allocate memory" in str(fault):
        return JobError(
            f"this machine's memory ran out after step {step} ({str(fault).splitlines()[0][-160:]}). Lower lora.rank, "
            "train.micro_batch_size or data.max_length, or take a machine with more"
        )
    if isinstance(fault, OSError):
        return JobError(f"storage failed after step {step}: {reason(fault)}. Check space, network and keys")
    if lost_peer(fault):
        return JobError(f"another rank ended after step {step}, or cannot be reached; what it said tells why")
    return None


@contextmanager
def metric_sinks(config: RunConfig, run: RunFolder, world: World, steps: int) -> Iterator[loop.OnRow]:
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
