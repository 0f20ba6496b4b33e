"""What a job wrote: what failed first, then the batch log and each node's, to the end of the job if asked."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from job.config import RunConfig
from job.errors import InputError
from job.launch.blame import BATCH, Failure, first_failure
from job.launch.slurm.jobs import Job, show
from job.launch.slurm.watch import forgotten, job_lines, jobs_of, run_of

Say = Callable[[str], None]
LOOK_S, ASK_S = 1.0, 5.0
"""Seconds between two looks at the files, and between two questions to SLURM, whose controller serves everybody."""


class Files:
    """The logs of a job, and what of them was read already.

    Args:
        job: whose logs.
        node: look at this node's log alone.
    """

    def __init__(self, job: Job, node: str | None = None):
        self.job, self.node = job, node
        self._read: dict[Path, int] = {}

    def paths(self) -> dict[str, Path]:
        """The logs that are there, by the name of their node; the batch log first."""
        batch = {BATCH: Path(self.job.log)} if self.job.log and Path(self.job.log).is_file() else {}
        folder = self.job.own_folder
        nodes = {path.stem: path for path in sorted(folder.glob("*.log"))} if folder.is_dir() else {}
        everything = {**batch, **nodes}
        return {name: path for name, path in everything.items() if self.node in (None, name)}

    def failure(self) -> Failure | None:
        """What failed first, by all logs that are there."""
        return first_failure({name: path.read_text(errors="replace") for name, path in self.paths().items()})

    def news(self, all_of_it: bool = False) -> Iterator[str]:
        """Whole lines that were written since the last look, each behind its node's name.

        Args:
            all_of_it: take a last line without its end, too.
        """
        for name, path in self.paths().items():
            done = self._read.get(path, 0)
            if path.stat().st_size < done:  # written anew by a job that was started again
                done = 0
            with open(path, "rb") as file:
                file.seek(done)
                content = file.read()
            if not all_of_it:
                content = content[: content.rfind(b"\n") + 1]
            self._read[path] = done + len(content)
            for line in content.decode(errors="replace").splitlines():
                yield f"{name} | {line}"


def print_logs(config: RunConfig | None, job_id: str | None, follow: bool, node: str | None, put: Say, say: Say) -> int:
    """Print the logs of a job; the exit code: when followed, 0 if its run finished, else 1.

    Args:
        put: gets the lines of the logs.
        say: hears how the job stands.

    Raises:
        InputError: there is no such job, or it has no logs yet, or none of that node.
    """
    job = _job_of(config, job_id)
    files = Files(job, node)
    if not files.paths() and not (follow and job.active):
        raise _nothing(job, node)
    _tell_failure(files, put)
    for line in files.news(all_of_it=not job.active):
        put(line)
    return _follow(job, files, config, put, say) if follow else 0


def _follow(job: Job, files: Files, config: RunConfig | None, put: Say, say: Say) -> int:
    told, told_failure = "", files.failure() is not None
    asked = 0.0
    while job.active:
        if time.monotonic() - asked > ASK_S:
            asked = time.monotonic()
            job = next((now for now in show(job.id) if now.id == job.id), forgotten(job.own_folder))
            if job.queued and (now_waits := job_lines(job)[0]) != told:
                told = now_waits
                say(told)
        for line in files.news():
            put(line)
        if job.active:
            time.sleep(LOOK_S)
    for line in files.news(all_of_it=True):
        put(line)
    if not told_failure:
        _tell_failure(files, put)
    run = run_of(job, config)
    for line in [*(run.lines() if run else []), *job_lines(job)]:
        say(line)
    if run is None or run.status is None:
        return 0 if job.state == "COMPLETED" else 1
    return 0 if run.finished else 1


def _tell_failure(files: Files, put: Say) -> None:
    failure = files.failure()
    if failure is None:
        return
    who = "the batch script" if failure.rank == BATCH else f"rank {failure.rank} on {failure.node}"
    put(f"failed first: {who}")
    for line in failure.lines:
        put(f"  {line}")
    put("")


def _job_of(config: RunConfig | None, job_id: str | None) -> Job:
    """The one job whose logs are wanted.

    Raises:
        InputError: there is none, or there are several.
    """
    jobs = jobs_of(config, job_id)
    if not jobs and config is not None:
        raise InputError(
            f"there is no job of output.url {config.output.url}, neither in SLURM nor as a folder qlora-* here. "
            "Go to the folder that it was submitted from, or submit it with qlora submit slurm"
        )
    begun = [job for job in jobs if not job.queued] or jobs
    if len(begun) > 1:
        ids = ", ".join(job.id for job in begun)
        raise InputError(f"these are several jobs ({ids}). Choose one with --job")
    if "[" in begun[0].id:
        raise InputError(f"job {begun[0].id} is an array, none of whose tasks has begun. See qlora status")
    return begun[0]


def _nothing(job: Job, node: str | None) -> InputError:
    if node is not None:
        others = ", ".join(Files(job).paths()) or "none yet"
        return InputError(f"--node {node}: job {job.id} has no log of it. There are: {others}")
    return InputError(
        f"job {job.id} is {job.state} and has written nothing yet, neither {job.log or 'a batch log'} nor "
        f"{job.own_folder}/*.log. See qlora status; -f waits for it"
    )
