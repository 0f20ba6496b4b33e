"""What a launcher looks at before it sends a run to where other keys and folders are than here."""

from collections.abc import Callable
from pathlib import Path

from job.config import RunConfig
from job.errors import ConfigError, JobError, OutputError
from job.launch.slurm.request import address
from job.plan import make_plan
from job.run_folder import RunFolder
from job.world import Hardware, World

Say = Callable[[str], None]


def look_first(config: RunConfig, nodes: int, gpus_per_node: int, who: str, say: Say) -> str:
    """Refuse what can be known to fail before anything is sent; the output address. Model and rows are left to those
    who run it: this machine need not reach them.

    Args:
        gpus_per_node: 0 when nobody says how many ranks there will be.
        who: looks into the output with keys of its own, in words.
        say: hears that the output folder cannot be read from here. That is common, and no fault: its keys may be only
            there, where they look for themselves.

    Raises:
        InputError: ranks and batches do not go together, the output folder is not this run's, or the run is done.
    """
    if gpus_per_node:
        ranks = nodes * gpus_per_node
        world = World(world_size=ranks, local_world_size=gpus_per_node)
        try:
            make_plan(config, world, Hardware("cuda", "", True, 80.0, gpus_per_node))
        except ConfigError as fault:
            raise ConfigError(f"the settings for {ranks} ranks, {gpus_per_node} a node", fault.faults) from fault
    try:
        folder = RunFolder(config)
    except OutputError as fault:
        if not _lies_elsewhere(address(config.output.url), fault):
            raise
        say(f"Warning: {fault}. It was not looked into: {who}")
        return address(config.output.url)
    folder.refuse_finished()
    return address(config.output.url)


def _lies_elsewhere(url: str, fault: OutputError) -> bool:
    """Whether others may reach an output that this machine does not: storage that fails here, or a folder that is not
    here."""
    if fault.__cause__ is None:
        return url.startswith("/") and not Path(url).exists()
    return not isinstance(fault.__cause__, (JobError, ValueError, TypeError, ImportError))
