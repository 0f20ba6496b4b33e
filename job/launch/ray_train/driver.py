"""A run on a Ray cluster, from inside it: Ray Train starts the workers, and starts them again when they are lost; what
the run recorded says what becomes of it."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import ray.train
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import cloudpickle
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from job.config import RunConfig
from job.errors import InputError, Interrupted, JobError
from job.launch.blame import first_failure
from job.launch.outcome import Outcome, outcome
from job.launch.ray_train import worker
from job.launch.ray_train.request import headline
from job.launch.ray_train.shape import Node, Shape, Wanted, missing, shape_of
from job.launch.slurm.request import address
from job.lease import STOP_KEY, held_by
from job.run_folder import RAY, RunFolder, Status
from job.store import Store

SETTINGS = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # what Ray's dashboard says of runs
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
KNOCK_S = 10.0
STARTS = 1000
"""Starts of workers that one fit may take, for numbering."""
SECOND_SIGNAL = 130

Say = Callable[[str], None]


def start(config: RunConfig, text: str, words: Sequence[str], wanted: Wanted, say: Say) -> int:
    """Train on the workers of the cluster that this process belongs to; the exit code.

    Args:
        config: the settings that the run file `text` and `words` come to.

    Raises:
        InputError: settings or output folder are wrong, there is no cluster, or it cannot hold the run.
        Interrupted: somebody asked to stop; the state is written.
        JobError: the run failed.
    """
    say(headline(address(config.output.url)))
    run = RunFolder(config)
    if run.already_finished():
        say(f"This run is finished already ({run.status.step if run.status else 0} steps): {run.store.url}")
        return 0
    folder = Path.cwd()
    _connect()
    os.chdir(folder)  # Ray may have unpacked the working folder anew, in place of the one where this process is
    try:
        nodes = _nodes()
        shape = shape_of(nodes, config.parallel.processes, wanted.nodes, wanted.gpus_per_node)
        say(f"{shape} on Ray; they may take {wanted.wait_minutes:g} min to come")
        found = _Run(config, text, tuple(words), shape, wanted.wait_minutes, say).to_the_end()
    finally:
        ray.shutdown()
    if found.verdict == "done":
        say(f"{found.why}; adapter: {run.store.url}/adapter")
        return found.code
    raise {2: InputError, Interrupted.exit_code: Interrupted}.get(found.code, JobError)(f"{run.store.url}: {found.why}")


def _nodes() -> list[Node]:
    return Node.all_of(ray.nodes())  # type: ignore[no-untyped-call]


def _connect() -> None:
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    try:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(address="auto", logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, RayError) as fault:  # ValueError: a malformed RAY_ADDRESS
        said = next(iter(str(fault).splitlines()), type(fault).__name__)
        raise InputError(
            f"no Ray cluster can be joined from here ({said}). Start it with ray start --head, hand the command to one "
            "with ray job submit, or use qlora submit ray CONFIG --address URL. A cluster that was started with a "
            "token wants it here too: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from fault
    cloudpickle.register_pickle_by_value(worker)  # type: ignore[no-untyped-call]


def _knock(address: str) -> None:
    """Ray itself tries for minutes to reach a head that is not there.

    Raises:
        OSError: nobody listens at host:port.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


