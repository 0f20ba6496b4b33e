"""Where a secret shows on a Ray cluster: to whoever sees its processes, logs, job server and the run's output."""

import urllib.request
from collections.abc import Iterator
from contextlib import suppress

import psutil

from tests.cluster.ray_cluster import RayCluster
from tests.s3 import S3

ANSWERS = ("jobs/", "train/v2/runs/v1")


def ask(cluster: RayCluster, path: str) -> bytes:
    """What the dashboard answers to /api/PATH."""
    request = urllib.request.Request(f"{cluster.server}/api/{path}")
    request.add_header("Authorization", f"Bearer {cluster.env['RAY_AUTH_TOKEN']}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def seen(cluster: RayCluster, s3: S3, output: str) -> Iterator[tuple[str, bytes]]:
    """Everything that others see, each with where it stands: command lines of all processes of this host, what the
    nodes wrote and unpacked, what the dashboard answers, and what lies in the bucket under `output`."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield f"process {process.pid}", "\0".join(process.cmdline()).encode()
    for path in cluster.folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()
    for path in ANSWERS:
        yield f"/api/{path}", ask(cluster, path)
    for path in s3.fs().find(output):
        with suppress(FileNotFoundError):  # a run that goes on removes what it needs no more
            yield path, s3.fs().cat_file(path)


def told(cluster: RayCluster, s3: S3, output: str, *secrets: str) -> list[str]:
    """Where any of these secrets or the cluster's token stands.

    Raises:
        AssertionError: there was little to look at.
    """
    planted = [secret.encode() for secret in (*secrets, cluster.env["RAY_AUTH_TOKEN"])]
    found = list(seen(cluster, s3, output))
    kinds = ("process ", f"{cluster.folder}/0/session", f"{cluster.folder}/1/session", "/api/jobs/", f"{output}/")
    assert all(any(where.startswith(kind) and content for where, content in found) for kind in kinds)
    return [where for where, content in found if any(secret in content for secret in planted)]
