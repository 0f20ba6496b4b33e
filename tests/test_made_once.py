"""Folders made once on a node: by one process, whole, and removed by the last that uses them."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job import made_once
from job.errors import ModelError
from tests.conftest import REPOSITORY


def fill_slowly(root: Path, number: int) -> None:
    """A process that wants a folder which takes a while to make, and notes that it made it."""

    def fill(draft: Path, folder: Path, stays: bool) -> None:
        (root / f"made-{number}").touch()
        (draft / "a").write_text("half")
        time.sleep(0.3)
        (draft / "a").write_text("whole")

    assert (made_once.made_once(root / "cache", "key", fill) / "a").read_text() == "whole"


def test_of_processes_at_once_one_makes_the_folder_and_all_find_it_whole(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    workers = [forked.Process(target=fill_slowly, args=(tmp_path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list(tmp_path.glob("made-*"))) == 1


KILLED = """
import os, sys
from pathlib import Path
from job.made_once import made_once

def fill(draft, folder, stays):
    (draft / "a").write_text("half")
    os._exit(9)

made_once(Path(sys.argv[1]), "key", fill)
"""


def test_what_a_killed_process_left_half_is_not_used(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=REPOSITORY, check=False).returncode == 9
    assert (tmp_path / "key.draft/a").read_text() == "half" and not (tmp_path / "key").exists()
    folder = made_once.made_once(tmp_path, "key", lambda draft, folder, stays: (draft / "b").touch())
    assert sorted(path.name for path in folder.iterdir()) == ["b"] and not (tmp_path / "key.draft").exists()


def test_a_temporary_folder_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_once.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(made_once.os, "getuid", lambda: 12345)
    with pytest.raises(
        ModelError, match=r"cannot be written \(the folder belongs to another user\). Set storage.cache"
    ):
        made_once.made_once(None, "key", lambda draft, folder, stays: None)
