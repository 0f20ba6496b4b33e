"""What Ray Train runs on each worker: one rank, as a process of its own, and what it has to report.

Ray calls training functions in a thread of its worker. A rank needs a main thread for signals and a process that may
die alone, so it is `qlora train` in a child, told by environment variables where it is, as under any launcher.

Ray sends this module by value: a working folder that was uploaded with a job may hold another version of the package,
and comes first on its workers' path. So it imports nothing of the package.
"""

import ctypes
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.util.metrics import Gauge

LOOK_S = 0.5
LAST_WORDS_S = 10.0
"""How long a rank may go on when another one has failed: it mostly notices by itself."""
LAST_LINES = 200
PARENT_DIED = 1
"""prctl's PR_SET_PDEATHSIG: the rank is killed when its worker is, however that happens."""
INTERRUPTED = 75


@dataclass(frozen=True)
class Asked:
    """What the driver wants of each rank.

    Args:
        text: the run file.
        words: settings behind it.
        folder: where the driver was started; data and model may be named from there.
        url: output.url.
        job: the run's id among jobs, for its lease.
        board: the actor that ranks and driver share.
        path: PYTHONPATH of ranks, None to leave it out.
    """

    text: str
    words: tuple[str, ...]
    folder: str
    url: str
    job: str
    board: Any
    path: str | None


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its node, exit code (negative: by that signal) and last lines, each behind [rank]."""

    node: str
    code: int
    lines: tuple[str, ...] = ()


class Board:
    """An actor: how often the ranks of a start are to report, for Ray wants that of all of them equally often, and how
    they ended."""

    def __init__(self) -> None:
        self.reports: dict[str, tuple[int, bool]] = {}
        self.ranks: dict[str, dict[int, Ended]] = {}

    def announce(self, start: str, count: int, over: bool) -> None:
        """The first rank reports for the `count`-th time; `over`: and no more."""
        self.reports[start] = (count, over)

    def announced(self, start: str) -> tuple[int, bool]:
        """What the first rank said last."""
        return self.reports.get(start, (0, False))

    def end(self, start: str, rank: int, ended: Ended) -> None:
        """A rank ended."""
        self.ranks.setdefault(start, {})[rank] = ended

    def failed(self, start: str) -> bool:
        """Whether a rank of this start failed."""
        return any(ended.code not in (0, INTERRUPTED) for ended in self.ranks.get(start, {}).values())

    def newest(self) -> dict[int, Ended]:
        """How the ranks of the newest start that has any ended."""
        return next(reversed(self.ranks.values()), {})


@dataclass
class Meeting(TorchConfig):
    """Says where the ranks meet, and opens no process group in Ray's own processes, nor a GPU.

    Args:
        starts: how often the workers were started before.
    """

    starts: int = 0
    counted: list[int] = field(default_factory=lambda: [0])

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend of Ray Train's."""
        return _Meeting

    @property
    def train_func_context(self) -> Any:
        """Around the training function: nothing."""
        return nullcontext


class _Meeting(Backend):
    share_cuda_visible_devices = True  # a rank sees the GPUs of its whole node, and takes the one of its local rank

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, _address_and_port)
        backend_config.counted[0] += 1
        attempt = backend_config.starts + backend_config.counted[0]
        worker_group.execute(_set_variables, address, port, attempt)


def _address_and_port() -> tuple[str, int]:
    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        return address, int(probe.getsockname()[1])


def _set_variables(address: str, port: int, attempt: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), QLORA_JOB_ATTEMPT=str(attempt))


def work(config: dict[str, Any]) -> None:
    """Run one rank to its end, reporting what it does.

    Args:
        config: `asked`, what the driver wants.

    Returns when it ended by itself, whatever its exit code: the driver decides what that means, by what the run
    recorded.

    Raises:
        RuntimeError: it was killed, or could not be started; Ray starts all workers again.
    """
    asked, context = config["asked"], ray.train.get_context()
    with tempfile.TemporaryDirectory(prefix="qlora-") as folder:
        rank = _Rank(asked, context, Path(folder))
        if rank.number:
            _follow(rank)
        else:
            _lead(rank)
    if rank.code < 0:
        raise RuntimeError(f"rank {rank.number} was ended by {signal.Signals(-rank.code).name}")


