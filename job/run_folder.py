"""The run's folder under output.url: whose it is, what it was asked for, and how it stands."""

import errno
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import yaml

from job.checkpoint import FOLDER, Checkpoints, Unusable
from job.config import RunConfig, changes, parse_config, without_signatures
from job.errors import InputError, JobError, OutputError
from job.lease import FOLDER as LEASE
from job.lease import STOP_KEY
from job.sinks import latest_step
from job.store import Store
from job.telling import CHECK_BUCKET, telling

STATUS, SETTINGS = "status.json", "run.yaml"
LOST_RANK = "another rank ended"
"""How the reason of a run begins that failed since one of its ranks was gone, whatever that one may have had."""
State = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Status:
    """status.json: the truth about a run, since launchers lose exit codes."""

    state: State
    reason: str
    step: int
    updated: str
    checkpoint: int = 0
    """Step of the newest complete checkpoint, 0 without one."""
    restarts: int = 0
    """Starts after the run was lost, since that checkpoint."""

    @property
    def lost(self) -> bool:
        """Whether its processes went without a reason that is known: all of them, or one that took the others along."""
        return self.state == "running" or (self.state == "failed" and self.reason.startswith(LOST_RANK))


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where there is none yet."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    return not there.is_dir() or os.access(there, os.W_OK | os.X_OK)  # what a file there means is said later


RAY = "ray"
"""What Ray Train writes of its own, for its dashboard and results."""
_DRAFT = re.compile(r"(run\.yaml|status\.json|metrics\.jsonl)\.\d+\.part")
"""A file that its writer was killed over."""


