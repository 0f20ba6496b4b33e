"""Whether this node can read the rows and write the output."""

from contextlib import suppress
from uuid import uuid4

from job.config import RunConfig
from job.data.rows import files_of, is_hub_id, named, parted, rows_of
from job.errors import DataError, JobError, OutputError
from job.lease import FOLDER, prove_conditional_puts
from job.run_folder import RunFolder
from job.store import Store, reason, without_query
from job.telling import telling


def storage_fault(config: RunConfig) -> str:
    """What of data and output cannot be used from here, a sentence; empty when all can.

    Rows on the hub are not asked for: they may lie in this machine's cache. Each node writes a file of its own into the
    run's folder and removes it, for each rank writes its part of a checkpoint.
    """
    try:
        for setting, sources in (("data.train", config.data.train), ("evaluation.file", config.evaluation.file)):
            with rows_of(setting):
                for source in [sources] if isinstance(sources, str) else sources or ():
                    _read_a_byte(source, config)
        _prove_writable(config)
    except JobError as fault:
        return str(fault)
    except Exception as fault:  # every driver has its own errors; a check may not end by one
        return f"storage: {without_query(reason(fault))}"
    return ""


def _read_a_byte(source: str, config: RunConfig) -> None:
    source, _ = parted(source)
    if is_hub_id(source):
        return
    url = files_of(source, config.storage)[0]
    try:
        store = Store(url, config.storage)
        if url.startswith(("http://", "https://")):  # a server that knows no ranges would send all of it
            with store.fs.open(store.root, "rb", block_size=1 << 16) as file:
                file.read(1)
        else:
            store.fs.cat_file(store.root, start=0, end=1)
    except Exception as fault:  # every driver has its own errors
        raise DataError(f"{named(url)}: cannot be read: {without_query(reason(fault))}") from fault


def _prove_writable(config: RunConfig) -> None:
    """Refuse what the run would refuse of its folder, and write there.

    Raises:
        OutputError: the folder cannot be written, holds another run, or what is no run.
    """
    folder = RunFolder(config)
    folder.already_finished()
    if config.storage.lease:
        prove_conditional_puts(folder.store)
        return
    name = f"{FOLDER}/{uuid4().hex}.probe"
    try:
        with telling(OutputError, f"output.url: {config.output.url} cannot be written", cure=""):
            folder.store.write(name, b"preflight")
            if folder.store.read(name) != b"preflight":
                raise OSError("what was written came back as something else")
    finally:
        with suppress(Exception):
            folder.store.remove(name, missing_ok=True)
