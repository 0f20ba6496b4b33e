"""A run into SLURM's queue: looked at first, then handed to sbatch, whose refusals become a sentence."""

import re
from collections.abc import Callable, Mapping, Sequence

from job.config import RunConfig
from job.errors import ConfigError, InputError, OutputError
from job.launch.slurm.commands import ask
from job.launch.slurm.jobs import find, show
from job.launch.slurm.pending import in_words, never_starts
from job.launch.slurm.request import Request, Wanted, address, sweep_runs
from job.plan import make_plan
from job.run_folder import RunFolder
from job.world import Hardware, World

Say = Callable[[str], None]
CURES = (
    ("Invalid partition|invalid partition", "sinfo lists the partitions; give one with --partition"),
    (
        "Invalid account|account/partition",
        "sacctmgr show associations user=$USER lists your accounts; give one with --account",
    ),
    ("qos|QOS", "sacctmgr show qos lists them; give one with --option=--qos=NAME"),
    ("time limit|--time", "sinfo --format='%P %l' lists the limits; give --time as HH:MM:SS"),
    ("feature", "sinfo --format='%P %f' lists the features"),
    (
        "node configuration|Memory specification|Node count|CPU count|gres|GRES|More processors",
        "sinfo --format='%P %D %c %m %G' lists nodes, CPUs, memory and GPUs of partitions; lower --nodes, "
        "--gpus-per-node or --cpus-per-task",
    ),
    ("unrecognized option|ambiguous", "sbatch --help lists its options"),
    ("Unable to contact|Connection|timed out", "scontrol ping tells whether the controller is up"),
)
"""What sbatch says, and where to look."""


def look_first(config: RunConfig, path: str, words: Sequence[str], wanted: Wanted) -> str:
    """Refuse what can be known to fail before anything is queued; the output address. Model and rows are left to the
    nodes: a login node need not reach them.

    Args:
        config: the settings that the run file `path` and `words` come to.

    Raises:
        InputError: ranks and batches do not go together, the output folder is not this run's, or the run is done.
    """
    for run in [config] if wanted.sweep is None else sweep_runs(path, words, wanted.sweep):
        _look_at(run, wanted, done_is_fine=wanted.sweep is not None)  # a sweep goes on where some runs are done
    return address(config.output.url)


def _look_at(config: RunConfig, wanted: Wanted, done_is_fine: bool) -> None:
    if config.output.url.startswith("memory://"):
        raise OutputError(f"output.url: {config.output.url} goes with its process. Use a folder or a bucket")
    gpus = wanted.gpus_per_node
    if gpus:
        ranks = (wanted.nodes or 1) * gpus
        try:
            make_plan(config, World(world_size=ranks, local_world_size=gpus), Hardware("cuda", "", True, 80.0, gpus))
        except ConfigError as fault:
            raise ConfigError(f"the settings for {ranks} ranks, {gpus} a node", fault.faults) from fault
    folder = RunFolder(config)
    if done_is_fine:
        folder.already_finished()  # refuses a folder that is another's
    else:
        folder.refuse_finished()


def submit(request: Request, url: str, env: Mapping[str, str], say: Say) -> str:
    """Queue it; the job's id.

    Args:
        url: its output address, of which there may be one job at a time.
        env: sbatch's environment, which it hands on to the job.
        say: hears what is wrong with a job that was taken and will not start.

    Raises:
        InputError: SLURM refuses it, or a job of this output is queued or runs already.
    """
    for job in find(url):
        if job.active:
            raise InputError(
                f"job {job.id} of {url} is {job.state} already, and two runs of one output.url exclude each other. "
                f"Look at it with qlora status --job {job.id}, or end it with qlora cancel --job {job.id}"
            )
    answer = ask(*request.words(), site=request.site, env=env)
    if answer.code:
        raise InputError(f"sbatch did not take the job: {answer.reason}. {_cure(answer.err)}")
    number = answer.out.strip().splitlines()[-1].partition(";")[0]  # behind it the cluster's name, where there are more
    for job in show(number):
        if never_starts(job.reason):
            say(f"Warning: job {number} was taken, but cannot start: {in_words(job)}. End it with scancel {number}")
    return number


def _cure(said: str) -> str:
    return next((cure for pattern, cure in CURES if re.search(pattern, said)), "sbatch's manual says what it means")
