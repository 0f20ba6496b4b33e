"""Addresses without what is secret in them: no setting may hold keys, no file and no message may show them."""

import re
from typing import Any

from pydantic import AfterValidator

_KEYS = re.compile(r"://[^\s/?#@:\[]*(:(?!\d*([/?#]|$))[^\s@]*)?@")
"""What stands before the @ of a host: a name, or a name and a password, which may hold any sign. `:8080/` is a port."""
_REVISION = re.compile(r"\bhf://[^/@:]+(/[^/@:]+)*@")
"""The hub's addresses have a branch, tag or commit behind their @."""
_SIGNED = re.compile(r"(https?://[^\s?#]*)[?#].*?(:train(\[[^\]]*\])?)?$")
"""An http address, what follows its `?` or `#`, and a split of the rows (group 2)."""


def holds_keys(text: str) -> bool:
    """Whether an address in the text has a user name or password in it."""
    return _KEYS.search(_REVISION.sub("", text)) is not None


def _no_keys(value: Any) -> Any:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and holds_keys(text):
            raise ValueError("holds a user name or password. Put keys into the environment or an .env file")
    return value


NO_KEYS = AfterValidator(_no_keys)
"""Marks a setting that takes addresses: one with a user name or password is refused, and not shown."""


def unsigned(value: Any) -> Any:
    """A setting as it may be written and compared: http addresses end before their query, which may be a signature and
    is another one tomorrow; a split behind it stays."""
    if isinstance(value, list):
        return [unsigned(item) for item in value]
    return _SIGNED.sub(r"\1\2", value) if isinstance(value, str) else value
