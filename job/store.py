"""Folders and files at any URL, through fsspec: the package's only way to bytes outside the process."""

import errno
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from http import HTTPStatus
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any, Self
from uuid import uuid4

import fsspec
from fsspec.core import url_to_fs
from fsspec.utils import infer_compression

from job.config.running import Storage

_MEMORY = threading.Lock()  # fsspec's memory looks for a file and then makes it, in two steps
_CONFLICTS = 5
ANSWER_S = 120.0
SLOWEST = 1 << 18
"""Seconds that a call may take, and bytes a second that go on top. Drivers wait without end for a server that takes a
request and says nothing: a put for the word to go on, its body for room in the connection."""


class Store:
    """A folder at a URL (file, s3, gs, http, memory, hf, or a plain path).

    Args:
        url: the folder.
        storage: endpoint and addressing of S3-compatible servers; keys come from the environment.
    """

    def __init__(self, url: str, storage: Storage | None = None):
        self.url, self.storage = url.rstrip("/"), storage or Storage()
        fs, self.root = url_to_fs(self.url, **fs_options(self.url, self.storage))
        self._driver = [fs]
        self.is_local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)

    @property
    def fs(self) -> Any:
        """fsspec's file system."""
        return self._driver[0]

    def child(self, name: str) -> Self:
        """The folder `name` inside this one."""
        inside = type(self)(f"{self.url}/{name}", self.storage)
        inside._driver = self._driver
        return inside

    def renew(self) -> None:
        """Read the keys as they are now, for this store, the folders inside it and all stores made from now on."""
        type(self.fs).clear_instance_cache()
        self._driver[0], _ = url_to_fs(self.url, **fs_options(self.url, self.storage))

    def _within(self, nbytes: float = 0) -> dict[str, float]:
        """The time limit of a call that moves so many bytes, for drivers that take one; inf has none."""
        takes_one = getattr(self.fs, "async_impl", False) and nbytes < inf
        return {"timeout": ANSWER_S + nbytes / SLOWEST} if takes_one else {}

    def path(self, name: str) -> str:
        """The file's path as its file system wants it."""
        return f"{self.root.rstrip('/')}/{name}"

    def names(self, folders: bool = False) -> list[str]:
        """Names of the files (and folders) directly inside, sorted; empty when there is no such folder."""
        try:
            found = self.fs.ls(self.root, detail=True, **self._within())
        except (FileNotFoundError, NotADirectoryError):
            return []
        if not self.is_local:  # some object stores keep an empty object for the folder itself
            found = [entry for entry in found if entry["name"].rstrip("/") != self.root.rstrip("/")]
        return sorted(PurePosixPath(entry["name"]).name for entry in found if folders or _is_file(entry))

    def missing_bucket(self) -> str | None:
        """The bucket's name when there is no such bucket: objects of one read as merely not found."""
        bucket = self.root.partition("/")[0]
        return bucket if is_s3(self.url) and not self.fs.exists(bucket, **self._within()) else None

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self.fs.exists(self.path(name), **self._within()))

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The file's bytes [start, stop), by one ranged read; fewer when the file ends before.

        Raises:
            FileNotFoundError: no such file.
        """
        try:
            most = stop - (start or 0) if stop is not None else self.size(name) if is_s3(self.url) else inf
            return bytes(self.fs.cat_file(self.path(name), start=start, end=stop, **self._within(most)))
        except OSError as fault:
            if start is not None and answer(fault)[0] == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # behind the end
                return b""
            raise

    def size(self, name: str) -> int:
        """The file's length, bytes."""
        return int(self.fs.size(self.path(name), **self._within()))

    def write(self, name: str, content: bytes) -> None:
        """Write the whole file; readers see the old content or the new, never a part."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), content, **self._within(len(content)))
            return
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        draft = f"{target}.{os.getpid()}.part"
        try:
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except BaseException:  # a full disk, Ctrl-C
            Path(draft).unlink(missing_ok=True)
            raise

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet, in one step: of several callers at once exactly one makes it.

        Args:
            name: the file.
            content: put something unique into it. Clients send a put again whose answer was lost, and hear then that
                the file exists: who finds just this content there takes it for its own.

        Returns:
            Whether this call made the file; if not, it is what it was.

        Raises:
            OSError: the storage failed, or cannot do this: a local file system without hard links.
        """
        for attempt in range(_CONFLICTS):
            try:
                self._put_new(name, content)
                return True
            except Exception as fault:  # drivers differ in what they raise
                status = answer(fault)[0]
                if isinstance(fault, FileExistsError) or status == HTTPStatus.PRECONDITION_FAILED:
                    break
                if status != HTTPStatus.CONFLICT or attempt == _CONFLICTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)  # AWS: another put or removal is under way, its outcome open
        with suppress(FileNotFoundError):  # removed since
            return self.read(name) == content
        return False

    def _put_new(self, name: str, content: bytes) -> None:
        if not self.is_local:
            with _MEMORY if self.url.startswith("memory:") else nullcontext():
                self.fs.pipe_file(self.path(name), content, mode="create", **self._within(len(content)))
            return
        # a file opened with O_EXCL would be seen before its content, and stay empty if we died in between
        draft = f"{name}.{uuid4().hex}.part"
        try:
            self.write(draft, content)
            os.link(self.path(draft), self.path(name))
        except OSError as fault:
            if fault.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(errno.EOPNOTSUPP, "this file system has no hard links") from fault
            raise
        finally:
            self.remove(draft, missing_ok=True)

    def age_s(self, name: str) -> float:
        """Seconds since the file was last written, by the clock of the storage, so that hosts' clocks may differ.

        S3 tells whole seconds: it may be one too many or too few.

        Raises:
            FileNotFoundError: no such file.
        """
        written = self.fs.modified(self.path(name))
        probe = f"{name}.{uuid4().hex}.probe"
        self.write(probe, b"now")
        try:
            return max(float((self.fs.modified(self.path(probe)) - written).total_seconds()), 0.0)
        finally:
            self.remove(probe, missing_ok=True)

    def append(self, name: str, content: bytes) -> None:
        """Add to the end of a file of a local folder.

        Raises:
            NotImplementedError: the storage is not local; object stores cannot append.
        """
        if not self.is_local:
            raise NotImplementedError(f"{self.url} cannot append")
        os.makedirs(self.root, exist_ok=True)
        with open(self.path(name), "ab", buffering=0) as file:
            before, written = file.tell(), 0
            try:
                while written < len(content):  # a disk that fills up takes a part, and only then refuses
                    written += file.write(content[written:])
            except OSError:
                file.truncate(before)
                raise

    def remove(self, name: str, missing_ok: bool = False) -> None:
        """Delete the file.

        Raises:
            FileNotFoundError: no such file, on storage that says so; not with `missing_ok`.
        """
        try:
            self.fs.rm_file(self.path(name), **self._within())
        except FileNotFoundError:
            if not missing_ok:
                raise


