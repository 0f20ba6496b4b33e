"""What SLURM says about jobs: its words understood, and the jobs of a run found."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from job.errors import InputError, JobError
from job.launch.slurm.commands import Answer, ask, available
from job.launch.slurm.request import address, tag

QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
LIVE = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_REST_OF_LINE = "JobName|Command|WorkDir|StdErr|StdIn|StdOut|Comment|AdminComment|SystemComment"
_FIELD = re.compile(rf"({_REST_OF_LINE})=(.*)$|([A-Za-z][\w/:.]*)=(.*?)(?=\s+[A-Z][\w/:.]*=|\s*$)")
"""One field of `scontrol show job`: those that people write may hold anything and end their line."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array.

    Attributes:
        id: "17", or "15_1" for a task.
        nodes: as SLURM writes them, such as n[1-2]; empty before it has any.
        left: how long it may still run; None before it runs or without a limit.
        starts: when SLURM expects it to start, local time; empty when it says nothing.
        log: the batch log.
    """

    id: str
    name: str
    state: str
    reason: str = ""
    nodes: str = ""
    partition: str = ""
    account: str = ""
    left: timedelta | None = None
    starts: str = ""
    restarts: int = 0
    exit_code: str = ""
    folder: str = ""
    log: str = ""
    comment: str = ""

    @property
    def queued(self) -> bool:
        """Whether it waits."""
        return self.state in QUEUED

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.queued or self.state in LIVE

    @property
    def is_task(self) -> bool:
        """Whether it is a task of an array, or tasks of one that have not begun."""
        return "_" in self.id

    @property
    def own_folder(self) -> Path:
        """Where the job keeps its hostfile, node logs and job.json."""
        return Path(self.folder, f"qlora-{self.id}")

    @property
    def number(self) -> tuple[int, ...]:
        """For sorting: by job, then by task."""
        return tuple(map(int, re.findall(r"\d+", self.id)[:2]))

    def about(self) -> dict[str, Any]:
        """What job.json says; empty before the job wrote it."""
        return about(self.own_folder)


def about(folder: Path) -> dict[str, Any]:
    """A job folder's job.json; empty when there is none that can be read."""
    try:
        said = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def parse_show(text: str) -> list[Job]:
    """The jobs in the answer of `scontrol show job`."""
    return [_job(_fields(part)) for part in re.split(r"^(?=JobId=)", text, flags=re.MULTILINE) if part.strip()]


def _fields(text: str) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        for match in _FIELD.finditer(line):
            name, value = (match[1], match[2]) if match[1] else (match[3], match[4])
            found[name] = "" if value.strip() in ("(null)", "Unknown", "N/A") else value.strip()
    return found


def _job(fields: dict[str, str]) -> Job:
    array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId")
    limit, ran = duration(fields.get("TimeLimit", "")), duration(fields.get("RunTime", ""))
    state, reason = fields.get("JobState", ""), fields.get("Reason", "")
    several = task and not task.isdecimal()
    return Job(
        id=f"{array}_[{task}]" if several else f"{array}_{task}" if task else fields["JobId"],
        name=fields.get("JobName", ""),
        state=state,
        reason="" if reason == "None" else reason,
        nodes=fields.get("NodeList", ""),
        partition=fields.get("Partition", ""),
        account=fields.get("Account", ""),
        left=max(limit - ran, timedelta()) if state == "RUNNING" and limit is not None and ran is not None else None,
        starts=fields.get("StartTime", "") if state in QUEUED else "",
        restarts=int(fields.get("Restarts") or 0),
        exit_code=fields.get("ExitCode", ""),
        folder=fields.get("WorkDir", ""),
        log="" if several else fields.get("StdOut", ""),
        comment=fields.get("Comment", ""),
    )


