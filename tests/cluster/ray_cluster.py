"""A Ray cluster of several nodes on this host, with token authentication on; each node is a process group of ours."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY
from tests.ranks import free_port

BIN = Path(sys.executable).parent
LEAST = {"RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class RayCluster:
    """A head that gives no CPUs, and nodes of one CPU each.

    Args:
        folder: logs of the nodes; short, for Ray makes sockets below it.
        env: what all its processes and clients have in their environment.
    """

    folder: Path
    env: dict[str, str]
    address: str = ""
    server: str = ""
    nodes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start_head(self) -> None:
        """The head, with its job server."""
        port, dashboard = free_port(), free_port()
        self.server = f"http://127.0.0.1:{dashboard}"
        words = ("--head", f"--port={port}", "--num-cpus=0", f"--dashboard-port={dashboard}")
        self._start(*words, "--include-dashboard=true")
        found = self.until(r"Local node IP: (\S+)", 0)
        self.until("Ray runtime started", 0)
        self.address = f"{found[1]}:{port}"
        self.env |= {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.server}

    def add_node(self, cpus: int = 1) -> int:
        """One more; its number."""
        self._start(f"--address={self.address}", f"--num-cpus={cpus}")
        number = len(self.nodes) - 1
        self.until("Ray runtime started", number)
        return number

    def _start(self, *words: str) -> None:
        log = self.folder / f"node{len(self.nodes)}.log"
        with open(log, "wb") as out:
            env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
            own = f"--temp-dir={self.folder / str(len(self.nodes))}"  # as on hosts of their own
            command = [BIN / "ray", "start", *words, own, "--num-gpus=0", "--block", "--disable-usage-stats"]
            self.nodes.append(subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True))

    def until(self, pattern: str, node: int, timeout_s: float = 60) -> "re.Match[str]":
        """Wait until a node has said something."""
        end, log = time.monotonic() + timeout_s, self.folder / f"node{node}.log"
        while True:
            text = re.sub(r"\x1b\[[\d;]*m", "", log.read_text(errors="replace"))
            if found := re.search(pattern, text):
                return found
            assert time.monotonic() < end and self.nodes[node].poll() is None, text
            time.sleep(0.2)

    def kill(self, number: int) -> None:
        """A node is gone at once, with everything that runs on it."""
        with suppress(psutil.NoSuchProcess):
            node = psutil.Process(self.nodes[number].pid)
            for process in [node, *node.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.nodes[number].wait()

    def qlora(self, *words: str | Path, cwd: Path | None = None, **more: str) -> "subprocess.CompletedProcess[str]":
        """The command, as a client of this cluster; `more` is for its environment, "" to leave a variable out."""
        return self.run(sys.executable, "-m", "job", *words, cwd=cwd, **more)

    def run(self, *words: str | Path, cwd: Path | None = None, **more: str) -> "subprocess.CompletedProcess[str]":
        """Any command, as a client of this cluster."""
        return subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=cwd or REPOSITORY,
            env={name: value for name, value in {**self.env, **more}.items() if value or name not in more},
        )

    def charted(self, name: str, run: str) -> float:
        """A number of a run among the metrics that the nodes give to Prometheus; 0 while there is none."""
        (found,) = json.loads((self.folder / "0/prom_metrics_service_discovery.json").read_text())
        for target in found["targets"]:
            with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if line.startswith(f"ray_qlora_{name}{{") and f'run="{run}"' in line:
                        return float(line.split()[-1])
        return 0.0

    def pids(self, *words: str) -> list[int]:
        """Processes of this cluster in whose command line these words stand."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                own = process.environ().get("RAY_AUTH_TOKEN") == self.env["RAY_AUTH_TOKEN"]
                if own and all(word in " ".join(process.cmdline()) for word in words):
                    found.append(process.pid)
        return found


@contextmanager
def ray_cluster(folder: Path, nodes: int, env: Mapping[str, str]) -> Iterator[RayCluster]:
    """A head and so many nodes; at the end all that they started is gone."""
    path = f"{BIN}:{os.environ['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    cluster = RayCluster(folder, {**os.environ, **LEAST, **token, **env, "PATH": path})
    try:
        cluster.start_head()
        for _ in range(nodes):
            cluster.add_node()
        yield cluster
    finally:
        for number in reversed(range(len(cluster.nodes))):
            cluster.kill(number)
        for pid in cluster.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
