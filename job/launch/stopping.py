"""Asking a run to save and stop, wherever it goes: by a file in its output folder, which every start removes."""

from job.config.running import Storage
from job.errors import OutputError
from job.lease import STOP_KEY
from job.store import Store
from job.telling import telling

WHAT_THEN = (
    "The run looks for it every 15 s, ends the step it is in, writes a checkpoint and the adapter, and ends as "
    "interrupted; the same command goes on from there"
)


def ask_to_stop(url: str, storage: Storage | None) -> None:
    """Make the file.

    Args:
        url: the run's output address.
        storage: how it is reached, when that is known.

    Raises:
        OutputError: it cannot be written.
    """
    cure = "Check the keys in the environment, or end the job at once with --now"
    with telling(OutputError, f"output.url: {url}: {STOP_KEY} cannot be written", cure):
        Store(url, storage).write(STOP_KEY, b"qlora cancel\n")
