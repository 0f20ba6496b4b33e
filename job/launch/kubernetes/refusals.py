"""What the API server refuses, as one sentence of this package each: what was found and what to do."""

import json
import re
from dataclasses import dataclass

from job.errors import InputError, JobError

MOST = 400
"""Signs of what the server said that are shown."""


class Absent(InputError):
    """There is no such thing (404)."""


class Forbidden(InputError):
    """The user may not (403)."""


class NoAnswer(JobError):
    """The server did not answer, or cannot now; it may soon."""


class Expired(JobError):
    """A watch begins too far in the past (410): what is there now has to be read anew."""


@dataclass(frozen=True)
class Asked:
    """A question to the API server.

    Attributes:
        verb: as roles name it: get, list, watch, create, patch or delete.
        what: the thing, in words.
        path: of the resource.
    """

    verb: str
    what: str
    path: str

    @property
    def namespace(self) -> str:
        """In words."""
        found = re.search(r"/namespaces/([^/]+)", self.path)
        return f" in namespace {found[1]}" if found else ""


def refusal(status: int, body: bytes | str, server: str, asked: Asked) -> JobError:
    """The error for an answer that is none.

    Args:
        status: of HTTP.
        body: what came with it, usually a `Status` of Kubernetes.
        server: the address that was asked.
    """
    said = message(body)
    behind = f": {said}" if said else ""
    if status == 401:
        return InputError(
            f"{server} does not know who asks (401{behind}). The credentials of the kubeconfig are missing or have "
            "expired: log in to the cluster again"
        )
    if status == 403:
        return Forbidden(
            f"you may not {asked.verb} {asked.what}{asked.namespace} (403{behind}). Ask an administrator for a role "
            "that allows it; qlora preflight kubernetes lists all that a run needs"
        )
    if status == 404:
        return _absent(asked, behind)
    if status == 409:
        return JobError(
            f"{asked.what}{asked.namespace} is there already, or was changed by somebody else at this moment "
            f"(409{behind}). Try again"
        )
    if status == 410:
        return Expired(f"what was known of {asked.what}{asked.namespace} is too old by now (410{behind}). Try again")
    if status == 422:
        return InputError(
            f"Kubernetes does not take {asked.what}{asked.namespace} as it is (422{behind}). Mend what it names in "
            "the values"
        )
    if status == 429 or status >= 500:
        return NoAnswer(f"{server} cannot answer now ({status}{behind}). Try again in a minute")
    return JobError(f"{server} refuses to {asked.verb} {asked.what}{asked.namespace} ({status}{behind})")


def _absent(asked: Asked, behind: str) -> JobError:
    if asked.path.startswith("/apis/ray.io/") and asked.verb in ("list", "watch"):
        return Absent(
            "the cluster knows no RayJob (ray.io/v1), so KubeRay is not installed there. Ask an administrator for its "
            "operator, 1.7 or later, or choose another cluster with --context"
        )
    return Absent(f"there is no {asked.what}{asked.namespace} (404{behind}). Check the name, --namespace and --context")


def unreachable(fault: BaseException, server: str, waited_s: float) -> JobError:
    """The error when no answer came at all.

    Args:
        fault: of urllib3, whose text names addresses and causes.
    """
    said = " ".join([str(fault), *(str(cause) for cause in (fault.__cause__, fault.__context__) if cause)])
    if "CERTIFICATE" in said.upper() or "SSL" in said:
        return InputError(
            f"{server}: its certificate cannot be verified ({_why(said)}). Fetch the kubeconfig of this cluster "
            "again, or give its certificate-authority there"
        )
    if "imed out" in said or "Timeout" in type(fault).__name__:
        return JobError(f"{server} did not answer in {waited_s:g} s. Is the VPN or tunnel to the cluster up? Try again")
    return NoAnswer(
        f"{server} cannot be reached: {_why(said)}. Is it the right cluster (kubectl config current-context), and the "
        "VPN or tunnel to it up?"
    )


def _why(said: str) -> str:
    for pattern in (r"certificate verify failed[^()']*", r"Connection refused", r"Name or service not known"):
        if found := re.search(pattern, said):
            return found[0].strip(" :")[0].lower() + found[0].strip(" :")[1:]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>|HTTPS?ConnectionPool\([^)]*\):?|0x[0-9a-f]+", "", said)).strip()[:MOST]


def message(body: bytes | str) -> str:
    """What a `Status` says, or the first line of anything else; on one line, without tokens."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    said = str(read.get("message") or read.get("reason") or "") if isinstance(read, dict) else text.split("\n")[0]
    return without_tokens(" ".join(said.split()))[:MOST].rstrip(". ")


def without_tokens(text: str) -> str:
    """A text without bearer tokens and what looks like one (three parts of base64 with dots between)."""
    text = re.sub(r"(?i)(bearer\s+)[^\s\"',;]+", r"\1***", text)
    return re.sub(r"\beyJ[\w-]+\.[\w-]+(\.[\w-]+)?", "***", text)
