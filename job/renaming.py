"""A LoRA adapter under its base's authors' names, whose linears may hold several of transformers', and back again.

The products are the same number for number: under the authors' names B is block-diagonal over the parts, whose As lie
one below the other, or there is one A where the parts share it (lora.share_a).
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F

from job.adapter_file import BIASES, MAGNITUDE, PREFIX, PRODUCT, AdapterFile, Product
from job.errors import InputError
from job.families import family_of
from job.families.family import Family
from job.families.names import Linear, by_authors_name, by_native_name, selection
from job.families.native import native_config

NATIVE = "native"
"""Under which key the header of a file with the authors' names says what the adapter was, so that it comes back."""
LONG_KNOWN = (
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "r", "revision", "task_type", "use_rslora",
)  # fmt: skip
"""Settings that are in peft for as long as the authors' own code ran. It stops at some of the newer ones."""
SELECTING = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")
"""Settings that name modules, and so have to change with the names."""


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: PEFT's settings, its products by module, and what its file's header says besides."""

    settings: dict[str, Any]
    products: dict[str, Product]
    about: dict[str, str]

    @classmethod
    def read(cls, file: AdapterFile) -> "Adapter":
        """All of a written adapter.

        Raises:
            InputError: it holds more than products.
        """
        file.refuse_more_than_products()
        return cls(dict(file.settings), {module: file.product(module) for module in file.modules}, file.about)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By their names in PEFT's file; none shares memory with another, which safetensors refuses."""
        found = {}
        for module, product in self.products.items():
            for leaf, matrix in zip(PRODUCT, (product.a, product.b), strict=True):
                found[f"{PREFIX}{module}.{leaf}"] = matrix.clone(memory_format=torch.contiguous_format)
        return found


class Renaming:
    """Between transformers' names of a family's linears and the authors'.

    Args:
        family: one whose authors had names of their own.
        config: the native settings.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]):
        self.family, self.config = family, config

    def are_authors(self, modules: Iterable[str]) -> bool:
        """Whether these are the authors' names."""
        return all(by_authors_name(module, self.family, self.config) for module in modules)

    def linears(self, modules: Iterable[str]) -> dict[str, Linear]:
        """The authors' linears of these names, or those in which the native ones of these names lie; by their names.

        Raises:
            InputError: the base has no such linear.
        """
        found = {}
        for module in modules:
            linear = by_authors_name(module, self.family, self.config)
            linear = linear or by_native_name(module, self.family, self.config)
            if linear is None:
                raise InputError(f"the adapter has {module}, which {self.family.name} has not. Give its own base")
            found[linear.module] = linear
        return found

    def selection(self, modules: Collection[str], was: Mapping[str, Any], native: bool) -> dict[str, Any]:
        """The settings that select these modules.

        Args:
            was: PEFT's settings for the same under the other names.
            native: whether these are transformers' names.
        """
        count = self.config["num_hidden_layers"]
        return selection(modules, self.family, count, was.get("layers_to_transform"), native)


def renaming(written: Mapping[str, Any]) -> Renaming | None:
    """How names change on a base with this config.json; None where its authors' names are transformers'."""
    family = family_of(written)
    return Renaming(family, native_config(written)) if family and family.original else None


def to_original(native: Adapter, rename: Renaming, say: Callable[[str], None]) -> Adapter:
    """The adapter under the authors' names, with one scale for all: what is not fused gets zeros up to the same rank.

    Args:
        say: hears of a rank that is not the one asked for.

    Raises:
        InputError: the base has no such linears.
    """
    linears = rename.linears(native.products)
    parts = {name: _adapted(linear, native.products) for name, linear in linears.items()}
    shared = all(torch.equal(each[0].a, other.a) for each in parts.values() for other in each)
    times = 1 if shared else max(map(len, parts.values()))
    rank = int(native.settings["r"]) * times
    if times > 1:
        names = sorted({name.rpartition(".")[2] for name, each in parts.items() if len(each) > 1})
        say(
            f"the adapter has rank {rank} under these names: {times} parts of {', '.join(names)} have an A each "
            f"(trained with lora.share_a they have one, and the rank stays {native.settings['r']})"
        )
    products = {name: _padded(_fused(linear, native.products, shared), rank) for name, linear in linears.items()}
    settings = {name: native.settings[name] for name in LONG_KNOWN if name in native.settings}
    settings |= {"r": rank, "lora_alpha": _alpha(native.settings, times)}
    settings |= rename.selection(products, native.settings, native=False)
    was = json.dumps({"settings": native.settings, "modules": list(native.products)})
    return Adapter(settings, products, {NATIVE: was})


def to_native(original: Adapter, rename: Renaming) -> Adapter:
    """The adapter under transformers' names: what `to_original` was given, bit for bit.

    Of one that was trained under the authors' names the parts of a linear share its A.
    """
    was = Before.of(original.about, original.settings)
    products: dict[str, Product] = {}
    for name, linear in rename.linears(original.products).items():
        products |= was.parts(linear, original.products[name])
    settings = {**was.settings, "base_model_name_or_path": original.settings.get("base_model_name_or_path")}
    if not was.modules:
        settings = {name: value for name, value in settings.items() if name not in SELECTING}
        settings |= rename.selection(products, original.settings, native=True)
    return Adapter(settings, products, {})


