"""What srun starts on each node of a job: a launcher that a scheduler's signals do not reach.

python -m job.launch.slurm.node FOLDER deepspeed --hostfile F --no_ssh --node_rank={node_rank} ...

A scheduler sends SIGTERM to every process of a job. DeepSpeed's launcher then ends the ranks 30 s later, saved or not.
So the signals are blocked here, which launchers inherit; a run hears them again (job.stop).
"""

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from job.errors import JobError
from job.launch.slurm.allocation import HOSTFILE, Start

NODE_RANK = "{node_rank}"
BLOCKED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def node_rank(hosts: str, env: Mapping[str, str]) -> int:
    """This node's number in the hostfile, whatever order the scheduler gave its tasks.

    Raises:
        JobError: it is not there.
    """
    names = [line.split()[0] for line in hosts.splitlines()]
    here = env.get("SLURMD_NODENAME", "")
    if here not in names:
        raise JobError(f"node {here or 'without a name'} is not in the hostfile ({', '.join(names)})")
    return names.index(here)


def main(folder: str, *command: str) -> None:
    """Become the command, with {node_rank} replaced. Without it the command starts ranks elsewhere, and this node need
    not have any."""
    start, words = Start.read(Path(folder)), list(command)  # says so where the folder is not there
    if any(NODE_RANK in word for word in words):
        rank = node_rank(Path(folder, HOSTFILE).read_text(), os.environ)
        words = [word.replace(NODE_RANK, str(rank)) for word in words]
        with_gpus = bool(start.nodes[rank].gpus)
    else:
        with_gpus = any(node.gpus for node in start.nodes)
    if not with_gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for others, and says so
    beside = Path(sys.executable).parent / words[0]  # the same environment's
    program = str(beside) if beside.exists() else shutil.which(words[0])
    if program is None:
        raise JobError(f"there is no command {words[0]} on this node. Install the package there as on the others")
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    os.execv(program, [program, *words[1:]])  # noqa: S606 - the command that came


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except JobError as fault:
        sys.exit(f"{type(fault).__name__}: {fault}")
