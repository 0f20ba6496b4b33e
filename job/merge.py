"""`qlora merge`: an adapter added to its 16-bit base, as a model of its own, file by file from and to any URL."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from job.adapter import SETTINGS, WEIGHTS
from job.adapter_file import AdapterFile, Found
from job.config.learning import Model, Quantization
from job.convert import has_tokenizer, small_files
from job.endings import generation_settings
from job.errors import InputError, ModelError
from job.families import family_of
from job.headers import read_headers
from job.matching import shares
from job.merged import Change, Result, contents, results
from job.merged_folder import CONFIG, MARKER, MergedFolder, last_files, refuse_other_files
from job.model import build, is_transposed
from job.pickled import as_safetensors
from job.pretrained import (
    as_written,
    base_name,
    fetch,
    fetch_weights,
    has_own_names,
    in_gguf,
    read_config,
    read_tensors,
)
from job.reading import REQUEST, Range, read_ahead
from job.renaming import Additions, renaming
from job.shape import IGNORED
from job.sinks import LoadingBar
from job.store import Store
from job.tensors import Tensor
from job.tokenizer import GENERATION, Tokenizer

FORMAT = 2
"""Part of a merge's identity: raise it when the same merge gives other bytes."""
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""safetensors' names of types by torch's."""
Dtype = Literal["bfloat16", "float16", "float32"]
Names = Literal["native", "original"]
Say = Callable[[str], None]


def merge(found: Found, out: Store, names: Names, dtype: Dtype | None, say: Say) -> None:
    """Write the base with the adapter added to it.

    Args:
        found: the adapter and its base.
        out: an empty folder, or one with this very merge, cut off or finished.
        names: transformers' own, or those of the authors where these are others.
        dtype: type of the result; None is the base's.
        say: hears what is done.

    Raises:
        InputError: adapter and base do not belong together, or the base is quantized.
        OutputError: `out` holds something else, or cannot be reached.
        JobError: the storage failed.
    """
    refuse_other_files(out)
    adapter = AdapterFile(found.store)
    source = _Source.open(found, adapter, names, dtype, say)
    folder = MergedFolder(out, source.about, source.key, found.storage, say)
    by_file = groupby(source.results, lambda result: result.tensor.file)
    files = {as_safetensors(name): list(file) for name, file in by_file}
    last = last_files(files, source.small, source.config)
    if folder.begin(files, last):
        with LoadingBar(sum(result.nbytes for result in source.results), True) as bar:
            for name, file in files.items():
                folder.write_weights(name, file, partial(contents, file, source.checkpoint, source.adapter), bar)
        folder.finish(last)
    say(f"model: {out.url}")


@dataclass(frozen=True)
class _Source:
    """What is merged: the base's files, the adapter, and what becomes of each tensor."""

    adapter: Additions
    checkpoint: Store
    results: list[Result]
    small: dict[str, bytes]
    written: dict[str, Any]
    config: dict[str, Any]
    about: dict[str, str]

    @classmethod
    def open(cls, found: Found, adapter: AdapterFile, names: Names, dtype: Dtype | None, say: Say) -> "_Source":
        model = found.model
        _refuse_gguf(found, say)
        files, store = fetch(model, found.storage, say)
        written, architecture = as_written(files, model), read_config(files, model)
        skeleton = build(architecture, model, Quantization(type="none"), "bf16", "bf16")
        additions = Additions(adapter, renaming(written))
        checkpoint = fetch_weights(model, store, found.storage, say)
        native = read_tensors(files, checkpoint, model)
        changes = _changes(skeleton, native, additions, model.name)
        renamed = names == "native" and has_own_names(files, model)
        tensors = native if renamed else read_headers(checkpoint)
        become = results(tensors, changes, DTYPES.get(dtype or ""), _kept(written))
        config = _native_settings(architecture, skeleton) if renamed else written
        small = _native_small(files, model, architecture) if renamed else _all_small(files)
        about = {"base": base_name(model), "revision": model.revision or "the newest", "adapter": found.store.url}
        about |= {"names": names, "dtype": dtype or "the base's"}
        return cls(additions, checkpoint, become, small, written, _typed(config, become), about)

    @cached_property
    def key(self) -> str:
        """Equal for equal merges: what the adapter holds, where the base is and what its headers and settings say, and
        how it is written."""
        how = [self.about[name] for name in ("base", "revision", "names", "dtype")]
        seen = sha256(json.dumps([FORMAT, self.written, *how]).encode())
        seen.update(repr([(result.tensor, result.dtype) for result in self.results]).encode())
        store = self.adapter.file.store
        seen.update(store.read(SETTINGS))
        size = store.size(WEIGHTS)
        ranges = [Range(WEIGHTS, start, min(start + REQUEST, size)) for start in range(0, size, REQUEST)]
        with closing(read_ahead(store, ranges)) as read:
            for content in read:
                seen.update(content)
        return seen.hexdigest()


