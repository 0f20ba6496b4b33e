"""The check before a run over many nodes, which are processes of this machine that say they are nodes.

    python -m bench.preflight_nodes NODES ... [--ranks RANKS_A_NODE]

For each number of nodes: all of them report at once, as in the first step of a SLURM job, and are judged; then their
ranks exchange on CPUs, by gloo. Real nodes start their processes side by side; here the cores of one machine start all
of them, which is most of the seconds that it prints. Results with date and hardware: bench/RESULTS.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from job.preflight.facts import Facts
from job.preflight.judge import judge
from tests.ranks import free_port

DEMO = Path(__file__).parent.parent / "configs/smollm2-135m-demo.yaml"
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
LIMIT_S = 300
"""For the exchange: what these cores take to start is not to end it."""


def main(counts: Sequence[int], ranks: int) -> None:
    print(f"{len(os.sched_getaffinity(0))} cores; seconds", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for nodes in counts:
            print(json.dumps(measure(nodes, ranks, folder)), flush=True)


def measure(nodes: int, ranks: int, folder: str) -> dict[str, object]:
    """The seconds of each part of the check."""
    words = [str(DEMO), f"output.url={folder}/out"]
    names = [f"n{number}" for number in range(1, nodes + 1)]
    begun = time.monotonic()
    lines, _ = run([["preflight", *words, "--report"]] * nodes, [{"SLURMD_NODENAME": name} for name in names])
    reported = time.monotonic()
    verdict = judge([Facts.parse(line) for line in lines], names)
    if not verdict.ok:
        raise SystemExit("\n".join(verdict.lines()))
    judged = time.monotonic()
    size = nodes * ranks
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": ranks}
    envs = [{**place, "RANK": rank, "LOCAL_RANK": rank % ranks} for rank in range(size)]
    command = ["preflight", *words, "--nodes", ",".join(names), "--timeout", str(LIMIT_S)]
    before = time.monotonic()
    said, ends = run([command] * size, [{name: str(value) for name, value in env.items()} for env in envs])
    stages = re.search(r"^  seconds: (.*)$", said[0], re.MULTILINE)
    return {
        "nodes": nodes,
        "ranks": size,
        "reports": round(reported - begun, 1),
        "judgement": round(judged - reported, 3),
        "exchange": round(max(ends) - before, 1),
        "of that by stages": stages[1] if stages else "",
    }


def run(commands: Sequence[Sequence[str]], envs: Sequence[dict[str, str]]) -> tuple[list[str], list[float]]:
    """What these `qlora` commands say when they run at once, and when each had ended."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "job", *command],
            env={**os.environ, **ALONE, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, env in zip(commands, envs, strict=True)
    ]
    said, ends = [], []
    for process in running:
        out, err = process.communicate()
        ends.append(time.monotonic())
        if process.returncode:
            raise SystemExit(f"{out}{err}")
        said.append(out)
    return said, ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=int, nargs="+")
    parser.add_argument("--ranks", type=int, default=1)
    given = parser.parse_args()
    main(given.nodes, given.ranks)