class _Rank:
    """The process of one rank; its lines go to this worker's own output, behind [rank]."""

    def __init__(self, asked: Asked, context: Any, folder: Path):
        self.asked, self.number, self.folder = asked, context.get_world_rank(), folder
        self.start = os.environ["QLORA_JOB_ATTEMPT"]
        if not Path(asked.folder).is_dir():
            raise RuntimeError(
                f"{socket.gethostname()} has no folder {asked.folder}, from which the job was started. Start it from "
                "one that all nodes share, or with --working-dir"
            )
        run_file = folder / "run.yaml"
        run_file.write_text(asked.text, encoding="utf-8")
        reader, writer = os.pipe()
        ranks = {"RANK": context.get_world_rank(), "WORLD_SIZE": context.get_world_size()}
        ranks |= {"LOCAL_RANK": context.get_local_rank(), "LOCAL_WORLD_SIZE": context.get_local_world_size()}
        env = {**os.environ, **{name: str(value) for name, value in ranks.items()}}
        env.update(QLORA_JOB_ID=asked.job, QLORA_ROWS_FD=str(writer))
        env["PYTHONSAFEPATH"] = "1"  # or a folder named job there would be the package
        env.pop("PYTHONPATH", None)
        if asked.path is not None:
            env["PYTHONPATH"] = asked.path
        self.process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-u", "-m", "job", "train", str(run_file), *asked.words],
            cwd=asked.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            preexec_fn=_die_with_parent,
        )
        os.close(writer)
        self.rows: queue.Queue[dict[str, Any]] = queue.Queue()
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.readers = [
            threading.Thread(target=self._read_rows, args=(reader,), daemon=True),
            threading.Thread(target=self._read_lines, daemon=True),
        ]
        for thread in self.readers:
            thread.start()
        self.code, self.give_up_at = 0, float("inf")

    def ended(self) -> bool:
        """Whether it has, and then everything that it wrote is here; a rank whose peer has failed is given a while."""
        if self.process.poll() is None:
            if self.give_up_at == float("inf") and ray.get(self.asked.board.failed.remote(self.start)):
                self.give_up_at = time.monotonic() + LAST_WORDS_S
            if time.monotonic() < self.give_up_at:
                return False
            self.process.kill()
            self.code = 1  # not its own fault
        for thread in self.readers:
            thread.join(LAST_WORDS_S)  # processes that it leaves behind may hold its pipes
        self.code = self.code or self.process.wait()
        ended = Ended(socket.gethostname(), self.code, tuple(self.last))
        ray.get(self.asked.board.end.remote(self.start, self.number, ended))
        return True

    def _read_rows(self, reader: int) -> None:
        with open(reader, encoding="utf-8") as lines:
            for line in lines:
                self.rows.put(json.loads(line))

    def _read_lines(self) -> None:
        assert self.process.stdout
        for raw in self.process.stdout:
            line = f"[{self.number}] {raw.decode(errors='replace').rstrip()}"
            self.last.append(line)
            print(line, flush=True)


def _lead(rank: _Rank) -> None:
    """Report for the first rank: Ray takes a report about every two seconds, and rows may come faster."""
    board, reports, known = rank.asked.board, 0, 0
    gauges: dict[str, Gauge] = {}
    while True:
        over = rank.ended()
        row: dict[str, Any] = {}
        while not rank.rows.empty():
            row.update(rank.rows.get())
        if row:
            reports += 1
            ray.get(board.announce.remote(rank.start, reports, False))
            checkpoint = int(row.pop("checkpoint", known))
            _show({"left_out": 0, **row}, rank.asked.url, gauges)  # only steps that were say it
            _report(rank, row, checkpoint if checkpoint > known else None)
            known = max(known, checkpoint)
        if over:
            ray.get(board.announce.remote(rank.start, reports, True))
            return
        time.sleep(LOOK_S)


def _follow(rank: _Rank) -> None:
    """Report as often as the first rank does; a rank that was killed raises at once, and ends all."""
    reports, ended = 0, False
    while True:
        ended = ended or rank.ended()
        if ended and rank.code < 0:
            return
        announced, over = ray.get(rank.asked.board.announced.remote(rank.start))
        while reports < announced:
            reports += 1
            ray.train.report({})
        if ended and over:
            return
        time.sleep(LOOK_S)


def _show(row: dict[str, Any], url: str, known: dict[str, Gauge]) -> None:
    """The row among the metrics of Ray's nodes, where Prometheus and the dashboard's charts find it: ray_qlora_loss."""
    for name, value in row.items():
        if name not in known:
            known[name] = Gauge(f"qlora_{name}", tag_keys=("run",))
        known[name].set(value, {"run": url})


def _report(rank: _Rank, row: dict[str, Any], step: int | None) -> None:
    """A row of metrics; with a checkpoint that became complete, as a pointer to it: the run keeps its own, and Ray
    deletes what it calls a checkpoint as it likes."""
    if step is None:
        ray.train.report(row)
        return
    pointer = rank.folder / f"checkpoint-{step}"
    pointer.mkdir()
    content = {"url": f"{rank.asked.url.rstrip('/')}/checkpoints/step-{step:08d}", "step": step}
    (pointer / "checkpoint.json").write_text(json.dumps(content))
    ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(pointer))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
