"""Jobs of a Ray cluster, asked from outside: submitted, looked at, followed and ended through its job server."""

import asyncio
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from job.config import RunConfig
from job.errors import InputError, JobError
from job.launch.looking import look_first
from job.launch.ray_train.known import known, output_of
from job.launch.ray_train.request import OUTPUT, Request
from job.launch.ray_train.shape import Wanted
from job.launch.slurm.request import address
from job.launch.slurm.watch import Run, read_run
from job.launch.stopping import WHAT_THEN, ask_to_stop
from job.lease import STOP_KEY
from job.world import ranks_on

PATIENCE_S = 60.0
ACTIVE = (JobStatus.PENDING, JobStatus.RUNNING)
SECRETS = (".env", ".env.*")
"""Files that stay here when a folder goes with a job, in any folder of it, as .gitignore would name them."""

Say = Callable[[str], None]


def submit(config: RunConfig, request: Request, wanted: Wanted, say: Say) -> str:
    """Look at the run, then send it; the job's id.

    Args:
        say: hears that the output cannot be looked at from here.

    Raises:
        InputError: the server cannot be reached or refuses, or a job of this output runs already.
    """
    ranks = ranks_on(config.parallel.processes, wanted.gpus_per_node) if wanted.nodes and wanted.gpus_per_node else 0
    look_first(config, wanted.nodes or 1, ranks, "the cluster does that, with keys of its own", say)
    with _server(request.server) as client, tempfile.TemporaryDirectory() as made:
        for job in _jobs(client, request.output, ACTIVE):
            raise InputError(
                f"job {job.submission_id} of {request.output} is {job.status.value} already, and two runs of one "
                "output.url exclude each other. End it with qlora cancel CONFIG --on ray"
            )
        for name, content in request.files.items():
            Path(made, name).write_text(content, encoding="utf-8")
        return _send(client, request, request.folder or made)


