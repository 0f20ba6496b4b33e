"""What the batch scripts in slurm/ ask on the first node of a job; each answer is one line on stdout.

python -m job.launch.slurm open FOLDER CONFIG [section.key=value ...]    go, or done
python -m job.launch.slurm nodes FOLDER PORT [--leave-out] [--only-warn] address, port and names of the nodes
python -m job.launch.slurm close FOLDER CODE                             done, again, stopped or failed, and a code
python -m job.launch.slurm faults FOLDER                                 what failed first
python -m job.launch.slurm sweep CONFIG FILE TASK [section.key=value ...]  a setting a line
python -m job.launch.slurm keep FOLDER                                   (the environment, for ranks over ssh)
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from job.config import RunConfig, load_config, load_dotenv_file
from job.errors import InputError, JobError, OutputError
from job.launch.blame import Failure, first_failure
from job.launch.outcome import outcome
from job.launch.slurm.allocation import HOSTFILE, Start, address_of_first, hostfile, nodes_of
from job.launch.slurm.rank import ENVIRONMENT
from job.launch.slurm.sweep import settings_of
from job.lease import held_by
from job.preflight.facts import Facts
from job.preflight.judge import judge
from job.run_folder import RunFolder
from job.uploads import passes

ALLOCATION, FACTS, VERDICT, WARNING = "allocation", "facts.*", "verdict.json", "warning"
PATIENCE_S, PAUSE_S = 120.0, 5.0
THEIR_OWN = ("RANK", "WORLD_SIZE", "LOCAL_", "CROSS_", "MASTER_", "CUDA_VISIBLE_DEVICES", "SLURMD_", "SSH_")
"""Variables of which each node or rank has its own, by their beginnings."""
OF_THE_HOST = ("HOSTNAME", "PWD", "OLDPWD", "SHLVL", "TMPDIR", "SLURM_LOCALID", "SLURM_PROCID", "SLURM_NODEID", "_")


def open_job(folder: Path, words: Sequence[str]) -> str:
    """Whether there is something to do, before any rank starts.

    Raises:
        InputError: the settings are wrong, or the output folder is another run's.
    """
    config = _config(words)
    run = _folder_of(config)
    if run.already_finished():
        _say(f"This run is finished already ({run.status.step if run.status else 0} steps): {run.store.url}")
        return "done"
    before, step = (run.status.updated, run.status.step) if run.status else ("", 0)
    job, fruitless = os.environ["SLURM_JOB_ID"], 0
    with suppress(JobError):  # this is the first start
        last = Start.read(folder)
        fruitless = last.fruitless + 1 if (last.job, last.step) == (job, step) else 0
    Start(job, tuple(words), config.output.url, before, step, fruitless=fruitless).save(folder)
    return "go"


def _folder_of(config: RunConfig) -> RunFolder:
    """The run's folder; storage that does not answer is asked for a while, for a job would be lost with it.

    Raises:
        OutputError: it cannot be used, or has not answered for so long.
    """
    end = time.monotonic() + min(PATIENCE_S, 60 * config.storage.retry_minutes)
    while True:
        try:
            return RunFolder(config)
        except OutputError as fault:
            lasting = fault.__cause__ is None or not passes(fault.__cause__)
            if lasting or time.monotonic() > end:
                raise
            _say(f"{fault}; asked again")
            time.sleep(PAUSE_S)


def nodes(folder: Path, options: Sequence[str]) -> str:
    """Judge what the nodes said, and write the hostfile.

    Args:
        options: first the port from which on they looked for a free one.

    Raises:
        JobError: a node is bad, or the first has no free port.
        InputError: none is left.
    """
    start = Start.read(folder)
    allocation = (folder / ALLOCATION).read_text()
    lines = [line for file in sorted(folder.glob(FACTS)) for line in file.read_text().splitlines()]
    facts = [Facts.parse(line) for line in lines if line.startswith("{")]
    verdict = judge(facts, [line.split()[0] for line in allocation.splitlines()])
    for line in verdict.lines():
        _say(line)
    without: Sequence[str] = ()
    if "--leave-out" in options and (without := list(dict.fromkeys((*verdict.bad, *_found_bad_together(folder))))):
        _say(f"left out: {', '.join(without)}")
    elif verdict.bad and "--only-warn" not in options:
        bad = ", ".join(verdict.bad)
        exclude = f"sbatch --exclude={','.join(verdict.bad)}"
        raise JobError(f"{bad}: see above. Exclude with {exclude}, or set QLORA_LEAVE_OUT=1")
    found = nodes_of(allocation, facts, _config(start.words).parallel.processes, without)
    (folder / HOSTFILE).write_text(hostfile(found))
    replace(start, nodes=found).save(folder)
    port = next((one.port for one in facts if one.node == found[0].name), int(options[0]))
    if not port:
        raise JobError(f"{found[0].name} has no free port from {options[0]} on. Leave it out, or end what holds them")
    address = address_of_first(found, os.environ.get("SLURMD_NODENAME", ""))
    return f"{address} {port} {','.join(node.name for node in found)}"


def _found_bad_together(folder: Path) -> list[str]:
    """Nodes that the ranks found bad when they spoke to each other."""
    file = folder / VERDICT
    return list(json.loads(file.read_text())["faults"]) if file.exists() else []


def close_job(folder: Path, code: int) -> str:
    """What comes next, by what the run recorded."""
    start = Start.read(folder)
    config = _config(start.words)
    run = _folder_of(config)
    status, holder = run.status, held_by(run.store)
    ours = holder is None or holder.job_id == start.job  # else another run's, and this one was refused
    this_start = ours and status is not None and status.updated != start.before
    failure = _failure(start, folder)
    cause = failure.lines[-1] if failure and not failure.follows else ""
    enough = start.fruitless >= config.checkpoint.max_restarts
    found = outcome(status, this_start, start.step, (folder / WARNING).exists(), code, cause, enough)
    if found.verdict == "failed" and status and this_start:
        run.abandon(found.why, datetime.fromisoformat(status.updated))
    _say(f"{run.store.url}: {found.why}")
    return f"{found.verdict} {found.code}"


def faults(folder: Path) -> str:
    """What failed first in this start of the job."""
    found = _failure(Start.read(folder), folder)
    if found is None:
        return f"no rank said why; see {folder}/*.log"
    return "\n".join([f"what failed first, on {found.node}:", *(f"[{found.rank}] {line}" for line in found.lines)])


def _failure(start: Start, folder: Path) -> Failure | None:
    logs = {node.name: folder / f"{node.name}.log" for node in start.nodes}
    return first_failure({name: log.read_text(errors="replace") for name, log in logs.items() if log.exists()})


def keep_environment(folder: Path) -> str:
    """Write the environment down for ranks that get none from their launcher. Secrets are in it: the file is its
    owner's alone, and the batch script removes it."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(THEIR_OWN) and name not in OF_THE_HOST
    }
    file = folder / ENVIRONMENT
    file.unlink(missing_ok=True)  # whoever made it: its mode would stay
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(kept, out)
    return str(file)


def _config(words: Sequence[str]) -> RunConfig:
    load_dotenv_file()
    return load_config(words[0], words[1:])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(verb: str, *words: str) -> None:
    """Answer one question."""
    folder = Path(words[0] if words else ".")
    answers: dict[str, Callable[[], str]] = {
        "open": lambda: open_job(folder, words[1:]),
        "nodes": lambda: nodes(folder, words[1:]),
        "close": lambda: close_job(folder, int(words[1])),
        "faults": lambda: faults(folder),
        "sweep": lambda: "\n".join(settings_of(words[0], Path(words[1]), words[2], words[3:])),
        "keep": lambda: keep_environment(folder),
    }
    if verb not in answers:
        raise InputError(f"{verb}: expected one of {', '.join(answers)}")
    print(answers[verb]())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except JobError as fault:
        _say(f"{type(fault).__name__}: {fault}")
        sys.exit(fault.exit_code)
