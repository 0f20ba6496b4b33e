"""A real S3 server on loopback: SeaweedFS, which checks signatures as AWS does (moto accepts wrong keys)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

KEY, SECRET, BUCKET = "AKIATESTKEY", "a-very-secret-key", "bucket"
ADMIN_KEY, ADMIN_SECRET = "AKIAADMIN", "another-secret-key"
PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"),
)
FLAGS = ("s3.port.iceberg=0", "s3.port.lance=0", "volume.preStopSeconds=0", "master.telemetry=false")
SIZES = ("master.volumeSizeLimitMB=64", "volume.max=20", "volume.minFreeSpace=0")


@dataclass(frozen=True)
class S3:
    """A running server with one bucket."""

    endpoint: str

    @property
    def env(self) -> dict[str, str]:
        """The keys as the user's environment holds them."""
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}

    @property
    def storage(self) -> dict[str, Any]:
        """The run file's section."""
        return {"endpoint": self.endpoint, "region": "us-east-1", "path_style": True}

    def fs(self, key: str = KEY, secret: str = SECRET) -> Any:
        """A client of the tests' own, which remembers nothing."""
        forgetful = {"use_listings_cache": False, "skip_instance_cache": True}
        return fsspec.filesystem("s3", key=key, secret=secret, endpoint_url=self.endpoint, **forgetful)


@contextmanager
def serve(folder: Path) -> Iterator[S3]:
    """Run the server with its data under `folder`; ended by its id."""
    for attempt in range(3):  # another process may take a port between our look and the server's
        process, endpoint = _start(folder / str(attempt))
        try:
            if _is_up(process, endpoint):
                server = S3(endpoint)
                server.fs(ADMIN_KEY, ADMIN_SECRET).mkdir(BUCKET)
                yield server
                return
        finally:
            process.send_signal(signal.SIGKILL)  # its data is thrown away: no need to wait for a shutdown
            process.wait()
    raise RuntimeError(f"no S3 server: {(folder / '2/log').read_text()[-2000:]}")


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    (folder / "data").mkdir(parents=True)
    # an admin's write creates a missing bucket, a user's does not
    users = [_user("admin", ADMIN_KEY, ADMIN_SECRET, "Admin"), _user("user", KEY, SECRET, "Read", "Write", "List")]
    (folder / "s3.json").write_text(json.dumps({"identities": users}))
    ports = _free_ports(len(PORTS))
    words = [f"{name}={port}" for name, port in zip(PORTS, ports, strict=True)]
    where = (f"dir={folder}/data", "ip=127.0.0.1", "ip.bind=127.0.0.1", "filer", "s3", f"s3.config={folder}/s3.json")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "weed", "-logtostderr=true", "server"]
            + [f"-{word}" for word in (*where, *words, *FLAGS, *SIZES)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "HOME": str(folder)},
            start_new_session=True,  # the terminal's Ctrl-C is for the tests
        )
    return process, f"http://127.0.0.1:{ports[PORTS.index('s3.port')]}"


def _user(name: str, key: str, secret: str, *actions: str) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _is_up(process: subprocess.Popen[bytes], endpoint: str) -> bool:
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{endpoint}/healthz", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False
