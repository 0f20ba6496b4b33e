"""Several ranks of `qlora train` on this machine, started as any launcher does: by environment variables."""

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.forked import Command, Done


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
