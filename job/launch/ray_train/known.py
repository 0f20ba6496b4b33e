"""Which jobs of a Ray cluster are runs, and of which output: by what they were sent with, or else by the first line of
their log."""

import asyncio
import re
from collections.abc import Iterable
from contextlib import aclosing

from aiohttp import ClientError
from ray.job_submission import JobDetails, JobSubmissionClient

from job.launch.ray_train.request import OUTPUT

WAIT_S = 15.0
"""A driver that has just been started says its first line after some seconds."""
MOST_LINES = 200
AT_ONCE = 16
_OURS = re.compile(r"\btrain\b.*--on[ =]ray\b", re.DOTALL)
_HEADLINE = re.compile(rf"^{OUTPUT}: (.+)$", re.MULTILINE)


def output_of(job: JobDetails) -> str | None:
    """The output address of a run; None for any other job, see `known`."""
    return (job.metadata or {}).get(OUTPUT)


async def known(client: JobSubmissionClient, jobs: Iterable[JobDetails]) -> list[JobDetails]:
    """The same jobs, each run's with its output address."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def ask(job: JobDetails) -> JobDetails:
        if output_of(job) or not job.submission_id or not _OURS.search(job.entrypoint or ""):
            return job
        async with turn:
            output = await _first_words(client, job)
        return job.copy(update={"metadata": {**(job.metadata or {}), OUTPUT: output}}) if output else job

    return list(await asyncio.gather(*map(ask, jobs)))


async def _first_words(client: JobSubmissionClient, job: JobDetails) -> str | None:
    """The output address in the first lines of its log; None where it wrote none, or its log is gone with its node."""
    try:
        async with asyncio.timeout(WAIT_S), aclosing(client.tail_job_logs(str(job.submission_id))) as log:  # type: ignore[type-var]
            text = ""
            async for more in log:
                text += more
                if found := _HEADLINE.search(text):
                    return found[1].strip()
                if text.count("\n") > MOST_LINES:
                    break
    except (TimeoutError, RuntimeError, OSError, ClientError):
        return None
    return None
