"""A stand-in for a cluster's API server, to which Kubernetes' real Python client talks over HTTP."""

import asyncio
import json
import os
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kmock import KubernetesEmulator, Server, resource

from job.launch.slurm.request import tag

TOKEN = "eyJhbGciOi.c2VjcmV0.dG9rZW4"
"""What the kubeconfig of a stand-in shows its server; nobody may ever print it."""
NAMESPACE = "team"
KINDS = {
    "Pod": ("", "v1", "pods"),
    "Event": ("", "v1", "events"),
    "Secret": ("", "v1", "secrets"),
    "ConfigMap": ("", "v1", "configmaps"),
    "Node": ("", "v1", "nodes"),
    "ResourceQuota": ("", "v1", "resourcequotas"),
    "PersistentVolumeClaim": ("", "v1", "persistentvolumeclaims"),
    "ServiceAccount": ("", "v1", "serviceaccounts"),
    "RayJob": ("ray.io", "v1", "rayjobs"),
    "CustomResourceDefinition": ("apiextensions.k8s.io", "v1", "customresourcedefinitions"),
    "StorageClass": ("storage.k8s.io", "v1", "storageclasses"),
    "PriorityClass": ("scheduling.k8s.io", "v1", "priorityclasses"),
    "LocalQueue": ("kueue.x-k8s.io", "v1beta1", "localqueues"),
    "Deployment": ("apps", "v1", "deployments"),
}
CLUSTER_WIDE = ("Node", "CustomResourceDefinition", "StorageClass", "PriorityClass")


class _Emulator(KubernetesEmulator):
    """With label selectors and reviews, which are asked by creating them and kept nowhere."""

    async def _handle(self, request: Any) -> Any:
        review = request.resource is not None and request.resource.plural == "selfsubjectaccessreviews"
        return await (super(KubernetesEmulator, self) if review else super())._handle(request)

    async def _serve_list(self, request: Any) -> Any:
        found = await super()._serve_list(request)
        labels = [one.partition("=") for one in request.params.get("labelSelector", "").split(",") if one]

        def chosen(thing: dict[str, Any]) -> bool:
            has = thing["metadata"].get("labels", {})
            return all(name in has and (not equals or has[name] == value) for name, equals, value in labels)

        return {**found, "items": [thing for thing in found["items"] if chosen(thing)]}


class Kube:
    """A cluster that does what a test tells it; used as a context manager."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.handler: Any = None
        self.url = ""
        self._ready, self._over = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> "Kube":
        self._thread.start()
        assert self._ready.wait(20)
        for kind in KINDS:
            self._there(kind)
        return self

    def __exit__(self, *fault: object) -> None:
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(20)

    async def _serve(self) -> None:
        async with _Emulator() as self.handler, Server(self.handler) as server:
            self.url = str(server.url).rstrip("/")
            self._ready.set()
            await self._over.wait()

    def _there(self, kind: str) -> None:
        self.call(lambda: self.handler.resources.__setitem__(resource(*KINDS[kind]), {"namespaced": True}))

    def call(self, act: Callable[[], Any]) -> Any:
        """Do something in the server's own thread."""

        async def done() -> Any:
            return act()

        return asyncio.run_coroutine_threadsafe(done(), self.loop).result(20)

    def path(self, kind: str, name: str = "", namespace: str = NAMESPACE) -> str:
        """The path of things of a kind, or of one."""
        group, version, plural = KINDS[kind]
        begin = f"/apis/{group}/{version}" if group else f"/api/{version}"
        within = "" if kind in CLUSTER_WIDE else f"/namespaces/{namespace}"
        return f"{begin}{within}/{plural}" + (f"/{name}" if name else "")

    def add(self, kind: str, name: str, *, namespace: str = NAMESPACE, **parts: Any) -> dict[str, Any]:
        """Put a thing there; `metadata` is added to what it needs."""
        meta = {"name": name, "resourceVersion": "1", **parts.pop("metadata", {})}
        if kind not in CLUSTER_WIDE:
            meta["namespace"] = namespace
        self._send("POST", self.path(kind, namespace=namespace), {"metadata": meta, **parts})
        return {"metadata": meta, **parts}

    def change(self, kind: str, name: str, **parts: Any) -> None:
        """Merge into a thing, as its controller does; watches hear of it."""
        self._send("PATCH", self.path(kind, name), parts)

    def remove(self, kind: str, name: str) -> None:
        """Have a thing gone."""
        self._send("DELETE", self.path(kind, name), None)

    def _send(self, method: str, path: str, thing: Any) -> None:
        body = None if thing is None else json.dumps(thing).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "test"}
        urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers, method=method)).read()

    def refuse(self, words: str, status: int, message: str = "", **more: Any) -> None:
        """Answer requests such as `get /api/v1/nodes` with a refusal."""
        said = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": message, **more}
        self.answer(words, status, said)

    def answer(self, words: str, *said: Any) -> None:
        """Answer such requests with a status, an object, or the parts of a stream."""

        def tell() -> None:
            reaction = self.handler[words]
            for one in said:
                reaction = reaction << one

        self.call(tell)

    def answer_once(self, words: str, said: Any) -> None:
        """Answer the first of such requests."""
        left = [said]
        self.answer(words, lambda: left.pop() if left else NotImplemented)

    def asked(self, method: str, path: str = "") -> list[Any]:
        """The requests that came, of tests' own none."""
        found = [one for one in list(self.handler) if one.headers.get("User-Agent") != "test"]
        return [one for one in found if one.method.value.lower() == method.lower() and path in str(one.url)]

    def made(self, folder: Path, name: str, url: str) -> str:
        """What a helm does that sends a run: the RayJob is there afterwards."""
        meta = {"name": name, "namespace": NAMESPACE, "labels": {"qlora.run": tag(url)}, "creationTimestamp": "2026"}
        (folder / "made.json").write_text(json.dumps({"metadata": meta, "spec": {}}))
        post = f"urllib.request.Request('{self.url}{self.path('RayJob')}', open('{folder}/made.json', 'rb').read(), "
        post += "{'Content-Type': 'application/json', 'User-Agent': 'test'}"
        return f'{sys.executable} -c "import urllib.request; urllib.request.urlopen({post}))"'

    def kubeconfig(self, folder: Path, namespace: str | None = NAMESPACE) -> Path:
        """A kubeconfig for this cluster, with two contexts, `here` and `elsewhere`."""
        return write_kubeconfig(folder, self.url, namespace)


