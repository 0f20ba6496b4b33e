"""Workers on this machine: `qlora train` starts one a GPU, or as many as it is told, and ends all when one dies."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from job.config import RunConfig
from job.errors import InputError, Interrupted
from job.run_folder import RunFolder
from job.stop import SIGNALS
from job.world import ranks_on

LAST_WORDS_S = 10.0
"""How long the others may go on when one worker has ended with a fault: they mostly have the same one."""
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
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
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
        first = watch.until_the_end()
        if first is None:
            return 0
        code = running[first].returncode
        if -code in watch.handed_on:
            say(f"{signal.Signals(-code).name} came before the run began. Start it again when you like")
            return Interrupted.exit_code
        said = _last_words(running, first, folder)
        if first or code < 0:  # the first worker has said for itself what was wrong
            say(said)
    if code not in (InputError.exit_code, Interrupted.exit_code):
        RunFolder(config).abandon(said.splitlines()[0], begun)
    return 130 if watch.interrupts > 1 else max(code, 1)  # a signal's code is negative


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

    def until_the_end(self) -> int | None:
        """Wait for all; the number of a worker that failed, None when none did."""
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
        # one that was killed took the others with it, whoever of them said so first
        killed = [rank for rank in failed if self.running[rank].returncode < 0]
        return next(iter(killed + failed), None)

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


def _last_words(running: Sequence[subprocess.Popen[bytes]], rank: int, folder: str) -> str:
    code = running[rank].returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    text = Path(folder, str(rank)).read_text(errors="replace").strip().splitlines() if rank else []
    return "\n".join([f"worker {rank} {how}", *(f"[{rank}] {line}" for line in text[-40:])])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