class _Dumper(yaml.SafeDumper):
    """Quotes all text that begins like a number: run files know more numbers than YAML 1.1, such as 2e-4."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+.]?\d"), list("-+.0123456789"))


class RunFolder:
    """The folder of one run.

    Args:
        config: the settings asked for.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.checkpoint = self.restarts = 0
        with telling(OutputError, f"output.url: {config.output.url}", CHECK_BUCKET):
            self.store = Store(config.output.url, config.storage)
            self.there = self.store.names(folders=True)
            bucket = None if self.there else self.store.missing_bucket()
            settings, status = (self._read(name) for name in (SETTINGS, STATUS))
        if self.store.is_local and not _writable(Path(self.store.path("."))):
            raise OutputError(f"output.url: {config.output.url} cannot be written. Use a folder that is yours")
        if bucket:
            raise OutputError(f"output.url: {config.output.url}: there is no bucket {bucket}. Create it or use another")
        self._understand(settings, status)

    def _understand(self, settings: bytes | None, status: bytes | None) -> None:
        try:
            self.old = None if settings is None else parse_config(settings.decode(), source=SETTINGS)
        except (InputError, ValueError, TypeError) as fault:  # ValueError: no JSON, no UTF-8
            raise OutputError(
                f"output.url: {self.config.output.url} holds a run that this version cannot read ({fault}). "
                "Use another output.url"
            ) from fault
        try:
            self.status = None if status is None else Status(**json.loads(status))
        except (ValueError, TypeError):  # damaged: the checkpoints know how far it came
            self.status = None

    def already_finished(self) -> bool:
        """Whether this very run is done; False when the folder is new, or holds a run that is not done, or one that
        shall go further now. One that ended before its first step may have any other settings: nothing was learnt, and
        the cure may lie in any of them.

        Raises:
            OutputError: the folder holds a run with other fixed settings, or what is no run.
        """
        if self.old is None:
            self._refuse_foreign_files()
            return False
        if self.took_no_step:
            return False
        differing = changes(self.old, self.config)
        fixed = [change for change in differing if change.rule == "fixed"]
        if fixed:
            listed = "\n  ".join(map(str, fixed))
            raise OutputError(
                f"output.url: {self.config.output.url} holds a run with other fixed settings\n  {listed}\n"
                "  Use another output.url, or set these back to what they were"
            )
        if self.status is None or self.status.state != "finished":
            return False
        changed = {change.key for change in differing}
        wanted = self.config.train.max_steps
        if self.status.reason and "evaluation.patience" in changed:
            return False  # it ended early
        if wanted is None:
            return not {"train.epochs", "train.max_steps"} & changed
        return "train.max_steps" not in changed or wanted <= self.status.step

    def refuse_finished(self) -> None:
        """Refuse to start what is done; a launcher asks before it queues anything.

        Raises:
            OutputError: the run is finished, or the folder is another run's (see `already_finished`).
        """
        if self.already_finished():
            steps = self.status.step if self.status else 0
            raise OutputError(
                f"output.url: {self.config.output.url} holds this run, finished after {steps} "
                "steps. Raise train.epochs or train.max_steps to go further, or use another output.url"
            )

    @property
    def took_no_step(self) -> bool:
        """Whether a run ended here before its first step."""
        ended = self.status is not None and self.status.state in ("failed", "interrupted") and self.status.step == 0
        return ended and FOLDER not in self.there

    def begin(self) -> None:
        """Write run.yaml and the first status, of a folder that is ours now: what it holds is looked at once more.

        Raises:
            OutputError: the URL cannot be written, or holds another run by now.
            JobError: the run was lost too often without a new checkpoint.
        """
        with telling(OutputError, f"output.url: {self.config.output.url} cannot be read", cure=""):
            self._understand(*(self._read(name) for name in (SETTINGS, STATUS)))
            self.there = self.store.names(folders=True)
            newest, restarts = self._newest(), 0
        if self.old is not None:
            self.already_finished()
        if self.status and self.status.lost and newest <= self.status.checkpoint:
            restarts = self.status.restarts + 1
        self.checkpoint, self.restarts = newest, restarts
        most = self.config.checkpoint.max_restarts
        if restarts > most:
            since = f"without a new checkpoint since step {newest}"
            why = f"lost {restarts} times {since} (checkpoint.max_restarts is {most})"
            self.write_status("failed", why, newest)
            raise JobError(f"the run was {why}. Look for the cause, then start it again")
        with telling(OutputError, f"output.url: {self.config.output.url} cannot be written", cure=""):
            for name in filter(_DRAFT.fullmatch, self.there):
                self.store.remove(name, missing_ok=True)
            text = yaml.dump(without_signatures(self.config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
            if self.old is not None:  # or a kill between the two leaves a longer run that seems finished
                self.write_status("running", "", newest)
            self.store.write(SETTINGS, text.encode())
            self.write_status("running", "", newest)

    def _newest(self) -> int:
        """The step of the newest checkpoint that has a good manifest."""
        checkpoints = Checkpoints(self.store)
        for step in checkpoints.steps():
            with suppress(Unusable):
                return checkpoints.manifest(step).step
        return 0

    def write_status(self, state: State, why: str, step: int) -> None:
        """Replace status.json."""
        status = {
            "state": state,
            "reason": why,
            "step": step,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "checkpoint": self.checkpoint,
            "restarts": self.restarts,
        }
        content = json.dumps(status, indent=1, ensure_ascii=False).encode()
        try:
            self.store.write(STATUS, content)
        except OSError as fault:
            if fault.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.store.is_local:
                raise
            # a full disk has room for no second file, but in the place of the first
            with open(self.store.path(STATUS), "r+b") as file:  # keeps its block, which others would take
                file.write(content)
                file.truncate()

    def abandon(self, why: str, since: datetime) -> None:
        """Say why the run failed, when its processes left it running or knew only that another one was gone; not if
        that was written before `since`."""
        status = self.status
        if status:
            self.checkpoint, self.restarts = status.checkpoint, status.restarts
        if status and status.lost and datetime.fromisoformat(status.updated) >= since:
            self.write_status("failed", why, latest_step(self.store))

    def _refuse_foreign_files(self) -> None:
        ours = (LEASE, STOP_KEY, RAY)
        foreign = [name for name in self.there if not (name.startswith(".") or name in ours or _DRAFT.fullmatch(name))]
        if foreign:
            raise OutputError(
                f"output.url: {self.config.output.url} holds files that are no run ({', '.join(foreign[:5])}). "
                "Use an empty or a new folder"
            )

    def _read(self, name: str) -> bytes | None:
        return self.store.read(name) if self.store.exists(name) else None
