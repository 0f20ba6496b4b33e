"""Who hears about the progress: the console and metrics.jsonl. A new sink is one class with these three methods."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from job.store import Store
from job.uploads import passes

Metrics = Mapping[str, float]
Put = Callable[[str, Callable[[], object], Store], None]
METRICS = "metrics.jsonl"
PARTS = "metrics-parts"


class Sink(Protocol):
    """Gets each row of metrics: training rows have `loss`, evaluation rows `eval_loss`; both have `step`."""

    def start(self, run_name: str, steps: int) -> None:
        """The run begins and will take so many steps."""

    def row(self, row: Metrics) -> None:
        """One row of metrics."""

    def close(self) -> None:
        """No more rows."""


class ConsoleSink:
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
        every_steps: steps between plain lines.
    """

    def __init__(self, every_steps: int = 1, console: Console | None = None):
        # a log file gets plain lines even where FORCE_COLOR, as CI systems set it, would have rich see a terminal
        self.console = console or Console(file=sys.stderr, force_terminal=sys.stderr.isatty())
        self.every_steps = every_steps
        self.bar: Progress | None = None
        self.steps, self.begun, self.first = 0, 0.0, 0

    def start(self, run_name: str, steps: int) -> None:
        self.steps = steps
        if self.console.is_interactive:
            name, said = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[said]"))
            columns = (name, BarColumn(), MofNCompleteColumn(), said, TimeElapsedColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(run_name, total=steps, said="")
            self.bar.start()

    def row(self, row: Metrics) -> None:
        step = int(row["step"])
        if "eval_loss" in row:
            self._print(f"step {step}: evaluation loss {row['eval_loss']:.4f}")
            return
        if not self.begun:
            self.begun, self.first = time.monotonic(), step
        said = "not finite, left out  " if row.get("left_out") else ""
        said += f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tok/s{self._left(step)}"
        if self.bar:
            self.bar.update(self.task, completed=step, said=said)
        elif step % self.every_steps == 0 or step == self.steps:
            self._print(f"step {step}/{self.steps}  {said}  lr {row['learning_rate']:.2e}")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()

    def _print(self, line: str) -> None:
        with suppress(OSError):  # a terminal that was closed ends no run
            self.console.print(line, highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        done = step - self.first
        if not done:
            return ""
        seconds = round((time.monotonic() - self.begun) / done * (self.steps - step))
        return f"  {seconds // 60}:{seconds % 60:02d} left"


class PipeSink:
    """Rows to the process that started this one and reports them elsewhere: a line of JSON each, with the step of the
    newest complete checkpoint.

    Args:
        number: the file descriptor to write to, which is closed at the end.
        checkpoint: gives that step.
    """

    def __init__(self, number: int, checkpoint: Callable[[], int]):
        self.number, self.checkpoint, self.step = number, checkpoint, 0

    def start(self, run_name: str, steps: int) -> None:
        pass

    def row(self, row: Metrics) -> None:
        self.step = int(row["step"])
        line = json.dumps({**row, "checkpoint": self.checkpoint()}) + "\n"
        with suppress(OSError):  # nobody listens any more, which ends no run
            os.write(self.number, line.encode())

    def close(self) -> None:
        if self.step:
            self.row({"step": self.step})
        with suppress(OSError):
            os.close(self.number)


class LoadingBar:
    """How much of the base has been read: a bar on a terminal, elsewhere a line each tenth of a large one.

    Args:
        total: bytes that will be read.
        shown: false on the ranks that do not speak.
    """

    LARGE = 1 << 30

    def __init__(self, total: int, shown: bool, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, force_terminal=sys.stderr.isatty())
        self.total, self.shown, self.done, self.begun = total, shown, 0, time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
        if self.shown and self.console.is_interactive:
            columns = ("reading the base", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, count: int) -> None:
        """So many more bytes have come."""
        before, self.done = self.done, self.done + count
        if self.bar:
            self.bar.update(self.task, completed=self.done)
        elif self.shown and self.total >= self.LARGE and before * 10 // self.total < self.done * 10 // self.total:
            speed = self.done / 1e6 / max(time.monotonic() - self.begun, 1e-3)
            said = f"read {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {speed:,.0f} MB/s"
            self.console.print(said, highlight=False, soft_wrap=True)


class JsonlSink:
    """metrics.jsonl under output.url. Storage that cannot append gets parts, which are joined at the end.

    Args:
        store: the run's folder.
        put: has something written in the background: (what, act, store).
        kept: lines that are there already, of a run that is continued.
        part_rows, part_s: a part is written after so many rows or seconds.
    """

    def __init__(
        self, store: Store, put: Put, kept: Sequence[bytes] = (), part_rows: int = 100, part_s: float = 60
    ) -> None:
        self.store, self.put, self.part_rows, self.part_s = store, put, part_rows, part_s
        self.parts = store.child(PARTS)
        self.lines: list[bytes] = list(kept)
        self.waiting: list[bytes] = []
        self.written = time.monotonic()

    def start(self, run_name: str, steps: int) -> None:
        self.written = time.monotonic()

    def row(self, row: Metrics) -> None:
        line = json.dumps({name: _finite(value) for name, value in row.items()}).encode() + b"\n"
        self.waiting.append(line)
        if self.store.is_local:
            self._append()
            return
        self.lines.append(line)
        if len(self.waiting) >= self.part_rows or time.monotonic() - self.written > self.part_s:
            self.flush()

    def flush(self) -> None:
        """Have all rows so far written."""
        if not self.waiting:
            return
        if self.store.is_local:
            self._append()
            return
        name, content = f"part-{len(self.lines):08d}.jsonl", b"".join(self.waiting)
        self.put("rows of metrics", lambda: self.parts.write(name, content), self.store)
        self.waiting, self.written = [], time.monotonic()

    def close(self) -> None:
        self.flush()
        if self.store.is_local and self.waiting:  # the disk is full
            content = b"".join(self.waiting)
            self.put("rows of metrics", lambda: self.store.append(METRICS, content), self.store)
        if not self.store.is_local and self.lines:
            self.put("rows of metrics", self._join, self.store)

    def _append(self) -> None:
        try:
            self.store.append(METRICS, b"".join(self.waiting))
        except OSError as fault:
            if not passes(fault):
                raise
            return  # a full disk, a file server that is away: the rows wait
        self.waiting = []

    def _join(self) -> None:
        self.store.write(METRICS, b"".join(self.lines))
        for name in self.parts.names():
            self.parts.remove(name, missing_ok=True)


def forget_metrics(store: Store) -> None:
    """Remove metrics.jsonl and its parts, where there are any."""
    parts = store.child(PARTS)
    for name in parts.names():
        parts.remove(name, missing_ok=True)
    store.remove(METRICS, missing_ok=True)


def cut_metrics(store: Store, step: int) -> list[bytes]:
    """Leave of metrics.jsonl, joined with its parts, the lines up to a step; gives them back, one a row."""
    parts = store.child(PARTS)
    names = parts.names()
    lines: dict[tuple[int, bool], bytes] = {}
    for line in _everything(store, parts, names).splitlines(keepends=True):
        try:
            row = json.loads(line)
            place = int(row["step"]), "eval_loss" in row
        except (ValueError, KeyError, TypeError):
            continue  # torn when the run was killed
        if place[0] <= step and line.endswith(b"\n"):
            lines.setdefault(place, line)  # a run killed between joining and removing parts has rows in both
    kept = list(lines.values())
    store.write(METRICS, b"".join(kept))
    for name in names:
        parts.remove(name, missing_ok=True)
    return kept


def latest_step(store: Store) -> int:
    """The last step that metrics.jsonl or its parts tell of; 0 when there is none."""
    parts = store.child(PARTS)
    found = re.findall(rb'"step": (\d+)', _everything(store, parts, parts.names()))  # a torn last line counts too
    return max(map(int, found), default=0)


def _everything(store: Store, parts: Store, names: Sequence[str]) -> bytes:
    joined = store.read(METRICS) if store.exists(METRICS) else b""
    return joined + b"".join(parts.read(name) for name in names)


def read_metrics(store: Store) -> list[dict[str, float]]:
    """All rows of metrics.jsonl, in order; empty when there is none. What was not finite is NaN."""
    if not store.exists(METRICS):
        return []
    rows = [json.loads(line) for line in store.read(METRICS).splitlines() if line.strip()]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def evaluations(rows: Sequence[Metrics]) -> list[tuple[int, float]]:
    """(step, evaluation loss) of the evaluation rows."""
    return [(int(row["step"]), row["eval_loss"]) for row in rows if "eval_loss" in row]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity
