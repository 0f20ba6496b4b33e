"""Where a merged model comes to lie. What is cut off at any moment is no model, and the same merge goes on with it.

`merge.json` is there first, and says which merge it is and how it stands. Files of weights appear whole; config.json,
without which nothing takes them for a model, comes last.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from job.config.running import Storage
from job.errors import OutputError
from job.headers import INDEX
from job.merged import Result, header
from job.store import Store
from job.telling import telling
from job.uploads import patiently
from job.whole_files import appearing

MARKER, CONFIG = "merge.json", "config.json"
Files = Mapping[str, Sequence[Result]]
"""Names of the files of weights, and the tensors in each."""
_DRAFT = re.compile(r".+\.[0-9a-f]+\.part|merge\.json\..+\.part")
"""A file that its writer was killed over."""


def refuse_other_files(out: Store) -> None:
    """Refuse a folder that holds anything but a merge, before much is read.

    Raises:
        OutputError: it does, or cannot be reached.
    """
    with telling(OutputError, out.url):
        there = [name for name in out.names(folders=True) if not name.startswith((".", f"{MARKER}."))]
    if there and MARKER not in there:
        raise OutputError(
            f"{out.url} holds files that are no merge ({', '.join(there[:5])}). Use an empty or a new folder"
        )


class MergedFolder:
    """The folder of one merge.

    Args:
        out: where it is.
        about: which merge it is, for people.
        key: the same for programs: equal for merges that write equal bytes.
        storage: how long its failures are borne, and whether it refuses to create a file twice.
        say: hears what is there already, and of failures.
    """

    def __init__(self, out: Store, about: Mapping[str, str], key: str, storage: Storage, say: Callable[[str], None]):
        self.out, self.about, self.key, self.say = out, about, key, say
        self.retry_s, self.conditional = storage.retry_minutes * 60, storage.lease

    def begin(self, files: Files, last: Mapping[str, bytes]) -> bool:
        """Take the folder; whether there is anything left to do. A finished merge that lost something since is one that
        was cut off.

        Args:
            last: what `last_files` gives.

        Raises:
            OutputError: it holds something else, or cannot be reached.
            JobError: the storage failed.
        """
        refuse_other_files(self.out)
        with telling(OutputError, self.out.url):
            there = self.out.names()
            state = self._state(self.out.read(MARKER)) if MARKER in there else self._take()
            for name in there:
                if _DRAFT.fullmatch(name):
                    self.out.remove(name, missing_ok=True)
            lost = self._lost(there, files, last) if state == "finished" else []
        if lost:
            self.say(f"the merge was finished, but {', '.join(lost)} is not whole any more: written again")
            self._write(MARKER, self._marker("running"))
            self.out.remove(CONFIG, missing_ok=True)
        return state != "finished" or bool(lost)

    def write_weights(
        self,
        name: str,
        file: Sequence[Result],
        contents: Callable[[], Iterator[memoryview]],
        progress: Callable[[int], None],
    ) -> None:
        """Write a file, unless it is there: files appear whole, so one of the right size is done.

        Args:
            contents: makes the bytes of its tensors, anew for each try.
            progress: hears of bytes that are written.

        Raises:
            JobError: the storage failed. And what `contents` raises.
        """
        head = header(file)
        if self.out.exists(name) and self.out.size(name) == _size(file):
            self.say(f"{name} is there already")
            progress(_size(file) - len(head))
            return

        def write() -> None:
            with appearing(self.out, name) as put:
                put(memoryview(head))
                for content in contents():
                    put(content)
                    progress(len(content))

        patiently(write, name, self.retry_s, self.say, self.out)

    def finish(self, last: Mapping[str, bytes]) -> None:
        """Make the files a model.

        Args:
            last: what `last_files` gives.

        Raises:
            JobError: the storage failed.
        """
        for name, content in last.items():
            self._write(name, content)
        self._write(MARKER, self._marker("finished"))

    def _lost(self, there: Sequence[str], files: Files, last: Mapping[str, bytes]) -> list[str]:
        """What is missing or cut off; a small file that somebody changed is neither."""
        weights = [name for name, file in files.items() if name not in there or self.out.size(name) != _size(file)]
        small = [name for name, content in last.items() if name not in there or self._is_cut_off(name, content)]
        return weights + small

    def _is_cut_off(self, name: str, content: bytes) -> bool:
        return self.out.size(name) < len(content) and content.startswith(self.out.read(name))

    def _take(self) -> str:
        content = self._marker("running")
        if not self.conditional:
            self.out.write(MARKER, content)
        elif not self.out.create(MARKER, content):
            raise OutputError(f"{self.out.url} was taken by another merge just now. Use another folder")
        return "running"

    def _state(self, text: bytes) -> str:
        try:
            marker = json.loads(text)
            known, state = marker["key"], str(marker["state"])
        except (ValueError, KeyError, TypeError) as fault:
            raise OutputError(
                f"{self.out.url}/{MARKER} is damaged ({fault!r}). Use an empty or a new folder"
            ) from fault
        if known != self.key:
            same = all(marker.get(name) == about for name, about in self.about.items())
            said = ", ".join(f"{name} {marker.get(name)}" for name in self.about)
            said = "of the same adapter or base, which have changed since" if same else said
            raise OutputError(f"{self.out.url} holds another merge ({said}). Use an empty or a new folder")
        return state

    def _marker(self, state: str) -> bytes:
        return json.dumps({"state": state, **self.about, "key": self.key}, indent=1).encode()

    def _write(self, name: str, content: bytes) -> None:
        patiently(partial(self.out.write, name, content), name, self.retry_s, self.say, self.out)


def last_files(files: Files, small: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, bytes]:
    """What makes the files of weights a model, in the order of writing: small files, index, settings."""
    last = dict(small)
    if list(files) != ["model.safetensors"]:
        last[INDEX] = _index(files)
    return {**last, CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode()}


def _size(file: Sequence[Result]) -> int:
    return len(header(file)) + sum(result.nbytes for result in file)


def _index(files: Files) -> bytes:
    places = {result.tensor.name: name for name, file in files.items() for result in file}
    total = sum(result.nbytes for file in files.values() for result in file)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2).encode()
