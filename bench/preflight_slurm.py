"""The start of a job on a SLURM of many nodes, all of them hosts of this machine (as root; see CONTRIBUTING.md).

    python -m bench.preflight_slurm NODES [nodes|full]

Prints the seconds from the first line of the batch script until the ranks of the run are started: settings are read,
every node reports and is judged, and under `full` all ranks exchange. The cores of this one machine start the processes
of all nodes. Results with date and hardware: bench/RESULTS.md.
"""

import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import yaml

from tests.cluster.batch import ZERO3, Batch
from tests.cluster.slurm import slurm
from tests.conftest import REPOSITORY

LIMIT_S = 600
"""For the check: what these cores take to start is not to end it."""


def main(nodes: int, checks: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slurm").mkdir()
        values = yaml.safe_load((REPOSITORY / "configs/smollm2-135m-demo.yaml").read_text())
        values["data"]["train"] = str(REPOSITORY / values["data"]["train"])
        values["evaluation"]["file"] = str(REPOSITORY / values["evaluation"]["file"])
        values["output"]["url"] = str(folder / "out")
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        with slurm(folder / "slurm", {f"n{number + 1}": 0 for number in range(nodes)}) as cluster:
            words = (f"--nodes={nodes}", ZERO3, folder / "run.yaml")
            env = {"QLORA_PREFLIGHT": checks, "QLORA_PREFLIGHT_S": str(LIMIT_S)}
            batch = Batch(cluster, folder / "work", *words, **env)
            batch.wait_for("starts on ", timeout_s=LIMIT_S)
            cluster.command("scancel", str(batch.id))
            batch.ended()
            log = (batch.place / f"qlora-{batch.id}.log").read_text().splitlines()
            reports = [file.stat() for file in batch.folder.glob("facts.*")]
    begun, started = (
        next(datetime.fromisoformat(line.split()[0]) for line in log if words in line)
        for words in (f" job {batch.id} on ", " starts on ")
    )
    last = max(report.st_mtime for report in reports) - begun.timestamp()
    print(f"{nodes} nodes, {len(os.sched_getaffinity(0))} cores, {checks}: last report after {last:.0f} s, ", end="")
    print(f"ranks started after {(started - begun).total_seconds():.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "full")