def _changes(skeleton: Any, native: Mapping[str, Tensor], adapter: Additions, name: str) -> list[Change]:
    """The parameters that the adapter changes, in the order of the files.

    Raises:
        InputError: the base has no such parameter, or another shape of it.
        ModelError: as `job.matching.shares`.
    """
    tensors = {share.name: share.tensor for share in shares(skeleton, native, name)}
    found, url = [], adapter.file.store.url
    for module in adapter.modules:
        for leaf, shape in adapter.shapes(module).items():
            tensor = tensors.get(f"{module}.{leaf}")
            if tensor is None:
                raise InputError(
                    f"{url}: {module} has a {leaf} that the base {name} has not. Give the adapter's own base"
                )
            turned = leaf == "weight" and is_transposed(skeleton, module)
            expected = tensor.shape[::-1] if turned else tensor.shape
            if shape != expected:
                raise InputError(
                    f"{url}: {module} has a {leaf} of shape {list(shape)}, the base's has {list(expected)}. "
                    "Give the adapter's own base"
                )
            found.append(Change(module, tensor, turned, leaf == "bias"))
    return sorted(found, key=lambda change: (change.tensor.file, change.tensor.start))


def _kept(written: Mapping[str, Any]) -> tuple[str, ...]:
    """Ends of the names of tensors that newer code computes itself: older code wants them as they are."""
    family = family_of(written)
    return (*IGNORED, *(family.ignored if family else ()))


def _refuse_gguf(found: Found, say: Say) -> None:
    if in_gguf(found.model, found.storage, say):
        raise ModelError(
            f"model.name: {found.model.name} is a GGUF file, whose weights are quantized. Give the 16-bit checkpoint "
            "it was made from"
        )


def _native_settings(architecture: Any, skeleton: Any) -> dict[str, Any]:
    return {**json.loads(architecture.to_json_string()), "architectures": [type(skeleton).__name__]}


def _typed(config: Mapping[str, Any], become: Sequence[Result]) -> dict[str, Any]:
    """The settings with the type of the largest tensor, under the name that they have for it."""
    largest = max(become, key=lambda result: result.tensor.numel)
    names = {short: name for name, short in DTYPES.items()}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: names.get(largest.dtype, "float32")}


def _all_small(folder: str) -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in small_files(Store(folder).names()) if _is_taken(name)}


def _native_small(folder: str, model: Model, architecture: Any) -> dict[str, bytes]:
    """The tokenizer as transformers reads it, since the authors' files need their code; and how answers are made, of
    which that code knew the ends."""
    tokenizer = Tokenizer(folder, model.trust_remote_code) if has_tokenizer(Store(folder).names()) else None
    with tempfile.TemporaryDirectory() as made:
        if tokenizer:
            tokenizer.save(made)
        small = {file.name: file.read_bytes() for file in sorted(Path(made).iterdir())}
    answers = generation_settings(folder, architecture, tokenizer)
    return small | {GENERATION: json.dumps(answers, indent=2).encode()}


def _is_taken(name: str) -> bool:
    """Whether a small file stays what it is: config.json and indexes are written anew, and no adapter is beside."""
    return name not in (CONFIG, MARKER, SETTINGS) and not name.endswith(".index.json")
