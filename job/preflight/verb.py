"""What `qlora preflight` does: one node's line, this machine alone, or a rank among others."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from job.config import RunConfig
from job.errors import JobError
from job.hardware import count_gpus
from job.preflight.judge import Verdict, judge
from job.preflight.probe import probe
from job.world import World, free_port, ranks_on, started_by_launcher

Say = Callable[[str], None]
ENDING_S = 60.0
"""A worker ends by itself within that time after the check's."""


@dataclass(frozen=True)
class Options:
    """The command's: print the node's line alone; the wanted port; seconds for all of it; nodes in the order of ranks;
    file for the verdict; Unix seconds by which all of it is to be over, 0 for no such time."""

    report: bool
    port: int
    timeout_s: float
    nodes: Sequence[str]
    verdict: Path | None
    until: float = 0.0

    @property
    def limit_s(self) -> float:
        """Seconds from now on."""
        return max(self.until - time.time(), 1.0) if self.until else self.timeout_s


def preflight(
    config: RunConfig, options: Options, local_rank: int | None, words: Sequence[str], say: Say, show: Say
) -> int:
    """Run the check; returns the exit code.

    Args:
        local_rank: what the deepspeed launcher passes.
        words: the command behind `qlora`, for workers of this machine.
        say: hears what is no result.
        show: hears the results.

    Raises:
        InputError: the environment or parallel.processes cannot be met.
        JobError: ranks cannot meet, or do not end; the verdict's file cannot be written.
    """
    if options.report:
        show(probe(config, os.environ, options.port, say, options.limit_s).to_json())
        return 0
    if started_by_launcher(os.environ):
        from job.preflight.collective import Asked, check, leave  # deepspeed, which a report can do without

        world = World.from_env(os.environ, local_rank)
        asked = Asked(config, options.limit_s, options.nodes, options.port)
        verdict = check(asked, world, show if world.speaks else say)
        if world.speaks:
            _tell(verdict, options, show)
        leave(0 if verdict.ok else 1)
        return 0
    count = ranks_on(config.parallel.processes, count_gpus())
    if count > 1:
        return _workers(count, words, options)
    verdict = judge([probe(config, os.environ, options.port, say, options.limit_s)], ())
    _tell(verdict, options, show)
    return 0 if verdict.ok else 1


def _tell(verdict: Verdict, options: Options, show: Say) -> None:
    for line in verdict.lines():
        show(line)
    if verdict.ok:
        show("preflight: nothing speaks against the run")
    elif verdict.faults:
        show(f"preflight: repair or leave out {', '.join(verdict.bad)}")
    if options.verdict:
        try:
            options.verdict.write_text(verdict.to_json() + "\n", "utf-8")
        except OSError as fault:
            raise JobError(f"--verdict {options.verdict}: {fault.strerror}. Name a file that can be written") from fault


def _workers(count: int, words: Sequence[str], options: Options) -> int:
    """The check in workers of this machine; each ends by itself, for the check has a time limit."""
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = []
    try:
        for rank in range(count):
            numbers = {name: str(n) for name, n in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            env = {"OMP_NUM_THREADS": "1", **os.environ, **numbers}
            running.append(subprocess.Popen([sys.executable, "-m", "job", *words], env=env))  # noqa: S603 - ourselves
        codes = [worker.wait(options.limit_s + ENDING_S) for worker in running]
    except subprocess.TimeoutExpired as fault:
        raise JobError("preflight: a worker does not end by itself. Look at its GPU's driver (dmesg)") from fault
    finally:
        for worker in running:
            worker.kill()
    return next((max(code, 1) for code in codes if code), 0)  # a signal's code is negative