def duration(text: str) -> timedelta | None:
    """SLURM's `[days-]hours:minutes:seconds` (or less of it); None for UNLIMITED and what is no time."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def parse_sacct(text: str) -> list[Job]:
    """The jobs in the answer of sacct (see `_remembered`), whose states may be `CANCELLED by 1000`."""
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == len(_SACCT) - 1]
    return [
        Job(
            id=row[0],
            name=row[1],
            state=row[2].split(" ")[0],
            exit_code=row[3],
            nodes=row[4].replace("None assigned", ""),
            partition=row[5],
            account=row[6],
            folder=row[7],
        )
        for row in rows
    ]


_SACCT = ("JobID", "JobName", "State", "ExitCode", "NodeList", "Partition", "Account", "WorkDir")


def show(job_id: str) -> list[Job]:
    """A job, or all tasks of an array, from the controller, else from accounting; empty when neither knows it.

    Raises:
        InputError: it is no job id, or this machine cannot talk to SLURM.
        JobError: SLURM does not answer.
    """
    if not re.fullmatch(r"\d+(_\d+)?", job_id):
        raise InputError(f"--job {job_id}: is no job id, expected a number such as 17, or 17_2 for a task of an array")
    answer = ask("scontrol", "show", "job", job_id)
    if answer.code == 0:
        return parse_show(answer.out)
    if "Invalid job id" not in answer.err:
        raise _silent("scontrol", answer)
    return _remembered(f"--jobs={job_id}")


def find(url: str) -> list[Job]:
    """The jobs of an output address: all that wait or run, else the newest that SLURM still knows. Of an array it is
    all its tasks.

    Args:
        url: see `request.address`.

    Raises:
        InputError: this machine cannot talk to SLURM.
        JobError: SLURM does not answer.
    """
    answer = ask("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%j")
    if answer.code:
        raise _silent("squeue", answer)
    jobs = [job for job in parse_queue(answer.out) if _of(job, url)]
    if not jobs:
        jobs = [job for job in _remembered("--starttime=now-30days") if _of(job, url)]
    chosen = [job for job in jobs if job.active] or _newest(jobs)
    known = {job.id.partition("_")[0]: job for job in chosen}
    return [whole for number, job in known.items() for whole in show(number) or [job]]


def parse_queue(text: str) -> list[Job]:
    """The jobs in the answer of squeue: id, state and name, which may hold anything."""
    rows = [line.split("|", 2) for line in text.splitlines() if line.count("|") >= 2]
    return [Job(id=row[0], state=row[1], name=row[2]) for row in rows]


def mine() -> list[Job]:
    """All of this user's jobs that qlora submitted and that wait or run."""
    answer = ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%j")
    if answer.code:
        raise _silent("squeue", answer)
    ours = [job for job in parse_queue(answer.out) if re.fullmatch(r"qlora-.+-[0-9a-f]{6}", job.name)]
    return [job for number in dict.fromkeys(job.id.partition("_")[0] for job in ours) for job in show(number)]


def in_folders(url: str, here: Path) -> Path | None:
    """The newest job folder below `here` whose job writes to an output address; None without one."""
    found = [
        folder
        for folder in here.glob("qlora-*")
        if (output := about(folder).get("output")) and address(str(output), here) == url
    ]
    return max(found, key=lambda folder: (folder / "job.json").stat().st_mtime, default=None)


def _of(job: Job, url: str) -> bool:
    return job.name.startswith("qlora-") and job.name.endswith(f"-{tag(url)}")


def _newest(jobs: Iterable[Job]) -> list[Job]:
    """The job with the highest number, or all tasks of that array."""
    jobs = list(jobs)
    last = max((job.number[0] for job in jobs), default=None)
    return [job for job in jobs if job.number[0] == last]


def _remembered(*which: str) -> list[Job]:
    """What accounting tells; empty where there is none, which is common on small clusters."""
    if not available("sacct"):
        return []
    answer = ask("sacct", *which, "--allocations", "--noheader", "--parsable2", f"--format={','.join(_SACCT)}")
    return parse_sacct(answer.out) if answer.code == 0 else []


def _silent(program: str, answer: Answer) -> JobError:
    return JobError(f"{program}: SLURM said: {answer.reason}. Ask its controller with scontrol ping, and try again")
