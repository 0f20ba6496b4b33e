"""A request to a Ray cluster's job server as data: what would be typed, without a secret. Nothing here contacts it."""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.config import RunConfig
from job.errors import InputError, OutputError
from job.launch.ray_train.shape import Wanted
from job.launch.slurm.request import address, tag

OUTPUT = "qlora_output"
"""Under which a job's metadata has the address of its output."""
RUN_FILE = "run.yaml"


def headline(output: str) -> str:
    """The first line of a run's driver: by it a job is found that came with no metadata, by plain `ray job submit`."""
    return f"{OUTPUT}: {output}"


@dataclass(frozen=True)
class Request:
    """What the job server is asked for.

    Args:
        server: its address.
        entrypoint: the command, as a shell reads it.
        name: the job's id there.
        output: the run's output address.
        files: name and content of what the working folder holds, when `folder` is None.
        folder: the working folder.
    """

    server: str
    entrypoint: str
    name: str
    output: str
    files: Mapping[str, str]
    folder: str | None

    def lines(self) -> list[str]:
        """As a command, for people."""
        where = self.folder or f"A FOLDER WITH {', '.join(self.files)}"
        metadata = json.dumps({OUTPUT: self.output})
        words = ["--address", self.server, "--submission-id", self.name, "--working-dir", where]
        words += ["--metadata-json", metadata]
        return [f"ray job submit {shlex.join(words)} \\", f"  -- {self.entrypoint}"]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def make_request(
    config: RunConfig, path: str, words: Sequence[str], wanted: Wanted, server: str, folder: str | None
) -> Request:
    """The request for a run.

    Args:
        config: the settings that the run file `path` and `words` come to.
        folder: a working folder that goes with the job; `path` lies in it.

    Raises:
        InputError: the run file is not in the folder, or output.url is a folder of this machine.
    """
    url = config.output.url
    if "://" not in url and not url.startswith("/"):
        raise OutputError(
            f"output.url: {url} is a path on this machine. Use a bucket, or a folder that all nodes share"
        )
    run_file = RUN_FILE
    if folder is not None:
        inside, whole = Path(path).resolve(), Path(folder).resolve()
        if whole not in inside.parents:
            raise InputError(f"{path} is not in --working-dir {folder}. Put it there, or leave --working-dir out")
        run_file = str(inside.relative_to(whole))
    options = []
    for name, value in (("nodes", wanted.nodes), ("gpus-per-node", wanted.gpus_per_node)):
        options += [f"--{name}", str(value)] if value is not None else []
    command = [
        "qlora",
        "train",
        "--on",
        "ray",
        *options,
        "--wait-minutes",
        f"{wanted.wait_minutes:g}",
        run_file,
        *words,
    ]
    return Request(
        server=server,
        entrypoint=shlex.join(command),
        name=f"qlora-{tag(address(url))}-{time.strftime('%Y%m%d-%H%M%S')}",
        output=address(url),
        files={} if folder else {RUN_FILE: Path(path).read_text(encoding="utf-8")},
        folder=folder,
    )