def _is_file(entry: dict[str, Any]) -> bool:
    """Whether it is a file or, as in the hub's cache, a link to one, which fsspec calls "other"."""
    return entry["type"] == "file" or bool(entry.get("islink") and Path(entry["name"]).is_file())


def fs_options(url: str, storage: Storage) -> dict[str, Any]:
    """fsspec's options for a URL: S3 gets endpoint, region, addressing and authorities; others need none."""
    if url.startswith(("gs://", "gcs://")):
        return {"use_listings_cache": False}  # as below
    if not is_s3(url):
        return {"auto_mkdir": True} if "://" not in url or url.startswith("file://") else {}
    client: dict[str, Any] = {}
    if storage.endpoint:
        client["endpoint_url"] = storage.endpoint
    if storage.region:
        client["region_name"] = storage.region
    if storage.ca_bundle:
        client["verify"] = storage.ca_bundle
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write into the same folders
    if client:
        options["client_kwargs"] = client
    if storage.path_style:
        options["config_kwargs"] = {"s3": {"addressing_style": "path"}}
    return options


def open_text(url: str, storage: Storage | None = None, **how: Any) -> Any:
    """Open one file as UTF-8 text, decompressed by its ending (.gz, .bz2, .xz, .zst, .zip)."""
    options = fs_options(url, storage or Storage())
    return fsspec.open(url, "rt", encoding="utf-8", compression=compression(url), **how, **options)


def compression(url: str) -> str | None:
    """fsspec's name of the compression that the file's ending says; None without one."""
    return infer_compression(without_query(url))  # type: ignore[no-any-return]


def without_query(text: str) -> str:
    """The text with every http address up to its `?` or `#`: the file's name ends there, and behind it may be a
    signature, which no message may show."""
    return re.sub(r"(https?://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", text)


def is_s3(url: str) -> bool:
    """Whether the URL is one of S3 or a compatible server."""
    return url.startswith(("s3://", "s3a://"))


def is_url(name: str) -> bool:
    """Whether the name has a scheme, such as s3://."""
    return "://" in name


def reason(fault: BaseException) -> str:
    """A storage fault in a few words: fsspec's drivers differ in what they raise."""
    if isinstance(fault, FileNotFoundError):
        return "not found"
    if isinstance(fault, PermissionError):
        return "access denied" + ("" if fault.filename else " (are the keys in the environment right?)")
    if isinstance(fault, TimeoutError) and not str(fault):
        return "no answer in time"
    if type(fault).__name__ == "NoCredentialsError":
        return "no keys. Put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into the environment or an .env file"
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"


def answer(fault: BaseException | None) -> tuple[int | None, Mapping[str, str]]:
    """HTTP status and headers of the answer behind an exception, as far as it carries them.

    aiohttp's exception has both; s3fs raises an OSError from botocore's, whose `response` is a dictionary; httpx's and
    requests' have a response object.
    """
    while fault is not None:
        response = getattr(fault, "response", None)
        if isinstance(response, dict):
            about = response.get("ResponseMetadata", {})
            return about.get("HTTPStatusCode"), about.get("HTTPHeaders", {})
        found = fault if response is None else response
        status = getattr(found, "status_code", None) or getattr(found, "status", None)
        if isinstance(status, int):
            return status, getattr(found, "headers", None) or {}
        fault = fault.__cause__
    return None, {}
