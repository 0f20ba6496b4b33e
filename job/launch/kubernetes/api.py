"""The one door to Kubernetes' Python client: plain objects by their paths, and every refusal as a sentence."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from yaml import YAMLError

from job import __version__
from job.errors import InputError
from job.launch.kubernetes.refusals import Asked, message, refusal, unreachable, without_tokens

ANSWER_S = 30.0
"""Seconds for an answer."""
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
"""Asks for a thing's name and labels alone: a secret's values never leave the server."""
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster:
    """A namespace of a cluster.

    Args:
        client: an ApiClient of the package kubernetes.
        namespace: where runs are.
        context: of the kubeconfig, in words.

    Every method raises InputError for what the user can mend (401, 403, 404, 422), else JobError.
    """

    def __init__(self, client: Any, namespace: str, context: str | None = None):
        self.namespace, self.context = namespace, context
        self._client = client
        client.user_agent = f"qlora/{__version__}"  # what auditors of the cluster see
        self.server = str(client.configuration.host)

    def rayjobs(self, name: str = "") -> str:
        """The path of RayJobs, or of one."""
        return f"/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs" + (f"/{name}" if name else "")

    def core(self, plural: str, name: str = "") -> str:
        """The path of things of the core group in this namespace, or of one."""
        return f"/api/v1/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def get(self, path: str, what: str, accept: str = "application/json") -> dict[str, Any]:
        """A thing."""
        return self._answer("GET", path, Asked("get", what, path), {}, accept=accept)

    def items(self, path: str, what: str, **query: str) -> list[dict[str, Any]]:
        """The things of a list."""
        return list(self._answer("GET", path, Asked("list", what, path), query).get("items") or [])

    def create(self, path: str, what: str, thing: Mapping[str, Any]) -> dict[str, Any]:
        """Make a thing; as the server has it."""
        return self._answer("POST", path, Asked("create", what, path), {}, thing)

    def patch(self, path: str, what: str, change: Mapping[str, Any]) -> None:
        """Merge a change into a thing."""
        headers = {"Content-Type": "application/merge-patch+json"}
        self._answer("PATCH", path, Asked("patch", what, path), {}, change, headers=headers)

    def delete(self, path: str, what: str) -> None:
        """Delete a thing; what it owns goes behind it."""
        self._answer("DELETE", path, Asked("delete", what, path), {"propagationPolicy": "Background"})

    def lines(self, path: str, asked: Asked, silence_s: float, **query: str) -> Iterator[str]:
        """The lines of an answer that goes on, such as a log.

        Args:
            silence_s: seconds without a line after which it ends, as it does when the connection breaks.
        """
        from urllib3.exceptions import HTTPError

        response = self._send("GET", path, asked, query, silence_s=silence_s)
        rest = b""
        try:
            for chunk in response.response.stream(decode_content=False):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
        except HTTPError:  # broken, or silent: whoever reads asks again from where this ended
            return
        finally:
            response.response.close()
        if rest:
            yield rest.decode(errors="replace")

    def changes(self, path: str, what: str, version: str, seconds: int, **query: str) -> Iterator[dict[str, Any]]:
        """Events of a watch, each with `type` and `object`.

        Args:
            version: the resourceVersion after which they begin.
            seconds: after which it ends.

        Raises:
            Expired: what happened since that version is not known any more (410).
        """
        asked = Asked("watch", what, path)
        query |= {"watch": "true", "resourceVersion": version, "timeoutSeconds": str(seconds)}
        for line in self.lines(path, asked, float(seconds + 1), **query):
            try:
                event = json.loads(line)
            except ValueError:  # cut off, or empty
                continue
            if event.get("type") == "ERROR":
                status = event.get("object") or {}
                raise refusal(int(status.get("code") or 500), json.dumps(status), self.server, asked)
            yield event

    def _answer(
        self,
        method: str,
        path: str,
        asked: Asked,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        accept: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        from urllib3.exceptions import HTTPError

        response = self._send(method, path, asked, query, body, {"Accept": accept, **(headers or {})})
        try:
            read = json.loads(response.read())
        except HTTPError as fault:
            raise unreachable(fault, self.server, ANSWER_S) from fault
        except ValueError as fault:
            raise InputError(
                f"{self.server} does not answer as Kubernetes does: {message(response.data or b'')[:80]}. Check the "
                "server's address in the kubeconfig"
            ) from fault
        return read if isinstance(read, dict) else {}

    def _send(
        self,
        method: str,
        path: str,
        asked: Asked,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
    ) -> Any:
        """The answer, whose body is not read yet.

        Raises:
            JobError: see `refusals`.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        waits = (min(ANSWER_S, 10.0), silence_s or ANSWER_S)  # to connect, and for each part of the answer
        words = self._client.param_serialize(
            method, path, query_params=list(query.items()), header_params=dict(headers or {}), body=body,
            auth_settings=["BearerToken"],
        )  # fmt: skip
        try:
            response = self._client.call_api(*words, _request_timeout=waits)
            if 200 <= response.status < 300:
                return response
            said = self._no_token(response.read().decode(errors="replace"))
        except (HTTPError, ApiException) as fault:  # the client's own error is for TLS alone here
            raise unreachable(fault, self.server, waits[1]) from fault
        raise refusal(response.status, said, self.server, asked)

    def _no_token(self, said: str) -> str:
        for value in self._client.configuration.api_key.values():
            said = said.replace(str(value).removeprefix("Bearer "), "***") if value else said
        return without_tokens(said)


def connect(namespace: str | None = None, context: str | None = None) -> Cluster:
    """The cluster that kubectl and helm would talk to: by KUBECONFIG, ~/.kube/config, or from inside a pod.

    Args:
        namespace: the context's own, else `default`, when left out.

    Raises:
        InputError: the client is not installed, or nobody says which cluster.
    """
    try:
        import urllib3
        from kubernetes import client, config
    except ImportError as fault:
        raise InputError(
            f"Kubernetes' client is not installed ({fault.name} is missing). Install it with "
            "pip install 'qlora-job[kubernetes]'"
        ) from fault
    settings, loader = client.Configuration(), cast(Any, config)  # whose functions have no types
    file = os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        if context is None and not _there(file) and "KUBERNETES_SERVICE_HOST" in os.environ:
            loader.load_incluster_config(client_configuration=settings)
            own = _SERVICE_ACCOUNT.read_text().strip()
        else:
            loader.load_kube_config(config_file=file, context=context, client_configuration=settings)
            contexts, active = loader.list_kube_config_contexts(config_file=file)
            chosen = next((known for known in contexts if known["name"] == context), active)
            context, own = chosen["name"], chosen["context"].get("namespace")
    except (config.ConfigException, YAMLError, OSError, KeyError, TypeError, ValueError) as fault:
        said = without_tokens(" ".join(str(fault).split())).rstrip(".")
        raise InputError(
            f"no cluster is known here: {said}. Set KUBECONFIG, log in to the "
            "cluster, or give --context as kubectl config get-contexts lists them"
        ) from fault
    settings.retries = urllib3.Retry(total=2, read=0, backoff_factor=0.2)
    return Cluster(client.ApiClient(settings), namespace or own or "default", context)


def _there(files: str) -> bool:
    return any(Path(name).expanduser().is_file() for name in files.split(os.pathsep))
