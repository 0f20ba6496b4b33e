"""A job of the batch scripts on the tests' own SLURM, and what is said about it."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.slurm import OWN_ENV, Cluster
from tests.conftest import REPOSITORY

ENV = {**OWN_ENV, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "QLORA_PREFLIGHT": "nodes"}
ZERO3, SINGLE, SWEEP = (
    REPOSITORY / "slurm" / f"{name}.sbatch" for name in ("zero3_2node", "single_node", "array_sweep")
)
TWO_RANKS, ENDLESS = "parallel.processes=2", "train.max_steps=100000"


class Batch:
    """A job that was submitted from `place`.

    Args:
        words: of sbatch.
        env: more than ENV.
    """

    def __init__(self, cluster: Cluster, place: Path, *words: str | Path, **env: str):
        place.mkdir(exist_ok=True)
        self.cluster, self.place = cluster, place
        self.id = cluster.sbatch(*words, cwd=place, env={**ENV, **env})

    @classmethod
    def of(cls, cluster: Cluster, place: Path, number: int) -> "Batch":
        """A job that was submitted in another way."""
        batch = cls.__new__(cls)
        batch.cluster, batch.place, batch.id = cluster, place, number
        return batch

    @property
    def folder(self) -> Path:
        """The job's own."""
        return self.place / f"qlora-{self.id}"

    def said(self) -> str:
        """The batch log and those of the nodes."""
        logs = [self.place / f"qlora-{self.id}.log", *sorted(self.folder.glob("*.log"))]
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())

    def ended(self, timeout_s: float = 150) -> str:
        """The state in which it ended."""
        return self.cluster.wait(self.id, timeout_s=timeout_s)

    def code(self, timeout_s: float = 150) -> int:
        """The exit code of its script, once it has ended."""
        self.ended(timeout_s)
        return self.cluster.exit_code(self.id)

    def wait_for(self, text: str, timeout_s: float = 150) -> None:
        """Until somebody says it."""
        end = time.monotonic() + timeout_s
        while text not in self.said():
            assert time.monotonic() < end, f"nobody said {text!r}\n{self.said()[-5000:]}"
            time.sleep(0.1)


def is_rank(pid: int) -> bool:
    """Whether this process is `qlora train`."""
    try:
        return b"\0job\0train\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return False


def env_of(pid: int) -> dict[str, str]:
    """The environment of `qlora train`; empty for other processes, and when it has just ended."""
    try:
        process = psutil.Process(pid)
        return process.environ() if {"job", "train"} <= set(process.cmdline()) else {}
    except psutil.Error:
        return {}


def crawl(ranks: Sequence[int], until: Callable[[], object], timeout_s: float = 60) -> None:
    """Let these processes run for moments only, so that they come about as far on every machine."""
    end = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < end
        for number, pause_s in ((signal.SIGSTOP, 1.0), (signal.SIGCONT, 0.05)):
            for rank in ranks:
                os.kill(rank, number)
            time.sleep(pause_s)


@contextmanager
def stuck(rank: int) -> Iterator[None]:
    """Meanwhile this process does nothing, as in a collective that does not end. SLURM lets stopped ones go on before
    it ends them, so that once is not enough."""
    over = threading.Event()

    def stop() -> None:
        with suppress(ProcessLookupError):
            while not over.wait(0.005):
                os.kill(rank, signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def status(config: Path) -> dict[str, Any]:
    """status.json of a run of `run_of`."""
    return dict(json.loads((config.with_suffix("") / "status.json").read_text()))