class _Run:
    """The fits of one run: another follows when the last one was cut off and had got further."""

    def __init__(
        self, config: RunConfig, text: str, words: tuple[str, ...], shape: Shape, wait_minutes: float, say: Say
    ):
        self.config, self.shape, self.wait_minutes, self.say = config, shape, wait_minutes, say
        board: Any = ray.remote(worker.Board)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = board.options(num_cpus=0, scheduling_strategy=here).remote()  # it dies with this process alone
        self.job = f"ray-{uuid4().hex}"
        url = Store(config.output.url).root if "://" not in config.output.url else config.output.url
        self.asked = worker.Asked(text, words, str(Path.cwd()), url, self.job, self.board, own_path(os.environ))
        self.name = f"{config.run_name}-{datetime.now():%Y%m%d-%H%M%S}"
        self.fits = self.signals = 0

    def to_the_end(self) -> Outcome:
        """Fit until there is nothing to go on with."""
        while True:
            before = RunFolder(self.config).status
            fault = self._attended(self._fit)
            found, after = self._judge(before, fault)
            further = after is not None and after.checkpoint > (before.checkpoint if before else 0)
            if found.verdict != "again" or self.signals or not (further or found.code == Interrupted.exit_code):
                return found
            self.say(f"{found.why}: the workers are started again")

    def _fit(self) -> None:
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(60 * self.wait_minutes)
        trainer = TorchTrainer(
            worker.work,
            train_loop_config={"asked": self.asked},
            torch_config=worker.Meeting(starts=self.fits * STARTS),
            scaling_config=ScalingConfig(
                num_workers=self.shape.workers,
                use_gpu=bool(self.shape.gpus),
                resources_per_worker=self.shape.resources,
                placement_strategy="PACK",
            ),
            run_config=RayRunConfig(
                name=self.name,
                **self._storage(),
                failure_config=_failures(self.config.checkpoint.max_restarts),
                checkpoint_config=CheckpointConfig(num_to_keep=self.config.checkpoint.keep),
            ),
        )
        self.fits += 1
        trainer.fit()

    def _storage(self) -> dict[str, Any]:
        """Where Ray keeps what it writes itself: beside the run."""
        store = Store(self.config.output.url, self.config.storage).child(RAY)
        if store.is_local:
            return {"storage_path": store.root}
        return {"storage_path": store.root, "storage_filesystem": PyFileSystem(FSSpecHandler(store.fs))}

    def _attended(self, fit: Callable[[], None]) -> Exception | None:
        """Run it in a thread, for Ray Train ends its workers at the first Ctrl-C of a main thread; what it raised."""
        faults: list[Exception] = []

        def kept() -> None:
            try:
                fit()
            except Exception as fault:
                faults.append(fault)

        thread = threading.Thread(target=kept, name="fit", daemon=True)
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            thread.start()
            while thread.is_alive():
                thread.join(0.5)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return faults[0] if faults else None

    def _on_signal(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.signals > 1 and number == signal.SIGINT:
            os._exit(SECOND_SIGNAL)  # Ray ends what this job has started
        self.say(f"{signal.Signals(number).name}: the run is asked to save and stop")
        Store(self.config.output.url, self.config.storage).write(STOP_KEY, signal.Signals(number).name.encode())

    def _judge(self, before: Status | None, fault: Exception | None) -> tuple[Outcome, Status | None]:
        """What the run recorded, beside how its ranks and Ray's fit ended."""
        run = RunFolder(self.config)
        status, holder = run.status, held_by(run.store)
        ours = holder is None or holder.job_id == self.job
        this_start = ours and status is not None and (before is None or status.updated != before.updated)
        ranks: dict[int, worker.Ended] = ray.get(self.board.newest.remote())
        logs: dict[str, str] = {}
        for rank in sorted(ranks):
            logs[ranks[rank].node] = "\n".join([*logs.get(ranks[rank].node, "").splitlines(), *ranks[rank].lines])
        failure = first_failure(logs)
        cause = failure.lines[-1] if failure and not failure.follows else ""
        code = max((one.code for one in ranks.values()), default=1)
        unplaced = "startup timed out" in _words_of(fault)  # at the start, or again when a node was lost
        if fault is not None and (unplaced or not ranks):
            found, failure = self._never_started(fault, unplaced), None
        else:
            found = outcome(status, this_start, before.step if before else 0, False, code, cause)
        if found.verdict == "failed":
            if status and this_start:
                run.abandon(found.why, datetime.fromisoformat(status.updated))
            if failure:
                self.say(f"what failed first, on {failure.node}:")
                for line in failure.lines:
                    self.say(f"[{failure.rank}] {line}")
        return found, status

    def _never_started(self, fault: Exception, unplaced: bool) -> Outcome:
        if unplaced:
            nodes, free = _nodes(), ray.available_resources()  # type: ignore[no-untyped-call]
            return Outcome("failed", missing(self.shape, nodes, free, self.wait_minutes), JobError.exit_code)
        said = next((line for line in reversed(_words_of(fault).splitlines()) if line.strip()), type(fault).__name__)
        return Outcome("failed", f"no rank could be started: {said.strip()}", JobError.exit_code)


def _words_of(fault: Exception | None) -> str:
    """What it says, and its cause."""
    return f"{fault} {fault.__cause__ or ''}".strip() if fault else ""


def _failures(most: int) -> FailureConfig:
    """Lost workers are started again so often; workers that find no place within the time are the end."""
    options: dict[str, Any] = {"max_failures": most, "controller_failure_limit": 0}  # the second is not in its types
    return FailureConfig(**options)


def own_path(env: os._Environ[str] | dict[str, str]) -> str | None:
    """PYTHONPATH for ranks: without the working folder that was uploaded with the job, which Ray puts in front and may
    hold another version of the package than this image; as it is where the package is in that folder alone."""
    path = env.get("PYTHONPATH")
    if path is None:
        return None
    here = Path.cwd().resolve()
    kept = [part for part in path.split(os.pathsep) if part and Path(part).resolve() != here]
    stripped = os.pathsep.join(kept) or None
    clean = {name: value for name, value in env.items() if name != "PYTHONPATH"}
    if stripped:
        clean["PYTHONPATH"] = stripped
    with suppress(OSError):
        probe = [sys.executable, "-P", "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('job') is None)"]
        if subprocess.run(probe, env=clean, cwd="/", check=False).returncode == 0:  # noqa: S603 - this Python
            return stripped
    return path
