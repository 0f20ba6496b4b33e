"""An adapter in PEFT's format where it lies: found by what people call it, read a module at a time."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from job.adapter import SETTINGS, WEIGHTS
from job.config import Change, RunConfig, changes, load_config, parse_config
from job.config.learning import Model
from job.config.running import Storage
from job.errors import InputError
from job.headers import read_headers
from job.lora_kinds import refuse_other_kinds
from job.reading import Range, read_ahead
from job.run_folder import SETTINGS as RUN
from job.run_folder import RunFolder
from job.store import Store
from job.telling import telling
from job.tensors import Tensor
from job.weights import TORCH_DTYPE

PREFIX = "base_model.model."
"""What peft puts before a module's name."""
PICKLED = "adapter_model.bin"
"""What peft wrote in 2023."""
PRODUCT, MAGNITUDE, BIASES = ("lora_A.weight", "lora_B.weight"), "lora_magnitude_vector", ("base_layer.bias", "bias")
"""What an adapter holds of a module, by the ends of names; the bias where that was trained too."""
LEAVES = (*PRODUCT, MAGNITUDE, *BIASES)


@dataclass(frozen=True)
class Found:
    """An adapter, its base and how storage is reached."""

    store: Store
    model: Model
    storage: Storage


def find(source: str, settings: Sequence[str] = ()) -> Found:
    """The adapter of a run file, of a run's folder, or in a folder of its own.

    Args:
        source: path of a run file; folder or URL of a run, or of an adapter, which names its base itself.
        settings: words like storage.endpoint=... that win over what is written there.

    Raises:
        InputError: there is none of these, or the run file is of another model than the adapter's.
    """
    if Path(source).is_file():
        config = load_config(source, settings)
        _refuse_other_model(config)
        return _found(config, Store(config.output.url, config.storage).child("adapter"))
    known = parse_config(json.dumps(_least("unknown", None, source)), settings)
    with telling(InputError, source):
        store = Store(source, known.storage)
        names = store.names()
        written = {name: store.read(name) for name in (RUN, SETTINGS) if name in names}
    if RUN in written:
        return _found(parse_config(written[RUN].decode(), settings, f"{source}/{RUN}"), store.child("adapter"))
    if SETTINGS not in written:
        raise InputError(f"{source}: no run file, no run and no adapter. Give one of them")
    about = _parsed(written[SETTINGS], source)
    least = _least(about.get("base_model_name_or_path") or "unknown", about.get("revision"), source)
    config = parse_config(json.dumps(least), settings)
    if config.model.name == "unknown":
        raise InputError(f"{source}/{SETTINGS} names no base. Give it as model.name=... behind the output")
    return _found(config, store)


def _least(base: str, revision: str | None, source: str) -> dict[str, Any]:
    return {"model": {"name": base, "revision": revision}, "data": {"train": "none"}, "output": {"url": source}}


def _found(config: RunConfig, store: Store) -> Found:
    return Found(store, config.model, config.storage)


def _refuse_other_model(config: RunConfig) -> None:
    run = RunFolder(config)
    differing: list[Change] = changes(run.old, config) if run.old else []
    other = [change for change in differing if change.key.startswith("model.") and change.rule == "fixed"]
    if other:
        listed = "\n  ".join(map(str, other))
        raise InputError(f"{run.store.url}: the adapter was trained on another model\n  {listed}\n  Set these back")


