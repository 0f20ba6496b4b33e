"""Several ranks of `qlora train` on this machine, started as any launcher does: by environment variables."""

import os
import random
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.forked import Command, Done


def free_port() -> int:
    """A port that nobody listens on, nor is given until it is bound: neither by the system, which gives those from
    32768 on, nor by another worker of pytest, nor as one for workers of this machine."""
    first = 20000 + 6000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2)
    while True:
        port = random.SystemRandom().randrange(first, first + 6000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(count: int, *words: str | Path, per_node: int = 0, env: Mapping[str, str] | None = None) -> list[Done]:
    """`qlora` with these words in `count` processes that know of each other, as if on nodes of `per_node`."""
    port = free_port()
    here = per_node or count
    with ExitStack() as stack:
        commands = []
        for rank in range(count):
            about = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, **about}
            variables = {name: str(value) for name, value in place.items()} | dict(env or {})
            commands.append(stack.enter_context(Command(*words, env=variables)))
        return [command.wait() for command in commands]
