"""Empty folders of each kind of storage."""

import secrets

import pytest

from job.config.running import Storage
from job.store import Store
from tests.s3 import BUCKET, S3

KINDS = ("file", "memory", "s3")


def make_store(kind: str, request: pytest.FixtureRequest) -> Store:
    """A folder of a kind, for one test."""
    if kind == "file":
        return Store(str(request.getfixturevalue("tmp_path") / "folder"))
    if kind == "memory":
        return Store(f"memory://{secrets.token_hex(4)}/folder")
    return store_at(request.getfixturevalue("s3")).child("folder")


def store_at(s3: S3) -> Store:
    """A folder in the server's bucket."""
    return Store(f"s3://{BUCKET}/{secrets.token_hex(4)}", Storage(**s3.storage))
