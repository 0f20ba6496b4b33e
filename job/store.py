"""Folders and files at any URL, through fsspec: the package's only way to bytes outside the process."""

import os
from pathlib import PurePosixPath
from typing import Any, Self

import fsspec
from fsspec.core import url_to_fs

from job.config.running import Storage


class Store:
    """A folder at a URL (file, s3, gs, http, memory, hf, or a plain path).

    Args:
        url: the folder.
        storage: endpoint and addressing of S3-compatible servers; keys come from the environment.
    """

    def __init__(self, url: str, storage: Storage | None = None):
        self.url, self.storage = url.rstrip("/"), storage or Storage()
        self.fs, self.root = url_to_fs(self.url, **fs_options(self.url, self.storage))
        self.is_local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)

    def child(self, name: str) -> Self:
        """The folder `name` inside this one."""
        return type(self)(f"{self.url}/{name}", self.storage)

    def path(self, name: str) -> str:
        """The file's path as its file system wants it."""
        return f"{self.root.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Names of the files directly inside, sorted; empty when there is no such folder."""
        try:
            found = self.fs.ls(self.root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(PurePosixPath(entry["name"]).name for entry in found if entry["type"] == "file")

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The file's bytes [start, stop), by one ranged read.

        Raises:
            FileNotFoundError: no such file.
        """
        return bytes(self.fs.cat_file(self.path(name), start=start, end=stop))

    def write(self, name: str, content: bytes) -> None:
        """Write the whole file; readers see the old content or the new, never a part."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), content)
            return
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        draft = f"{target}.{os.getpid()}.part"
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)

    def append(self, name: str, content: bytes) -> None:
        """Add to the end of a file of a local folder.

        Raises:
            NotImplementedError: the storage is not local; object stores cannot append.
        """
        if not self.is_local:
            raise NotImplementedError(f"{self.url} cannot append")
        os.makedirs(self.root, exist_ok=True)
        with open(self.path(name), "ab", buffering=0) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Delete the file."""
        self.fs.rm_file(self.path(name))


def fs_options(url: str, storage: Storage) -> dict[str, Any]:
    """fsspec's options for a URL: S3 gets endpoint, region, addressing and authorities; others need none."""
    if not url.startswith(("s3://", "s3a://")):
        return {"auto_mkdir": True} if "://" not in url or url.startswith("file://") else {}
    client: dict[str, Any] = {}
    if storage.endpoint:
        client["endpoint_url"] = storage.endpoint
    if storage.region:
        client["region_name"] = storage.region
    if storage.ca_bundle:
        client["verify"] = storage.ca_bundle
    options: dict[str, Any] = {"client_kwargs": client} if client else {}
    if storage.path_style:
        options["config_kwargs"] = {"s3": {"addressing_style": "path"}}
    return options


def open_text(url: str, storage: Storage | None = None, **how: Any) -> Any:
    """Open one file as UTF-8 text, decompressed by its ending (.gz, .bz2, .xz, .zst, .zip)."""
    options = fs_options(url, storage or Storage())
    return fsspec.open(url, "rt", encoding="utf-8", compression="infer", **how, **options)


def is_url(name: str) -> bool:
    """Whether the name has a scheme, such as s3://."""
    return "://" in name


def reason(fault: BaseException) -> str:
    """A storage fault in a few words: fsspec's drivers differ in what they raise."""
    if isinstance(fault, FileNotFoundError):
        return "not found"
    if isinstance(fault, PermissionError):
        return "access denied (are the keys in the environment right?)"
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
