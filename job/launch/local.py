"""Workers on this machine: `qlora train` starts one a GPU, or as many as it is told, and ends all when one dies."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from job.config import RunConfig
from job.errors import InputError, Interrupted, OutputError
from job.launch.blame import first_failure
from job.run_folder import RunFolder
from job.stop import SIGNALS
from job.world import free_port, ranks_on

LAST_WORDS_S = 10.0
"""How long the others may go on when one worker has ended with a fault: they mostly have the same one."""
LAST_LINES = 40
"""What is shown of a worker that failed."""
SECOND_CTRL_C_S = 5.0
"""How long a worker may take to say that it was stopped by a second Ctrl-C."""
PARENT_DIED = 1
"""prctl's PR_SET_PDEATHSIG: the worker is killed when this process is, however that happens."""

Say = Callable[[str], None]


def workers(config: RunConfig, gpus: int) -> int:
    """How many workers parallel.processes means here: all is one a GPU, or one on a CPU.

    Raises:
        ConfigError: there are fewer GPUs.
    """
    return ranks_on(config.parallel.processes, gpus)


def start(config: RunConfig, words: Sequence[str], count: int, gpus: int, say: Say) -> int:
    """Run `qlora` with these words in `count` workers to their end; returns the exit code of one that failed, best of
    all one that a signal ended, else the first by rank.

    The first worker speaks; what the others say is shown when one of them fails alone. status.json is true afterwards,
    even if nobody was left to write it.
    """
    begun = datetime.now(UTC).replace(microsecond=0)
    threads = max(len(os.sched_getaffinity(0)) // count, 1)
    where = f"{count} GPUs" if gpus else f"this CPU, {threads} thread{'s' if threads > 1 else ''} each"
    say(f"{count} workers on {where}")
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory(prefix="qlora-workers-") as folder:
        watch = _Watch()
        running = watch.running
        for rank in range(count):
            numbers = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            # safe: or a folder here that is named job would be the package
            env = {
                "OMP_NUM_THREADS": str(threads),
                "PYTHONSAFEPATH": "1",
                **os.environ,
                **{name: str(n) for name, n in numbers.items()},
            }
            group = running[0].pid if running else 0  # its own, so that a terminal's Ctrl-C comes through here
            watch.add(_worker(words, env, group, Path(folder, str(rank)) if rank else None))
        failed = watch.until_the_end()
        codes = {rank: running[rank].returncode for rank in failed}
        if not failed:
            return 0
        if -codes[failed[0]] in watch.handed_on:
            say(f"{signal.Signals(-codes[failed[0]]).name} came before the run began. Start it again when you like")
            return Interrupted.exit_code
        code = _explain(config, codes, folder, begun, say)
    return 130 if watch.interrupts > 1 else max(code, 1)  # a signal's code is negative


def _explain(config: RunConfig, codes: Mapping[int, int], folder: str, begun: datetime, say: Say) -> int:
    """Say which worker failed first and what it said, and see that status.json knows; its exit code.

    Args:
        codes: exit codes of those that failed, first one that a signal ended.
        folder: what they said.
    """
    first = next(iter(codes))
    run = None
    if codes[first] not in (InputError.exit_code, Interrupted.exit_code):
        with suppress(OutputError):  # storage that cannot be reached may be why they failed
            run = RunFolder(config)
        status = run.status if run and run.status and datetime.fromisoformat(run.status.updated) >= begun else None
        if codes[first] > 0 and (status is None or status.lost):
            first = _first_to_fail(list(codes), folder)
    code = codes[first]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    alone = first > 0 or code < 0  # else the first worker has said for itself what was wrong
    if alone:
        say("\n".join([f"worker {first} {how}", *_lines_of(first, folder)[-LAST_LINES:]]))
    if run and run.status and (alone or run.status.state == "running"):
        run.abandon(f"worker {first} {how}", begun)
    return code


def _first_to_fail(failed: Sequence[int], folder: str) -> int:
    """Of workers that ended with a fault: the first that names no other one's end as its cause."""
    failure = first_failure({str(rank): "\n".join(_lines_of(rank, folder)) for rank in failed})
    return failed[0] if failure is None or failure.follows else int(failure.rank)


def _worker(words: Sequence[str], env: dict[str, str], group: int, quiet: Path | None) -> subprocess.Popen[bytes]:
    log = open(quiet, "wb") if quiet else None  # noqa: SIM115 - the worker's, from here on
    try:
        return subprocess.Popen(  # noqa: S603 - our own command with the words that came
            [sys.executable, "-m", "job", *words],
            env=env,
            stdout=log,
            stderr=log,
            process_group=group,
            preexec_fn=_die_with_parent,
        )
    finally:
        if log:
            log.close()


class _Watch:
    """Hands signals on to the workers, ends all when one fails. It listens before the first of them starts."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.interrupts = 0
        self.handed_on: set[int] = set()
        self.deadline = float("inf")
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.before = {number: signal.signal(number, self._hand_on) for number in heard}

    def add(self, worker: subprocess.Popen[bytes]) -> None:
        """Watch one more; a signal that came while it started is handed on to it too."""
        self.running.append(worker)
        for number in self.handed_on:
            worker.send_signal(number)

    def until_the_end(self) -> list[int]:
        """Wait for all; the numbers of those that failed, first one that was killed: it took the others with it,
        whoever of them said so first."""
        failed: list[int] = []
        try:
            while None in [worker.poll() for worker in self.running]:  # each is asked, or none but the first ever ends
                failed = self._failed()
                # an interrupted run ends by itself, once the first worker has written what it leaves
                if any(self.running[rank].returncode != Interrupted.exit_code for rank in failed):
                    self.deadline = min(self.deadline, time.monotonic() + LAST_WORDS_S)
                if time.monotonic() > self.deadline:
                    break
                time.sleep(0.05)
            failed = self._failed()
        finally:
            self._end()
            for number, handler in self.before.items():
                signal.signal(number, handler)
        return sorted(failed, key=lambda rank: self.running[rank].returncode >= 0)

    def _failed(self) -> list[int]:
        return [rank for rank, worker in enumerate(self.running) if worker.returncode]

    def _hand_on(self, number: int, frame: object) -> None:
        self.interrupts += number == signal.SIGINT and sys.stdin.isatty()
        self.handed_on.add(number)
        if self.interrupts > 1:
            self.deadline = min(self.deadline, time.monotonic() + SECOND_CTRL_C_S)
        for worker in self.running:
            if worker.poll() is None:
                worker.send_signal(number)

    def _end(self) -> None:
        for worker in self.running:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _lines_of(rank: int, folder: str) -> list[str]:
    """What a worker said, behind its number; nothing of the first, which speaks for itself."""
    text = Path(folder, str(rank)).read_text(errors="replace").strip() if rank else ""
    return [f"[{rank}] {line}" for line in text.splitlines()]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
