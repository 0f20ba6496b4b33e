"""SLURM's own programs, asked as a user of a login node asks them."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from job.errors import InputError, JobError

ANSWER_S = 120.0
"""Seconds that a program may take; they wait by themselves for a controller that is being restarted."""


@dataclass(frozen=True)
class Answer:
    """How a program ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """What it found wrong, on one line, without the program's own name in front of it."""
        lines = [line.partition("error: ")[2] or line for line in self.err.splitlines() if line.strip()]
        return "; ".join(line.strip() for line in lines) or f"exit code {self.code}"


def available(program: str = "squeue") -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which(program) is not None


def belongs_to_a_cluster() -> bool:
    """Whether this machine has SLURM's commands and they know of a cluster: Debian installs them without one."""
    if not available():
        return False
    if not available("scontrol"):
        return True
    return "_establish_config_source" not in ask("scontrol", "ping").err


def ask(*words: str, site: str | None = None, env: Mapping[str, str] | None = None) -> Answer:
    """Run one of SLURM's programs to its end.

    Args:
        words: program and arguments.
        site: a shell file that is read first, for the variables that it exports.
        env: the environment; this process's when left out.

    Raises:
        InputError: there is no such program here.
        JobError: no answer came in ANSWER_S seconds.
    """
    environment = dict(os.environ if env is None else env)
    if shutil.which(words[0], path=environment.get("PATH")) is None:
        raise InputError(
            f"{words[0]} is not on PATH, so this machine cannot talk to SLURM. Log in to a node that can (or load "
            "the site's slurm module), or start the run here with qlora train"
        )
    try:
        done = subprocess.run(  # noqa: S603 - SLURM's programs, no shell reads the words
            _after_site(words, site),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
        )
    except subprocess.TimeoutExpired as fault:
        raise JobError(
            f"{words[0]} got no answer from SLURM's controller in {ANSWER_S:.0f} s. Try again; scontrol ping asks it"
        ) from fault
    return Answer(done.returncode, done.stdout, done.stderr)


def _after_site(words: Sequence[str], site: str | None) -> list[str]:
    """The words as they are, or behind a shell that has read the site's file; what that prints goes to stderr."""
    if site is None:
        return list(words)
    return ["bash", "-c", 'set -a; . "$0" 1>&2 || { echo "$0 failed" 1>&2; exit 1; }; set +a; exec "$@"', site, *words]
