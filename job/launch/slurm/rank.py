"""A rank as DeepSpeed's launcher starts it in a job: what it says goes into its node's log, each line with its number.

deepspeed --hostfile F --module job.launch.slurm.rank FOLDER VERB [OPTION ...]
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from job.launch.slurm.allocation import Start, own_gpus

ENVIRONMENT = "environment.json"
"""What ranks that are started over ssh are to have in their environment, readable by its owner alone."""


def main(words: Sequence[str]) -> None:
    """Become `qlora VERB` with the words of the job.

    Args:
        words: --local_rank=N, which DeepSpeed puts first and LOCAL_RANK says as well; the job's folder; the verb, and
            options of it.
    """
    folder, verb, *options = [word for word in words if not word.startswith("--local_rank")]
    start = Start.read(Path(folder))
    if (kept := Path(folder, ENVIRONMENT)).exists():
        os.environ.update(json.loads(kept.read_text()))
    os.environ.update(own_gpus(start, os.environ))
    number_lines(Path(folder, f"{start.nodes[int(os.environ['CROSS_RANK'])].name}.log"), os.environ["RANK"])
    # the folder is there for whoever has to find this process: what is started over ssh no scheduler ends
    command = [sys.executable, "-X", f"qlora_job={folder}", "-u", "-m", "job", verb, *start.words, *options]
    os.execv(sys.executable, command)  # noqa: S606 - our own


def number_lines(log: Path, rank: str) -> None:
    """Have everything that this process and its children write appended to `log`, each line behind [rank].

    A process of its own does so, for the last words of one that crashes are the ones that matter.
    """
    reader, writer = os.pipe()
    if not os.fork():
        os.close(writer)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # it ends when nobody writes any more
        with open(reader, "rb") as lines, open(log, "ab", buffering=0) as out:
            for line in lines:
                with suppress(OSError):  # a full disk costs lines, not the run
                    out.write(f"[{rank}] ".encode() + line.rstrip(b"\n") + b"\n")  # at once: ranks share the file
        os._exit(0)
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)


if __name__ == "__main__":
    main(sys.argv[1:])
