"""The real helm, asked as a user of a terminal asks it."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from job.errors import InputError, JobError

ANSWER_S = 300.0
"""Seconds that helm may take: it waits for the hooks of a chart."""


@dataclass(frozen=True)
class Answer:
    """How helm ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """What it found wrong, on one line; its warnings are left out."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip() and not line.startswith("WARNING:")]
        return "; ".join(line.removeprefix("Error: ") for line in lines) or f"exit code {self.code}"


def ask(words: Sequence[str]) -> Answer:
    """Run helm to its end.

    Args:
        words: `helm` and its arguments.

    Raises:
        InputError: there is no helm here.
        JobError: it did not end in ANSWER_S seconds.
    """
    if shutil.which(words[0]) is None:
        raise InputError(
            f"{words[0]} is not on PATH. Install it (https://helm.sh/docs/intro/install), version 3.10 or later, or "
            "print the request with --dry-run and send it from a machine that has it"
        )
    try:
        done = subprocess.run(  # noqa: S603 - helm, no shell reads the words
            list(words), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ANSWER_S
        )
    except subprocess.TimeoutExpired as fault:
        raise JobError(
            f"helm did not end in {ANSWER_S:.0f} s. Look at what it did with helm list, then try again"
        ) from fault
    return Answer(done.returncode, done.stdout, done.stderr)


def render(words: Sequence[str]) -> list[dict[str, Any]]:
    """The objects that a request would send.

    Args:
        words: see `request.Request.rendering`.

    Raises:
        InputError: there is no helm, or it does not take the values.
    """
    answer = ask(words)
    if answer.code:
        raise InputError(f"helm cannot render the chart: {answer.reason}. The chart's values.yaml says what there is")
    try:
        return [made for made in yaml.safe_load_all(answer.out) if isinstance(made, dict)]
    except yaml.YAMLError as fault:
        raise JobError(f"helm rendered what is no YAML: {fault}. Look at it: helm template") from fault