def _parsed(text: bytes, url: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except ValueError as fault:
        raise InputError(f"{url}/{SETTINGS} is damaged ({fault}). Copy the adapter again") from fault
    if not isinstance(about, dict):
        raise InputError(f"{url}/{SETTINGS} is no object with settings. Copy the adapter again")
    return about


@dataclass(frozen=True)
class Product:
    """What an adapter adds to a linear's weight [out, in] before it is scaled: `b` [out, r] times `a` [r, in].

    `magnitude` [out] is DoRA's.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None


class AdapterFile:
    """A written adapter; only headers are held.

    Args:
        store: its folder.

    Raises:
        InputError: there is no adapter, or it holds what is no LoRA of linears, or has not one scale for all.
    """

    def __init__(self, store: Store):
        self.store = store
        with telling(InputError, store.url):
            names = store.names()
            text = store.read(SETTINGS) if SETTINGS in names else b"{}"
        if PICKLED in names and WEIGHTS not in names:
            cure = "Load it with plain peft and save it again as safetensors"
            raise InputError(f"{store.url} holds {PICKLED}, which is pickled. {cure}")
        if not {SETTINGS, WEIGHTS} <= set(names):
            raise InputError(f"{store.url}: no adapter there. Run `qlora train` first")
        self.names = names
        self.settings = _parsed(text, store.url)
        refuse_other_kinds(self.settings, store.url)
        self.tensors = read_headers(_Only(store))
        self.modules = self._by_module()
        if not self.modules:
            raise InputError(f"{store.url}/{WEIGHTS} is empty: nothing was saved. Train again, or give another adapter")

    @cached_property
    def scale(self) -> float:
        """What every product is multiplied with."""
        alpha, rank = float(self.settings["lora_alpha"]), int(self.settings["r"])
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    @cached_property
    def about(self) -> dict[str, str]:
        """What the header of the file says besides its tensors."""
        (length,) = struct.unpack("<Q", self.store.read(WEIGHTS, 0, 8))
        return dict(json.loads(self.store.read(WEIGHTS, 8, 8 + length)).get("__metadata__") or {})

    def values(self, module: str, leaves: Sequence[str]) -> list[torch.Tensor]:
        """What the adapter holds of a module under these ends of names."""
        tensors = [self.modules[module][leaf] for leaf in leaves]
        ranges = [Range(tensor.file, tensor.start, tensor.start + tensor.nbytes) for tensor in tensors]
        with closing(read_ahead(self.store, ranges)) as contents:
            return [
                torch.frombuffer(bytearray(content), dtype=TORCH_DTYPE[tensor.dtype]).view(tensor.shape)
                for tensor, content in zip(tensors, contents, strict=True)
            ]

    def product(self, module: str) -> Product:
        """What is added to the module's weight."""
        leaves = [leaf for leaf in (*PRODUCT, MAGNITUDE) if leaf in self.modules[module]]
        return Product(*self.values(module, leaves))

    def refuse_more_than_products(self) -> None:
        """Refuse an adapter that changes more than weights by A and B: its names cannot be changed.

        Raises:
            InputError: it does.
        """
        for module, held in self.modules.items():
            if odd := sorted(set(held) - set(PRODUCT)):
                raise InputError(
                    f"{self.store.url}: {module} has {', '.join(odd)}, which has no place under other names. "
                    "Use `qlora merge`, or train without lora.bias and lora.dora"
                )

    def _by_module(self) -> dict[str, dict[str, Tensor]]:
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            leaf = next((leaf for leaf in LEAVES if name.endswith(f".{leaf}")), None)
            if leaf is None or not name.startswith(PREFIX) or tensor.dtype not in TORCH_DTYPE:
                raise InputError(
                    f"{self.store.url}: {name} is no part of a LoRA of linears. Only such adapters are exported or "
                    "merged"
                )
            modules.setdefault(name.removeprefix(PREFIX).removesuffix(f".{leaf}"), {})[leaf] = tensor
        for module, held in modules.items():
            self._refuse_odd_pair(module, held)
        return modules

    def _refuse_odd_pair(self, module: str, held: Mapping[str, Tensor]) -> None:
        pair = [held[leaf] for leaf in PRODUCT if leaf in held]
        if len(pair) == 1 or any(len(matrix.shape) != 2 for matrix in pair):
            raise InputError(f"{self.store.url}: {module} has no A and B that are matrices. Copy the adapter again")
        if pair and (pair[0].shape[0], pair[1].shape[1]) != (self.settings["r"],) * 2:
            raise InputError(
                f"{self.store.url}: {module} has A {list(pair[0].shape)} and B {list(pair[1].shape)}, {SETTINGS} says "
                f"r {self.settings['r']}. Copy the adapter again"
            )
        dora = bool(self.settings.get("use_dora"))
        if pair and dora != (MAGNITUDE in held):
            has = "has no" if dora else "has a"
            raise InputError(
                f"{self.store.url}: {module} {has} {MAGNITUDE}, {SETTINGS} says use_dora {json.dumps(dora)}. "
                "Copy the adapter again"
            )


class _Only:
    """An adapter's folder as `read_headers` wants it: with no other weights in it."""

    def __init__(self, store: Store):
        self.url, self.read, self.size = store.url, store.read, store.size

    def names(self) -> list[str]:
        return [WEIGHTS]