def _send(client: JobSubmissionClient, request: Request, folder: str) -> str:
    """Submit it; a cluster that has only just started is asked for a while."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=request.name,
                    runtime_env={"working_dir": folder, "excludes": list(SECRETS)},
                    metadata={OUTPUT: request.output},
                )
            )
        except RuntimeError as fault:
            if "No available agent" not in str(fault) or time.monotonic() > end:
                raise
        time.sleep(1)


def lines_of(config: RunConfig | None, job_id: str | None, server: str) -> tuple[list[str], list[dict[str, Any]]]:
    """How a run stands, or each of the cluster's runs: for people, and for programs.

    Raises:
        InputError: the server cannot be reached, or knows no such job.
    """
    said: list[str] = []
    rows: list[dict[str, Any]] = []
    with _server(server) as client:
        jobs = _asked(client, config, job_id) if config or job_id else _jobs(client, None)
    for job in jobs:
        run = _run_of(job, config)
        said += [*(run.lines() if run else []), _line(job)]
        rows.append({"run": asdict(run) if run else None, "job": job.dict()})
    if not jobs and config is not None:
        run = read_run(address(config.output.url), config)
        said, rows = [*run.lines(), f"no job of it on {server}"], [{"run": asdict(run), "job": None}]
    return said, rows


def print_logs(config: RunConfig | None, job_id: str | None, follow: bool, server: str, put: Say, say: Say) -> int:
    """Print what a job wrote; the exit code: when followed, 0 if its run finished, else 1.

    Raises:
        InputError: there is no such job.
    """
    with _server(server) as client:
        job = _newest(_asked(client, config, job_id), config, server)
        if not follow:
            for line in client.get_job_logs(str(job.submission_id)).splitlines():
                put(line)
            return 0

        async def to_the_end() -> None:
            async for text in client.tail_job_logs(str(job.submission_id)):
                for line in text.splitlines():
                    put(line)

        asyncio.run(to_the_end())
        (job,) = asyncio.run(known(client, [client.get_job_info(str(job.submission_id))]))
    run = _run_of(job, config)
    for line in [*(run.lines() if run else []), _line(job)]:
        say(line)
    finished = run.finished if run else job.status == JobStatus.SUCCEEDED
    return 0 if finished else 1


def cancel(config: RunConfig | None, job_id: str | None, now: bool, server: str, say: Say) -> None:
    """Ask a run to save and stop; or end its job at once.

    Raises:
        InputError: none runs.
        OutputError: the run cannot be asked, since its output folder cannot be written.
    """
    with _server(server) as client:
        job = _newest([one for one in _asked(client, config, job_id) if one.status in ACTIVE], config, server)
        url = output_of(job) or (address(config.output.url) if config else "")
        if now or job.status == JobStatus.PENDING or not url:
            client.stop_job(str(job.submission_id))
            say(f"job {job.submission_id} is ended; what it did since its last checkpoint is lost")
            return
    ask_to_stop(url, config.storage if config else None)
    say(f"job {job.submission_id} was asked to save and stop: {url}/{STOP_KEY} is there now. {WHAT_THEN}")


@contextmanager
def _server(url: str) -> Iterator[JobSubmissionClient]:
    """The job server, whose errors are said in a sentence.

    Raises:
        InputError: it cannot be reached, or refuses.
        JobError: it fails.
    """
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # they would win over the address that was asked for
    try:
        yield JobSubmissionClient(url)
    except (JobError, SystemExit):
        raise
    except ConnectionError as fault:
        raise InputError(
            f"no Ray job server answers at {url}. Give its address with --address or RAY_API_SERVER_ADDRESS, such as "
            f"http://HEAD:8265; behind Kubernetes: kubectl port-forward service/HEAD 8265"
        ) from fault
    except (RuntimeError, ValueError, RayError) as fault:
        said = next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
        if re.search(r"\b40[13]\b|authenticat", str(fault), re.IGNORECASE):
            raise InputError(
                f"the Ray job server at {url} refuses you. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH, as for its cluster"
            ) from fault
        raise JobError(f"the Ray job server at {url}: {said}") from fault


def _jobs(
    client: JobSubmissionClient, output: str | None, states: Sequence[JobStatus] = tuple(JobStatus)
) -> list[JobDetails]:
    """The jobs of an output address, or of all runs, the newest first."""
    there = [job for job in client.list_jobs() if job.submission_id and job.status in states]
    of_runs = [job for job in asyncio.run(known(client, there)) if output_of(job) and output in (None, output_of(job))]
    return sorted(of_runs, key=lambda job: job.start_time or 0, reverse=True)


def _asked(client: JobSubmissionClient, config: RunConfig | None, job_id: str | None) -> list[JobDetails]:
    if job_id is not None:
        found = [job for job in client.list_jobs() if job_id in (job.submission_id, job.job_id)]
        if not found:
            raise InputError(f"--job {job_id}: the cluster knows no such job. qlora status --on ray lists its runs")
        return asyncio.run(known(client, found))
    if config is None:
        raise InputError("neither CONFIG nor --job was given, so there is no job to look for. Give one of them")
    return _jobs(client, address(config.output.url))[:1]


def _newest(jobs: Sequence[JobDetails], config: RunConfig | None, server: str) -> JobDetails:
    if not jobs:
        what = f"output.url {config.output.url}" if config else "this"
        raise InputError(f"no job of {what} waits or runs on {server}. qlora status --on ray lists its runs")
    return jobs[0]


def _run_of(job: JobDetails, config: RunConfig | None) -> Run | None:
    url = output_of(job)
    return read_run(url, config) if url else None


def _line(job: JobDetails) -> str:
    lines = [line for line in (job.message or "").splitlines() if line.strip()]
    said = f": {lines[-1]}" if lines and job.status not in (JobStatus.RUNNING, JobStatus.SUCCEEDED) else ""
    return f"job {job.submission_id}: {job.status.value}{said}"
