"""Images built and containers run for real, on a base made of Debian's own packages; no registry is asked."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Host
from tests.conftest import REPOSITORY

BASE = "localhost/base:bookworm"
IMAGE = "localhost/qlora-job:tested"
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""
PODMAN = ("podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs")
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
LIMITS = [f"--ulimit={name}={most}:{most}" for name, most in (("nofile", HARD), ("nproc", 4096))]
"""Said, for podman's own may be higher than what this process is allowed to give."""


@dataclass(frozen=True)
class Containers:
    """buildah and podman, with images of their own, which go with `folder`."""

    folder: Path
    env: Mapping[str, str]

    def podman(self, *words: str | Path, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
        """podman with these words, ended well or not."""
        command = [*PODMAN, *map(str, words)]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout_s)

    def run(self, *words: str | Path, options: Sequence[str | Path] = (), image: str = IMAGE) -> str:
        """A command in a container as a pod under "restricted" has it, without a network; what it printed."""
        done = self.podman("run", "--rm", "--network=none", *RESTRICTED, *options, image, *words, timeout_s=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def build(self) -> None:
        """A base, and our image on it, as `make image` does it everywhere."""
        root = self.folder / "base"
        self._must("debootstrap", "--variant=minbase", "bookworm", root)
        archive = self.folder / "base.tar"
        self._must("tar", "-C", root, "-cf", archive, ".")
        self._must(*PODMAN, "import", archive, BASE)
        shutil.rmtree(root)
        archive.unlink()
        variables = {"VARIANT": "cpu", "BASE_IMAGE": BASE, "IMAGE": IMAGE, "BUILDER": "buildah"}
        words = [f"{name}={value}" for name, value in variables.items()]
        self._must("make", "image", *words, "BUILD_FLAGS=--isolation chroot")

    def _must(self, *words: str | Path) -> None:
        done = subprocess.run(
            [str(word) for word in words],
            env=self.env,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{words[0]}: {done.stdout[-6000:]}"


RESTRICTED = (
    *("--read-only", "--read-only-tmpfs=false", "--user=1000:1000", "--cap-drop=all"),
    *("--security-opt=no-new-privileges", "--tmpfs=/tmp", "--tmpfs=/scratch:mode=1777"),
    *LIMITS,
)


@contextmanager
def containers(folder: Path) -> Iterator[Containers]:
    """Containers whose storage is this empty folder, gone at the end."""
    (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    made = Containers(folder, {**os.environ, "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "PATH": path})
    try:
        yield made
    finally:
        made.podman("rm", "--all", "--force", "--time=0")
        made.podman("rmi", "--all", "--force")
        subprocess.run(["umount", folder / "images/overlay"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Pod:
    """A pod of the chart on a host: what the kubelet would make of its spec.

    Args:
        manifests: all that the chart renders, for the ConfigMaps that it mounts.
        secrets: variables of the secrets that it names, as name and value.
    """

    containers: Containers
    name: str
    spec: Mapping[str, Any]
    manifests: Sequence[Mapping[str, Any]]
    host: Host
    secrets: Mapping[str, str]

    def start(self, script: str, **env: str) -> None:
        """The pod's container, with KubeRay's command around `script`."""
        done = self._podman("--detach", script, env)
        assert done.returncode == 0, done.stderr

    def run(self, script: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """The same, until it ends."""
        return self._podman("--rm", script, env)

    def exec(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """A command in the container that was started, as its preStop."""
        return self.containers.podman("exec", self.name, *words)

    def logs(self) -> str:
        done = self.containers.podman("logs", self.name)
        return done.stdout + done.stderr

    def _podman(self, kind: str, script: str, more: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        [container] = self.spec["containers"]
        plain = {one["name"]: str(one["value"]) for one in container["env"]}
        secrets = {**more, **(self.secrets if "envFrom" in container else {})}
        command = [*PODMAN, "run", kind, f"--name={self.name}", *self._options(container)]
        command += [f"--env={name}={value}" for name, value in plain.items()]
        command += [f"--env={name}" for name in secrets]  # from podman's own environment: on no command line
        command += ["--entrypoint=", IMAGE, "/bin/bash", "-ce", "--", script]
        around = {**self.containers.env, **secrets}
        return subprocess.run(command, env=around, capture_output=True, text=True, timeout=240)

    def _options(self, container: Mapping[str, Any]) -> Iterator[str]:
        """What the kubelet takes from the securityContext of pod and container, and from its volumes."""
        pod, own = self.spec["securityContext"], container["securityContext"]
        assert own["readOnlyRootFilesystem"] and own["capabilities"] == {"drop": ["ALL"]}
        assert own["allowPrivilegeEscalation"] is False
        yield from ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")
        yield from (f"--user={pod['runAsUser']}:{pod['runAsGroup']}", *LIMITS)
        yield from (f"--network=ns:/proc/{self.host.pid}/ns/net", f"--hostname={self.host.name}")
        yield f"--add-host={self.host.name}:{self.host.address}"
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        for mount in container["volumeMounts"]:
            yield from self._mount(volumes[mount["name"]], mount["mountPath"], pod["fsGroup"])

    def _mount(self, volume: Mapping[str, Any], path: str, group: int) -> Iterator[str]:
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            yield f"--tmpfs={path}:mode=1777"
            return
        folder = self.containers.folder / "pods" / self.name / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            [data] = [one["data"] for one in self.manifests if one["metadata"]["name"] == volume["configMap"]["name"]]
            for name, text in data.items():
                (folder / name).write_text(text)
            yield f"--volume={folder}:{path}:ro"
        else:
            assert "emptyDir" in volume, volume
            os.chown(folder, 0, group)
            folder.chmod(0o2777)
            yield f"--volume={folder}:{path}"
