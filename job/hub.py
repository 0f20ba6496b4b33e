"""The hub: its models' files, downloaded or read where they are, with patience when it is busy.

It answers 429 when too many ask, and says how long to wait. The pauses here are said, each in one line.
"""

import re
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers

from job.config.learning import Model
from job.errors import ModelError
from job.headers import read_headers
from job.reading import LONGEST_PAUSE_S, answer, pause, retry_after_s
from job.store import Store, reason
from job.tensors import Files, Tensor

PAUSES_S = (2.0, 8.0, 30.0, 60.0, 120.0)
"""Seconds between the tries of a request when the hub does not say how long to wait; its limits count 5 minutes."""
BUSY = (429, 503)
"""Answers that another try mends."""
TIMEOUT_S = 30
"""Seconds that a request for part of a file may stand still."""

Say = Callable[[str], None]
T = TypeVar("T")


def aside(line: str) -> None:
    """Say it where it is not taken for what a verb prints, which may be JSON."""
    print(line, file=sys.stderr, flush=True)


def offline() -> bool:
    """Whether HF_HUB_OFFLINE says that there is no network: then only what was downloaded before is there."""
    return bool(constants.HF_HUB_OFFLINE)


def snapshot(model: Model, files: Sequence[str], say: Say = aside) -> str:
    """The local folder with the model's files that match the patterns, downloaded unless they are there already.

    Args:
        model: hub id and revision.
        files: patterns such as *.json.
        say: hears of each pause.

    Raises:
        ModelError: the name is no hub id, the hub has no such model or revision for this account, or does not answer.
    """
    _refuse_no_id(model)
    other_formats = ["original/*", "consolidated*"]  # the same weights once more
    how: dict[str, Any] = {"allow_patterns": list(files), "ignore_patterns": other_formats}
    return _patiently(
        model, lambda: str(huggingface_hub.snapshot_download(model.name, revision=model.revision, **how)), say
    )


def hub_headers(model: Model, say: Say = aside) -> dict[str, Tensor]:
    """All tensors of a hub model by name, from the headers of its safetensors files; no weights are downloaded.

    Raises:
        ModelError: as `snapshot`, and as `job.headers.read_headers`.
    """
    return read_headers(published_files(model, say))


def published_files(model: Model, say: Say = aside) -> Files:
    """The model's files, to be read in part: on the hub, or in the local cache of a machine without network.

    Raises:
        ModelError: as `snapshot`.
    """
    if offline():
        return Store(snapshot(model, ("config.json", "*.safetensors", "*.safetensors.index.json"), say))
    return Repository(model, say)


class Repository:
    """The files of a hub model, read where they are: names and sizes in one request, then ranges.

    Args:
        model: hub id and revision; a branch stays at the commit that it has now.
        say: hears of each pause.

    Raises:
        ModelError: as `snapshot`.
    """

    def __init__(self, model: Model, say: Say = aside):
        _refuse_no_id(model)
        self._model, self._say, self.url = model, say, model.name
        asked = partial(huggingface_hub.HfApi().model_info, model.name, revision=model.revision, files_metadata=True)
        about: Any = _patiently(model, asked, say)
        self._commit = about.sha
        files = [file for file in about.siblings or () if "/" not in file.rfilename]
        self._sizes = {file.rfilename: int(file.size or 0) for file in files}

    def names(self) -> list[str]:
        """Names of the files directly inside, sorted."""
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        """The file's length, bytes."""
        return self._sizes[name]

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The file's bytes [start, stop); fewer when the file ends before.

        Raises:
            ModelError: as `snapshot`.
        """
        size = self.size(name)
        first, last = start or 0, size if stop is None else min(size, stop)
        return _patiently(self._model, lambda: self._get(name, first, last), self._say) if first < last else b""

    def _get(self, name: str, start: int, stop: int) -> bytes:
        url = huggingface_hub.hf_hub_url(self._model.name, name, revision=self._commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and (start, stop) != (0, self.size(name)):
                raise OSError(f"{name}: the server does not know ranges")  # it would send all of the weights
            return bytes(response.read())


def _refuse_no_id(model: Model) -> None:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model.name):
        raise ModelError(f"model.name: {model.name}: no such folder, and no hub id (owner/name). Check the path")


def _patiently(model: Model, ask: Callable[[], T], say: Say) -> T:
    """What `ask` gives, asked again after a pause while the hub says that it is busy."""
    for tries in range(len(PAUSES_S) + 1):
        try:
            return ask()
        except Exception as fault:  # the hub's client raises many kinds
            status, _ = answer(fault)
            if status not in BUSY:
                raise _refusal(model, fault) from fault
            if tries == len(PAUSES_S):
                raise ModelError(
                    f"model.name: {model.name}: the hub answered {status} (busy) to {tries + 1} tries. Start the run "
                    "again later, put an account's token into HF_TOKEN (its limits are wider), or copy the model into "
                    "a folder or bucket"
                ) from fault
            asked_s = _asked_pause_s(fault)
        waited_s = PAUSES_S[tries] if asked_s is None else asked_s
        say(f"{model.name}: the hub is busy (HTTP {status}), trying again in {waited_s:.0f} s")
        pause(waited_s, threading.Event())
    raise AssertionError("the last try returns or raises")


def _asked_pause_s(fault: BaseException) -> float | None:
    """Seconds that the hub asked to wait, by Retry-After or by its own RateLimit header; None when it did not."""
    asked_s = retry_after_s(fault)
    if asked_s is not None:
        return asked_s
    _, headers = answer(fault)
    limit = parse_ratelimit_headers(headers)
    return min(float(limit.reset_in_seconds), LONGEST_PAUSE_S) if limit and not limit.remaining else None


def _refusal(model: Model, fault: Exception) -> ModelError:
    """The hub's refusal in our words."""
    status, _ = answer(fault)
    if isinstance(fault, RevisionNotFoundError):
        said = f"the hub has no revision {model.revision} of it. Give a branch, tag or commit as model.revision"
    elif isinstance(fault, GatedRepoError) or status == 403:
        said = (
            f"its owner gives it only to some accounts. Ask for it at {constants.ENDPOINT}/{model.name} "
            "and put the token of an account that has it into HF_TOKEN"
        )
    elif status in (401, 404):
        said = "no such folder, and the hub has no such model for this account. Check the path, or the id and HF_TOKEN"
    else:
        why = "HF_HUB_OFFLINE is set" if offline() else f"{constants.ENDPOINT}: {reason(_cause(fault))}"
        return ModelError(
            f"model.name: {model.name} is no folder here and cannot be had from the hub ({why}). Check the path, or "
            "the id and HF_TOKEN; without a way to the hub, name a folder or bucket, or a mirror in HF_ENDPOINT"
        )
    return ModelError(f"model.name: {model.name}: {said}")


def _cause(fault: BaseException) -> BaseException:
    """What the client's "not in the cache" hides."""
    return fault.__cause__ if isinstance(fault, FileNotFoundError) and fault.__cause__ else fault
