"""Folders made once on a node, however many processes want them: whole or not there, removed when nobody keeps them."""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from job.errors import ModelError

Fill = Callable[[Path, Path, bool], None]
"""Writes what belongs into a folder: hears the draft to write into, the folder that it becomes, whether it stays."""


def made_once(cache: Path | None, key: str | None, fill: Fill) -> Path:
    """The folder `key`, filled by the first process that wants it while others wait.

    A draft becomes the folder by a rename, so a half-filled one is never used.

    Args:
        cache: where it stays; without it the folder is temporary, and the last process of the node that uses it
            removes it when it exits. One that a killed process left is used, then removed, by the next.
        key: what it holds, as a file name; None when that has no name: then each process makes its own.
        fill: raises ModelError when it cannot.

    Raises:
        ModelError: the disk is full or cannot be written, or what `fill` raised.
    """
    stays = cache is not None and key is not None
    root = cache if cache is not None and stays else Path(tempfile.gettempdir(), f"qlora-converted-{os.getuid()}")
    folder = root / (key or uuid4().hex)
    if stays and folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o777 if stays else 0o700)
        if not stays and root.stat().st_uid != os.getuid():
            raise PermissionError("the folder belongs to another user")  # who could change what we made
        held = _filled(folder, fill, stays)
    except (OSError, SafetensorError) as fault:
        why = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
        raise ModelError(
            f"{folder} cannot be written ({why}). Set storage.cache_dir to a folder on a disk with room for the model"
        ) from fault
    if stays:
        held.close()
    else:
        atexit.register(_leave, folder, held)
    return folder


def _filled(folder: Path, fill: Fill, stays: bool) -> BufferedWriter:
    """The folder's lock file, locked for those who share the folder: while it is open nobody removes it."""
    while True:
        lock = open(f"{folder}.lock", "ab")  # noqa: SIM115  # held until nobody uses the folder
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_there(lock) and folder.is_dir():
                return lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_there(lock) and not folder.is_dir():
                _make(folder, fill, stays)
        except BaseException:
            if not stays:
                _leave(folder, lock)
            lock.close()
            raise
        lock.close()


def _is_there(lock: BufferedWriter) -> bool:
    """Whether the file that is locked is still the one that others find: who leaves a folder removes both."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), Path(lock.name).stat())
    except FileNotFoundError:
        return False


def _make(folder: Path, fill: Fill, stays: bool) -> None:
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # whoever wrote it is gone: we have the lock
    draft.mkdir()
    try:
        fill(draft, folder, stays)
        for path in draft.rglob("*"):  # after a power cut a renamed file may have its length and not its bytes
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        draft.rename(folder)
    except BaseException:  # a full disk, Ctrl-C
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _leave(folder: Path, lock: BufferedWriter) -> None:
    """Remove the folder and its lock file unless another process holds them."""
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if _is_there(lock):  # while a shared lock becomes an exclusive one another process may remove both first
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)
