"""`qlora export`: an adapter under the names of its base's authors, or back under transformers'."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import safetensors.torch

from job.adapter import SETTINGS, WEIGHTS, prove
from job.adapter_file import AdapterFile, Found
from job.convert import small_files
from job.errors import InputError, OutputError
from job.families import family_of
from job.pretrained import as_written, fetch
from job.renaming import Adapter, Renaming, renaming, to_native, to_original
from job.store import Store
from job.telling import telling
from job.uploads import patiently

Names = Literal["native", "original"]
Say = Callable[[str], None]


def export(found: Found, out: Store, names: Names, say: Say) -> None:
    """Write the adapter under these names, its settings last, and read it back. An adapter that has these names, or
    whose base's authors have transformers' names, is copied.

    Raises:
        InputError: the adapter or its base cannot be read, or holds what these names have no place for.
        OutputError: `out` holds other files, or cannot be reached.
        JobError: the storage failed.
    """
    file = AdapterFile(found.store)
    beside = [name for name in small_files(file.names) if name != SETTINGS]
    _refuse_other_files(out, {WEIGHTS, *beside})
    written = as_written(fetch(found.model, found.storage, say)[0], found.model)
    if names == "original":
        _refuse_eyes(written, found.model.name)
    changed = _renamed(file, renaming(written), names, say)
    contents = {name: found.store.read(name) for name in beside}
    contents |= {name: found.store.read(name) for name in (WEIGHTS, SETTINGS)} if changed is None else _files(changed)
    for name, content in contents.items():
        patiently(partial(out.write, name, content), name, found.storage.retry_minutes * 60, say, out)
    prove(safetensors.torch.load(out.read(WEIGHTS)), safetensors.torch.load(contents[WEIGHTS]), trained=False)
    say(f"adapter: {out.url}")


def _renamed(file: AdapterFile, rename: Renaming | None, names: Names, say: Say) -> Adapter | None:
    if rename is None or rename.are_authors(file.modules) == (names == "original"):
        say("the adapter has these names already: it is copied")
        return None
    adapter = Adapter.read(file)
    return to_original(adapter, rename, say) if names == "original" else to_native(adapter, rename)


def _files(adapter: Adapter) -> dict[str, bytes]:
    content = safetensors.torch.save(adapter.tensors(), metadata={"format": "pt", **adapter.about})
    return {WEIGHTS: content, SETTINGS: json.dumps(adapter.settings, indent=2, sort_keys=True).encode()}


def _refuse_eyes(written: Mapping[str, object], name: str) -> None:
    family = family_of(written)
    if family and family.inner:
        raise InputError(f"{name} sees images: an adapter of its text has no other names. Use it as it is")


def _refuse_other_files(out: Store, ours: set[str]) -> None:
    """Only what an export that was cut off left may be there."""
    with telling(OutputError, out.url):
        there = out.names(folders=True)
    other = [name for name in there if not name.startswith(".") and name not in ours and not name.endswith(".part")]
    if other:
        raise OutputError(f"{out.url} holds files already ({', '.join(other[:5])}). Use an empty or a new folder")