@dataclass(frozen=True)
class Before:
    """What an adapter under the authors' names was: settings, modules (none: all that there are), and whether those
    that lie in one linear have an A each."""

    settings: dict[str, Any]
    modules: frozenset[str]
    stacked: bool

    @classmethod
    def of(cls, about: Mapping[str, str], settings: Mapping[str, Any]) -> "Before":
        """As the header of its file says; one that says nothing was trained under these names.

        Raises:
            InputError: the header is damaged.
        """
        if NATIVE not in about:
            return cls(dict(settings), frozenset(), False)
        try:
            was = json.loads(about[NATIVE])
            return cls(dict(was["settings"]), frozenset(was["modules"]), was["settings"]["r"] < settings["r"])
        except (ValueError, KeyError, TypeError) as fault:
            raise InputError(f"the header of the adapter's file is damaged ({fault!r}). Copy it again") from fault

    def parts(self, linear: Linear, product: Product) -> dict[str, Product]:
        """The products of the native linears in one of the authors'.

        Raises:
            InputError: they have another number of outputs.
        """
        _refuse_other_outputs(linear.module, len(product.b), [part.outputs for part in linear.parts])
        found, start, place, rank = {}, 0, 0, int(self.settings["r"])
        for part in linear.parts:
            stop = start + (part.outputs or len(product.b))
            if not self.modules or part.module in self.modules:
                own = slice(place, place + rank)
                found[part.module] = Product(product.a[own], product.b[start:stop, own])
                place += rank if self.stacked else 0
            start = stop
        return found


class Additions:
    """What a written adapter adds to native linears, one at a time.

    Args:
        file: under native or the authors' names.
        rename: of its base; None where both are the same.

    Raises:
        InputError: the adapter is not one of this base.
    """

    def __init__(self, file: AdapterFile, rename: Renaming | None):
        self.file, self._rename = file, rename
        renamed = rename if rename and rename.are_authors(file.modules) else None
        if renamed:
            file.refuse_more_than_products()
        self._linears = renamed.linears(file.modules) if renamed else {}
        for name, linear in self._linears.items():
            outputs = file.modules[name][PRODUCT[1]].shape[0]
            _refuse_other_outputs(name, outputs, [part.outputs for part in linear.parts])
        self._inside = {part.module: linear for linear in self._linears.values() for part in linear.parts}

    @cached_property
    def modules(self) -> list[str]:
        """The native modules that it changes, in weight or bias."""
        if not self._linears:
            return list(self.file.modules)
        was = Before.of(self.file.about, self.file.settings)
        return [module for module in self._inside if not was.modules or module in was.modules]

    def product(self, module: str) -> Product:
        """What is added to the module's weight before it is scaled."""
        if not self._linears:
            return self.file.product(module)
        linear = self._inside[module]
        whole = self.file.product(linear.module)
        return Before.of(self.file.about, self.file.settings).parts(linear, whole)[module]

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what it changes in the module: of the weight [out, in], and of the bias [out]."""
        linear = self._inside.get(module)
        held = self.file.modules[linear.module if linear else module]
        found = {leaf.rpartition(".")[2]: held[leaf].shape for leaf in BIASES if leaf in held}
        if PRODUCT[0] in held:
            a, b = (held[leaf].shape for leaf in PRODUCT)
            cut = {part.module: part.outputs for part in linear.parts} if linear else {}
            found["weight"] = (cut.get(module) or b[0], a[1])
        return found

    def has_magnitude(self, module: str) -> bool:
        """Whether the module's weight is scaled to DoRA's magnitudes."""
        return not self._linears and MAGNITUDE in self.file.modules[module]

    def bias(self, module: str) -> torch.Tensor:
        """The module's bias [out] as it was trained."""
        (leaf,) = set(BIASES) & set(self.file.modules[module])
        return self.file.values(module, [leaf])[0]


def _adapted(linear: Linear, products: Mapping[str, Product]) -> list[Product]:
    return [products[part.module] for part in linear.parts if part.module in products]


def _fused(linear: Linear, products: Mapping[str, Product], shared: bool) -> Product:
    """One product for all parts; those without one get rows of zeros in B."""
    there = _adapted(linear, products)
    if len(linear.parts) == 1:
        return there[0]
    a = there[0].a if shared else torch.cat([each.a for each in there])
    b = torch.zeros(sum(part.outputs or 0 for part in linear.parts), len(a), dtype=there[0].b.dtype)
    start = place = 0
    for part in linear.parts:
        stop = start + (part.outputs or 0)
        if own := products.get(part.module):
            _refuse_other_outputs(part.module, len(own.b), [part.outputs])
            b[start:stop, place : place + len(own.a)] = own.b
            place += 0 if shared else len(own.a)
        start = stop
    return Product(a, b)


def _refuse_other_outputs(module: str, found: int, expected: Sequence[int | None]) -> None:
    numbers = [number for number in expected if number is not None]
    if numbers and found != sum(numbers):
        raise InputError(f"the adapter's {module} has {found} outputs, the base's {sum(numbers)}. Give its own base")


def _padded(product: Product, rank: int) -> Product:
    more = rank - len(product.a)
    return Product(F.pad(product.a, (0, 0, 0, more)), F.pad(product.b, (0, more)))


def _alpha(settings: Mapping[str, Any], times: int) -> Any:
    """The numerator that keeps the scale where the rank is so many times as large."""
    alpha = settings["lora_alpha"]
    return alpha * sqrt(times) if settings.get("use_rslora") and times > 1 else alpha * times
