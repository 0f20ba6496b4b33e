"""The command in real processes that need not import torch again: forked, without a GPU, from one that has."""

import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For the forking process too: CUDA does not survive a fork."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["job.train", "job.data.show"])


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    code: int | None
    out: str
    err: str


class Command:
    """`qlora` with these words, running. Used as a context manager it is gone at the end."""

    def __init__(
        self,
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: str = "/dev/null",
    ):
        self.folder = TemporaryDirectory()
        variables = {**os.environ, "COLUMNS": "200", **NO_GPU, **(env or {})}
        arguments = (list(map(str, words)), self.folder.name, variables, cwd, stdin)
        self.process: BaseProcess = _CONTEXT.Process(target=_main, args=arguments)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in NO_GPU.items():
                patch.setenv(name, value)
            forkserver.ensure_running()
        self.process.start()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *fault: object) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.folder.cleanup()

    def said(self, name: str = "err") -> str:
        """What it wrote so far to `out` or `err`."""
        path = Path(self.folder.name, name)
        return path.read_text() if path.exists() else ""

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid
        os.kill(self.process.pid, number)

    def wait_for(self, words: str, timeout_s: float = 120) -> None:
        """Wait until it has written `words` to err."""
        end = time.monotonic() + timeout_s
        while words not in self.said():
            assert self.process.is_alive() and time.monotonic() < end, self.said()
            time.sleep(0.02)

    def wait(self, timeout_s: float = 200) -> Done:
        """Wait for its end."""
        self.process.join(timeout_s)
        return Done(self.process.exitcode, self.said("out"), self.said("err"))


def run(*words: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Run `qlora` with these words to its end."""
    with Command(*words, env=env, cwd=cwd) as command:
        return command.wait()


def _main(words: list[str], folder: str, variables: dict[str, str], cwd: Path | None, stdin: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = open(stdin)  # noqa: SIM115 - for as long as the process lives
    if cwd:
        os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["qlora", *words]
    from job.cli import main

    if "COUNT_READ_BYTES" in variables:
        _count_read_bytes(variables["COUNT_READ_BYTES"])
    if "NO_HARD_LINKS" in variables:
        os.link = _no_link  # type: ignore[assignment]
    if variables.get("DIES_EARLY", "none") == variables.get("RANK"):
        _die_early()
    if "DRAW_EACH_STEP" in variables:
        _draw()
    if "STORAGE_FAILS_ON_RANK" in variables:
        _fail_storage(variables["STORAGE_FAILS_ON_RANK"] == variables.get("RANK"))
    if "NAN_AT_STEPS" in variables:
        _lose(set(map(int, variables["NAN_AT_STEPS"].split(","))))
    if "DIE_AFTER_STEP" in variables:
        _die_after(int(variables["DIE_AFTER_STEP"]))
    main()


def _count_read_bytes(path: str) -> None:
    """Write the number of bytes of weights that this process reads, a line each read."""
    from job.store import Store

    read = Store.read

    def counted(self: Store, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        content = read(self, name, start, stop)
        if name.endswith(".safetensors"):
            with open(path, "a") as file:
                file.write(f"{len(content)}\n")
        return content

    Store.read = counted  # type: ignore[method-assign]


def _die_after(step: int) -> None:
    """Have this process killed after a step, once what it uploads is written: a checkpoint that is due is there."""
    from job.saving import Saver

    after_step = Saver.after_step

    def last(self: Saver, progress: Any, batch: Any) -> None:
        self.uploads.wait(60)  # or the one that is due would be put off for one that is being written
        after_step(self, progress, batch)
        if progress.step == step:
            self.uploads.wait(60)
            if self.world.rank:
                time.sleep(1)  # the first rank publishes for all, and the others reach each other through it
            os.kill(os.getpid(), signal.SIGKILL)

    Saver.after_step = last  # type: ignore[method-assign]


def _lose(steps: set[int]) -> None:
    """Have the losses of these steps come out as NaN, as a row at times does to a model."""
    from job.engine import Engine

    train_step, loss_sum, now = Engine.train_step, Engine._loss_sum, [0]

    def counted(self: Engine, batch: Any, *arguments: Any) -> Any:
        now[0] = batch.step + 1
        try:
            return train_step(self, batch, *arguments)
        finally:
            now[0] = 0

    Engine.train_step = counted  # type: ignore[method-assign]
    Engine._loss_sum = lambda self, one: loss_sum(self, one) * (float("nan") if now[0] in steps else 1.0)  # type: ignore[method-assign]


def _no_link(*paths: object) -> None:
    """As on many file servers."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


def _draw() -> None:
    """Have each step draw from the generators that are everybody's, as a model's or a user's code may."""
    import random

    import numpy
    import torch

    from job.engine import Engine

    train_step = Engine.train_step

    def drawing(self: Engine, *arguments: Any) -> Any:
        random.random(), numpy.random.rand(), torch.rand(())
        return train_step(self, *arguments)

    Engine.train_step = drawing  # type: ignore[method-assign]


def _fail_storage(here: bool) -> None:
    """Have this rank's parts of checkpoints refused, as by a file server that one host cannot reach."""
    from job.checkpoint import Checkpoints

    def failing(self: Checkpoints, *arguments: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    if here:
        Checkpoints.write = failing  # type: ignore[method-assign]


def _die_early() -> None:
    """Have this rank killed when it looks for the model."""
    from job import train

    train.fetch = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