def write_kubeconfig(folder: Path, url: str, namespace: str | None = NAMESPACE) -> Path:
    """A kubeconfig for the server at this address."""
    contexts = [
        {"name": "here", "context": {"cluster": "c", "user": "u"} | ({"namespace": namespace} if namespace else {})},
        {"name": "elsewhere", "context": {"cluster": "c", "user": "u", "namespace": "other"}},
    ]
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": contexts,
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(name="kube")
def make_kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kube]:
    """A cluster, and KUBECONFIG set to reach it."""
    with Kube() as kube:
        monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig(tmp_path)))
        yield kube


def add_rayjob(kube: Kube, name: str, url: str, stage: str = "Running", state: str = "", **more: Any) -> dict[str, Any]:
    """A RayJob as the chart and KubeRay leave it; `more` goes into its status, `spec` and `labels` beside it."""
    labels = {"qlora.run": tag(url), "app.kubernetes.io/instance": "first", **more.pop("labels", {})}
    meta = {"labels": labels, "annotations": {"qlora.output": url}, "creationTimestamp": more.pop("created", "2026")}
    spec = {"backoffLimit": 2, "rayClusterSpec": {"workerGroupSpecs": [{"replicas": 2}]}, **more.pop("spec", {})}
    status = {"jobDeploymentStatus": stage, "jobStatus": state, "rayClusterName": f"{name}-abc", **more}
    return kube.add("RayJob", name, metadata=meta, spec=spec, status=status)


def add_pod(kube: Kube, name: str, job: str, role: str, phase: str = "Running", **status: Any) -> dict[str, Any]:
    """A pod of a RayJob: its submitter, head or worker, with one container."""
    labels = {"job-name": job} if role == "submitter" else {"ray.io/cluster": f"{job}-abc", "ray.io/node-type": role}
    state = {"running": {}} if phase == "Running" else {"terminated": {"exitCode": 0}}
    containers = [] if phase == "Pending" else [{"name": f"ray-{role}", "state": state}]
    told = {"phase": phase, "containerStatuses": containers, **status}
    return kube.add("Pod", name, metadata={"labels": labels}, spec={}, status=told)


def add_event(kube: Kube, kind: str, about: str, reason: str, message: str, type: str = "Warning") -> None:
    """An event of a thing."""
    told = {"type": type, "reason": reason, "message": message, "lastTimestamp": f"2026-11-21T15:00:{len(message):03}Z"}
    kube.add("Event", f"{about}.{reason.lower()}", involvedObject={"kind": kind, "name": about}, **told)


def write_status(folder: Path, state: str, **more: Any) -> None:
    """A run's status.json in its folder."""
    folder.mkdir(exist_ok=True)
    status = {"state": state, "reason": "", "step": 3, "updated": "2026-11-21T15:00:00+00:00", "checkpoint": 2, **more}
    (folder / "status.json").write_text(json.dumps(status))


def fake_helm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Callable[[], list[list[str]]]:
    """A helm on PATH that notes its words and then does what `script` says; the words of all its calls."""
    (folder / "bin").mkdir(exist_ok=True)
    noted, program = folder / "helm.words", folder / "bin/helm"
    program.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >>{noted}; echo >>{noted}\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")

    def words() -> list[list[str]]:
        return [line.split("\0")[:-1] for line in noted.read_text().splitlines()]

    return words
