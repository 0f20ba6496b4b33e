"""The real helm, asked as a user of a terminal asks it."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from job.errors import InputError, JobError
from job.launch.kubernetes.refusals import without_tokens

ANSWER_S = 300.0
"""Seconds that helm may take: it waits for the hooks of a chart."""
_ELSEWHERE = ("HELM_NAMESPACE", "HELM_KUBECONTEXT", "HELM_KUBEAPISERVER", "HELM_KUBETOKEN")
"""Variables that would lead helm elsewhere than where the other verbs look, which go by the kubeconfig."""
_NOISE = ("WARNING:", "Use --debug flag")
_BREAK = "\n  "
CURES = (
    (r"problems? in the values of this chart", ""),  # each comes with its cure
    (r"no matches for kind \"?RayJob", "KubeRay is not installed there: ask an administrator for its operator"),
    (r"values don't meet the specifications|at '/|Additional property", "The chart's values.yaml says what each is"),
    (r"context .* does not exist|no context exists", "kubectl config get-contexts lists them; give one with --context"),
    (r"(?i)unreachable|connection refused|no such host|i/o timeout", "Is it the right cluster, and the VPN to it up?"),
    (r"(?i)unauthorized|must be logged in", "Log in to the cluster again"),
    (r"(?i)forbidden: exceeded quota", "Ask for less, or wait until others end: kubectl describe quota"),
    (r"(?i)forbidden|cannot \w+ resource", "qlora preflight kubernetes lists what you need to be allowed"),
    (r"requires kubeVersion", "Choose another cluster with --context, or ask an administrator for an upgrade"),
    (r"has no deployed releases", "Remove what is left of it: helm uninstall RELEASE"),
    (r"another operation .* in progress", "Wait for it, or end what it left with helm rollback RELEASE"),
    (r"invalid ownership metadata|cannot be imported", "Something has this name already: choose another --release"),
    (r"namespaces? \"?[\w-]+\"? not found", "Create it: kubectl create namespace NAME"),
)  # fmt: skip
"""What helm says, and what to do."""


@dataclass(frozen=True)
class Answer:
    """How helm ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """What it found wrong, without its warnings, advice and own words in front; further lines are indented."""
        lines = [line.strip() for line in self.err.splitlines() if not line.startswith(_NOISE)]
        lines = [re.sub(r"^(Error: )?(execution error at \([^)]*\):)?\s*", "", line) for line in lines]
        return without_tokens("\n  ".join(filter(None, lines))) or f"exit code {self.code}"

    def with_cure(self, otherwise: str) -> str:
        """The reason, and what to do about it where helm does not say so itself.

        Args:
            otherwise: what to do when nobody knows the reason.
        """
        cure = next((cure for pattern, cure in CURES if re.search(pattern, self.err)), otherwise)
        return self.reason if not cure else f"{self.reason}{_BREAK if _BREAK in self.reason else '. '}{cure}"


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
    env = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    try:
        done = subprocess.run(  # noqa: S603 - helm, no shell reads the words
            list(words),
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
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
        raise InputError(f"helm cannot render the chart: {answer.with_cure('helm template --debug shows more')}")
    try:
        return [made for made in yaml.safe_load_all(answer.out) if isinstance(made, dict)]
    except yaml.YAMLError as fault:
        raise JobError(f"helm rendered what is no YAML: {fault}. Look at it: helm template") from fault
