"""One command on several hosts through the launchers that people use there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import Host

BIN = Path(sys.executable).parent
ON_EACH_HOST = {
    "OMP_NUM_THREADS": "1",  # all hosts share this machine's cores
}
ENV = {**os.environ, **ON_EACH_HOST, "CUDA_VISIBLE_DEVICES": ""}
LIMIT_S = 150


class Launched:
    """The same command on one or several hosts; the first host's run says where it stands."""

    def __init__(self, folder: Path, commands: dict[Host, list[str | Path]], **more: str):
        # all that `deepspeed` hands on over ssh beside PYTHON*, and on GPUs NCCL*, PATH and LD_LIBRARY_PATH
        file = folder / "deepspeed_env"
        file.write_text("".join(f"{name}={value}\n" for name, value in {**ON_EACH_HOST, **more}.items()))
        env = {**ENV, **more, "DS_ENV_FILE": str(file)}
        self.logs = [folder / f"log.{host.name}" for host in commands]
        self.running = [
            host.start(*words, env=env, log=log) for (host, words), log in zip(commands.items(), self.logs, strict=True)
        ]

    def said(self) -> str:
        """What all wrote so far."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def codes(self, timeout_s: float = LIMIT_S) -> list[int]:
        """Wait for all; their exit codes."""
        try:
            return [process.wait(timeout_s) for process in self.running]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s} s\n{self.said()}")


def write_hostfile(folder: Path, both: list[Host], slots: int = 1) -> Path:
    """A hostfile, as of MPI."""
    path = folder / "hostfile"
    path.write_text("".join(f"{host.name} slots={slots}\n" for host in both))
    return path


def over_ssh(folder: Path, both: list[Host], *words: str | Path, slots: int = 1, **more: str) -> Launched:
    """`deepspeed` on the first host, which starts all through pdsh."""
    options = ("--hostfile", write_hostfile(folder, both, slots), "--num_nodes", "2", "--num_gpus", str(slots))
    return Launched(folder, {both[0]: [BIN / "deepspeed", *options, "--module", *words]}, **more)


def without_ssh(folder: Path, both: list[Host], *words: str | Path, **more: str) -> Launched:
    """`deepspeed` on each host, as srun or an operator starts it."""
    options = ("--hostfile", write_hostfile(folder, both), "--no_ssh", "--master_addr", both[0].address)
    commands = {
        host: [BIN / "deepspeed", *options, f"--node_rank={rank}", "--module", *words] for rank, host in enumerate(both)
    }
    return Launched(folder, commands, **more)


def with_torchrun(folder: Path, both: list[Host], *words: str | Path) -> Launched:
    """`torchrun` on each host."""
    options = ("--nnodes=2", "--nproc-per-node=1", f"--master-addr={both[0].address}")
    commands = {
        host: [BIN / "torchrun", *options, f"--node-rank={rank}", "-m", *words] for rank, host in enumerate(both)
    }
    return Launched(folder, commands)
