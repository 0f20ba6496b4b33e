"""Linears by their authors' names and by transformers': adapters name modules, and know nothing of files."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from job.families import FAMILIES
from job.families.family import Family, Rows
from job.families.native import NUMBER, numbered


@dataclass(frozen=True)
class Part:
    """A native linear within one of the authors', of so many outputs; None is all of it."""

    module: str
    outputs: int | None = None


@dataclass(frozen=True)
class Linear:
    """A linear of the authors with the native ones in it, one after the other."""

    module: str
    parts: tuple[Part, ...]


def by_authors_name(module: str, family: Family, config: Mapping[str, Any]) -> Linear | None:
    """The authors' linear of this name; None where they had none.

    Args:
        module: its name with the numbers of layers.
        config: the native settings, which say where a fused linear is cut.
    """
    places = family.weights.get(NUMBER.sub("*", module))
    if places is None:
        return None
    numbers = NUMBER.findall(module)
    if isinstance(places, str):
        return Linear(module, (Part(numbered(places, numbers)),))
    return Linear(module, tuple(_part(rows, numbers, config) for rows in places))


def by_native_name(module: str, family: Family, config: Mapping[str, Any]) -> Linear | None:
    """The authors' linear in which the native one of this name lies; None where it lies in none."""
    wanted, numbers = NUMBER.sub("*", module), NUMBER.findall(module)
    for source, places in family.weights.items():
        modules = [places] if isinstance(places, str) else [rows.module for rows in places]
        if wanted in modules:
            return by_authors_name(numbered(source, numbers), family, config)
    return None


def authors_names(model_type: str) -> dict[str, tuple[str, ...]]:
    """The authors' linears by last name, with the native ones that each means; none where both are the same.

    Args:
        model_type: transformers' name of the architecture.
    """
    return {
        name: parts
        for family in FAMILIES
        if family.native_type == model_type
        for name in sorted({source.rpartition(".")[2] for source in family.weights})
        if set(parts := family.parts(name)) & set(family.targets)
    }


def selection(modules: Collection[str], family: Family, layers: int, only: Any, native: bool) -> dict[str, Any]:
    """The settings by which peft finds these modules in the base and no others: by last names, and the layers where
    only those have them; else each by its whole name.

    Args:
        modules: linears in the layers, by their names.
        layers: how many the base has.
        only: layers_to_transform, as it was for the same modules under other names.
        native: whether these are transformers' names, or else the authors'.
    """
    sources = [*_native_names(family)] if native else [*family.weights]
    targets = _last_names(modules, sources)
    ends = tuple(f".{target}" for target in targets)
    chosen = [only] if isinstance(only, int) else only or range(layers)
    of_layers = [source for source in sources if "*" in source and f".{source}".endswith(ends)]
    if {numbered(source, [str(layer)]) for source in of_layers for layer in chosen} != set(modules):
        return {"target_modules": sorted(modules)}
    return {"target_modules": targets} | ({} if only is None else {"layers_to_transform": only})


def _native_names(family: Family) -> Iterator[str]:
    for places in family.weights.values():
        yield from [places] if isinstance(places, str) else [rows.module for rows in places]


def _last_names(modules: Iterable[str], sources: Iterable[str]) -> list[str]:
    """Last names of the modules; with the name before it where others end so too (Qwen has two c_proj)."""
    ends = {tuple(module.split(".")[-2:]) for module in modules}
    others = {tuple(source.split(".")[-2:])[-1] for source in sources if tuple(source.split(".")[-2:]) not in ends}
    return sorted({f"{parent}.{last}" if last in others else last for parent, last in ends})


def _part(rows: Rows, numbers: list[str], config: Mapping[str, Any]) -> Part:
    return Part(numbered(rows.module, numbers), math.prod(config[name] for name in rows.count))
