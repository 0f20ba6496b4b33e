"""What is written about a run while it goes: status.json, true whatever happens, and the rows of metrics."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from job.config import RunConfig
from job.errors import Interrupted, JobError
from job.group import lost_peer, on_first_rank
from job.hardware import out_of_memory
from job.lease import Lease, NoLease, prove_conditional_puts
from job.progress import Progress
from job.run_folder import LOST_RANK, STATUS, RunFolder, State
from job.sinks import ConsoleSink, JsonlSink, Metrics, PipeSink, Sink
from job.stop import STOP_KEY, CutShort
from job.store import reason
from job.uploads import Uploads, patiently
from job.world import World

ROWS_FD = "QLORA_ROWS_FD"
"""The variable in which a launcher says where it reads rows of metrics, a file descriptor."""
FAILING_S = 30.0
"""Seconds for which the status of a failed run is tried: its ranks wait for nothing else any more."""

Say = Callable[[str], None]


class Record:
    """Keeps status.json true whatever happens, and the run's folder its own; the first rank has a lease."""

    def __init__(self, run: RunFolder, world: World, say: Say):
        self.run, self.world, self.say = run, world, say
        self.progress = Progress()
        self.uploads = Uploads(say, self.retry_s)
        self.lease: Lease | NoLease | None = None
        self.failing = False
        self._one_at_a_time, self._over = threading.Lock(), False

    @property
    def retry_s(self) -> float:
        """Seconds for which storage may fail while the run waits for it."""
        return 60 * self.run.config.storage.retry_minutes

    def begin(self) -> None:
        """Take the folder, and say that the run goes; on the first rank.

        Raises:
            OutputError: another run holds the folder, or it cannot be written.
        """
        store = self.run.store
        if self.run.config.storage.lease:
            prove_conditional_puts(store)

        def take() -> Lease | NoLease:
            held = self.run.config.storage.lease
            job = self.world.job_id
            return Lease.acquire(store, job, self.say, attempt=self.world.attempt) if held else NoLease(store)

        self.lease = patiently(take, "lease", min(self.retry_s, FAILING_S), self.say, store)
        self.run.begin()

    def stop_key(self) -> str | None:
        """The word for it when somebody made the file `stop` in the run's folder."""
        return STOP_KEY if self.lease is not None and self.lease.asked_to_stop else None

    def checkpointed(self, step: int) -> None:
        """Write that a checkpoint is complete; from the uploads' thread."""
        with self._one_at_a_time:
            if not self._over:
                self.run.checkpoint, self.run.restarts = step, 0
                self.run.write_status("running", "", step)

    def finish(self) -> None:
        """Write that it is finished, or interrupted when that was asked for."""
        why = self.progress.interrupted
        self.write("interrupted" if why else "finished", why or self.progress.stopped or "", self.retry_s)

    def interrupt(self) -> None:
        """Raise Interrupted when that was asked for, on every rank."""
        progress = self.progress
        if progress.interrupted and not progress.step:
            raise Interrupted(f"{progress.interrupted} before the first step. Start the run again when you like")
        if progress.interrupted:
            which = "of this step" if progress.kept_eval is None else "that was best so far"
            raise Interrupted(
                f"{progress.interrupted} after step {progress.step}. A checkpoint of it and the adapter {which} are in "
                f"{self.run.store.url}; the same command goes on from there"
            )

    def write(self, state: State, why: str, retry_s: float | None = None) -> None:
        """Write the last status; not into a folder that another run has taken over."""
        if not self.world.speaks or (self.lease is not None and self.lease.lost):
            return
        with self._one_at_a_time:
            self._over = True
            step = max(self.progress.step, self.run.checkpoint)
            store = self.run.store
            retry_s = min(self.retry_s, FAILING_S) if retry_s is None else retry_s
            patiently(lambda: self.run.write_status(state, why, step), STATUS, retry_s, self.say, store)

    def last_uploads(self) -> None:
        """Have what is queued written, if that does not take long; the ranks are no longer waited for."""
        self.failing = True
        with suppress(JobError):
            self.uploads.wait(min(self.retry_s, FAILING_S))

    def close(self) -> None:
        """Nothing more is written; the folder is free for another run."""
        self.uploads.close()
        if self.lease is not None:
            self.lease.release()


@contextmanager
def recorded(record: Record) -> Iterator[None]:
    """A run from its first status to its last."""
    try:
        on_first_rank(record.world, record.begin)
        with _told(record):
            yield
    finally:
        record.close()


@contextmanager
def _told(record: Record) -> Iterator[None]:
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        record.write("interrupted", "a second Ctrl-C")
        raise
    except BaseException as fault:
        known = _in_words(fault, record.progress.step)
        try:
            record.write("failed", str(known or f"{type(fault).__name__}: {fault}"))
            record.last_uploads()
        except Exception as second:  # such as the full disk that was the fault
            known = JobError(f"{known or fault}. {STATUS} could not be written either: {reason(second)}")
        if known is None or known is fault:
            raise
        raise known from fault


def _in_words(fault: BaseException, step: int) -> JobError | None:
    """The faults that a user can cure, in a sentence; None for those that are ours."""
    if isinstance(fault, JobError):
        return fault
    if isinstance(fault, CutShort):
        return JobError(str(fault))
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
        return JobError(f"{LOST_RANK} after step {step}, or cannot be reached; what it said tells why")
    return None


class Metered:
    """The sinks of the rank that speaks.

    Args:
        kept: lines of metrics.jsonl that are there already.
    """

    def __init__(self, config: RunConfig, run: RunFolder, record: Record, kept: Sequence[bytes]):
        self.record = record
        self.sinks: list[Sink] = []
        self.jsonl: JsonlSink | None = None
        if record.world.speaks and "console" in config.tracking.sinks:
            self.sinks.append(ConsoleSink(config.tracking.every_steps))
        if record.world.speaks and "jsonl" in config.tracking.sinks:
            self.jsonl = JsonlSink(run.store, record.uploads.put, kept)
            self.sinks.append(self.jsonl)
        if record.world.speaks and (number := os.environ.get(ROWS_FD)):
            self.sinks.append(PipeSink(int(number), lambda: run.checkpoint))

    def __call__(self, row: Metrics) -> None:
        """Tell all sinks; the file is another run's once that took the folder over."""
        lost = self.record.lease is not None and self.record.lease.lost
        for sink in self.sinks:
            if lost and sink is self.jsonl:
                continue
            sink.row(row)

    def flush(self) -> None:
        """Have the rows so far written."""
        if self.jsonl:
            self.jsonl.flush()


@contextmanager
def metric_sinks(
    config: RunConfig, run: RunFolder, record: Record, steps: int, kept: Sequence[bytes]
) -> Iterator[Metered]:
    """The sinks, open while the run goes."""
    metered = Metered(config, run, record, kept)
    for sink in metered.sinks:
        sink.start(config.run_name, steps)
    try:
        yield metered
    finally:
        for sink in metered.sinks:
            sink.close()
