"""Folders made once on a node: by one process, whole, and removed by the last that uses them."""

import fcntl
import multiprocessing
import os
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


TEMPORARY = """
import sys, time
from pathlib import Path
from job.made_once import made_once

def fill(draft, folder, stays):
    time.sleep(0.02)
    (draft / "a").write_text("whole")
    if sys.argv[1] == "fails":
        raise OSError(28, "No space left on device")

for name in sys.argv[1:]:
    folder = made_once(None, "key", fill)
    assert (folder / "a").read_text() == "whole"
    time.sleep(0.02)
    assert (folder / "a").read_text() == "whole"
"""


def temporary(tmp_path: Path, word: str = "works") -> subprocess.Popen[str]:
    """A process that wants a temporary folder and leaves it."""
    words = [sys.executable, "-c", TEMPORARY, word]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    return subprocess.Popen(words, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)


def test_the_last_process_removes_a_temporary_folder_with_its_lock_file(tmp_path: Path) -> None:
    running = [temporary(tmp_path) for _ in range(6)]
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in running] == [("", 0)] * 6
    (root,) = tmp_path.iterdir()
    assert list(root.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_filled_leaves_no_lock_file(tmp_path: Path) -> None:
    failed = temporary(tmp_path, "fails")
    assert "No space left on device" in failed.communicate(timeout=60)[1] and failed.returncode == 1
    (root,) = tmp_path.iterdir()
    assert list(root.iterdir()) == []


def test_who_waited_for_a_lock_file_that_was_removed_takes_the_one_that_is_there(tmp_path: Path) -> None:
    root = tmp_path / f"qlora-converted-{os.getuid()}"
    root.mkdir(mode=0o700)
    with open(root / "key.lock", "ab") as removed:
        fcntl.flock(removed, fcntl.LOCK_EX)
        waiting = temporary(tmp_path)
        locks = Path("/proc/locks")
        deadline = time.monotonic() + 30
        while f"-> FLOCK  ADVISORY  READ {waiting.pid} " not in locks.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        (root / "key.lock").unlink()
        with open(root / "key.lock", "ab") as there:
            fcntl.flock(there, fcntl.LOCK_EX)
            removed.close()
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(0.5)
            assert sorted(path.name for path in root.iterdir()) == ["key.lock"], "it makes nothing beside us"
    assert (waiting.communicate(timeout=60)[1], waiting.returncode) == ("", 0)
    assert list(root.iterdir()) == []
