"""Authors' own checkpoints as transformers' classes see them: settings and tensors under native names, in place.

A row range of a tensor is a tensor too, a few bytes further into the same file. So nothing is copied or converted, and
who reads in shares reads these as any others.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from job.errors import ModelError
from job.families import family_of
from job.families.family import REQUIRED, Family, From, Inner, Kind, Multiple, Only, Original, Rows
from job.tensors import Tensor

EXPECTED: dict[Kind, str] = {
    "size": "a whole number, 1 or more",
    "number": "a number above 0",
    "flag": "true or false",
    "ids": "a token id",
}
"""What each kind of setting has to be."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def native_config(written: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parsed config.json as transformers names them; those that it names itself are left alone.

    Raises:
        ModelError: names the setting that the native class cannot represent, and why.
    """
    family = family_of(written)
    if family and family.inner:
        return _inner_config(family.inner, written)
    original = family.original if family else None
    if original is None:
        return dict(written)
    for only in original.only:
        _refuse(only, original, written)
    config = _filled(original.config, written)
    for multiple in original.multiples:
        _refuse_indivisible(multiple, original, config, written)
    return config


def native_tensors(tensors: Mapping[str, Tensor], written: Mapping[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's tensors by native name, each with its rows of the file; every row that is read is in one of them.

    Args:
        tensors: those of the files, by their own names.
        written: the parsed config.json.

    Raises:
        ModelError: a tensor has no place in the family, or has not the rows that config.json says, or the settings are
            refused as by `native_config`.
    """
    family = family_of(written)
    if family is None:
        return dict(tensors)
    if family.inner:
        tensors = _inner_tensors(tensors, family.inner.prefix)
    config, found = native_config(written), dict[str, Tensor]()
    for tensor in tensors.values():
        if not tensor.name.endswith(family.ignored):
            found |= {part.name: part for part in _parts(tensor, family, config, written)}
    return found


def _inner_config(inner: Inner, written: Mapping[str, Any]) -> dict[str, Any]:
    settings = written.get(inner.config)
    if not isinstance(settings, Mapping):
        raise ModelError(f"{written['model_type']}: config.json has no {inner.config}. Copy the checkpoint again")
    return {**inner.absent, **settings}


def _inner_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    inside = [tensor for name, tensor in tensors.items() if name.startswith(prefix)]
    return {name: replace(tensor, name=name) for tensor in inside if (name := tensor.name.removeprefix(prefix))}


def _refuse(only: Only, original: Original, written: Mapping[str, Any]) -> None:
    if only.unless and any(text in json.dumps(written).lower() for text in only.unless):
        return
    found = written.get(only.name, only.values[0] if only.absent is None else only.absent)
    if found not in only.values:
        expected = " or ".join(json.dumps(value) for value in only.values)
        said = f"config.json has {only.name} {json.dumps(found)}, expected {expected}: {only.why}"
        raise ModelError(f"{written['model_type']}: {said}. {only.cure or original.cure}")


def _filled(settings: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what config.json says in the place of each `From`; without those that are absent."""
    values: dict[str, Any] = {}
    for name, setting in settings.items():
        if isinstance(setting, Mapping):
            values[name] = _filled(setting, written)
        else:
            values[name] = _value(setting, written) if isinstance(setting, From) else setting
    return {name: value for name, value in values.items() if value is not None}


def _value(setting: From, written: Mapping[str, Any]) -> Any:
    name = _name(setting, written)
    value = setting.absent if written.get(name) is None else written[name]
    if value is REQUIRED:
        raise ModelError(f"{written['model_type']}: config.json has no {name}. Copy the checkpoint again")
    if value is not None and not _is(setting.kind, value):
        raise ModelError(
            f"{written['model_type']}: config.json has {name} {json.dumps(value)}, expected {EXPECTED[setting.kind]}. "
            "Copy the checkpoint again"
        )
    if setting.kind == "size" and value is not None:
        return value * setting.times // setting.over
    return value * setting.times if setting.kind == "number" else value


def _name(setting: From, written: Mapping[str, Any]) -> str:
    """What this config.json calls the setting."""
    return next((name for name in (setting.name, *setting.also) if written.get(name) is not None), setting.name)


def _is(kind: Kind, value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "ids":
        return (whole and value >= 0) or (isinstance(value, list) and all(_is("ids", each) for each in value))
    return (whole or (kind == "number" and isinstance(value, float))) and value > 0


def _refuse_indivisible(
    multiple: Multiple, original: Original, config: Mapping[str, Any], written: Mapping[str, Any]
) -> None:
    if not all(name in config for name in (multiple.name, *multiple.of)):
        return
    whole, part = config[multiple.name], math.prod(config[name] for name in multiple.of)
    if whole % part or (multiple.exactly and whole != part):
        names = [_name(original.config[name], written) for name in (multiple.name, *multiple.of)]
        said = [f"{name} {written[name]}" for name in names]
        expected = f"{'' if multiple.exactly else 'a multiple of '}{' x '.join(said[1:])}"
        raise ModelError(f"{written['model_type']}: config.json has {said[0]}, expected {expected}. {original.cure}")


def _parts(tensor: Tensor, family: Family, config: Mapping[str, Any], written: Mapping[str, Any]) -> Iterator[Tensor]:
    """What lies in an author's tensor, one after the other."""
    module, _, leaf = tensor.name.rpartition(".")
    numbers = NUMBER.findall(tensor.name)
    places = family.weights.get(NUMBER.sub("*", module))
    if places is None and family.original is None:
        places = module
    if places is None:
        raise ModelError(
            f"{written['model_type']}: {tensor.name} is in the checkpoint but not in the model. "
            "Copy the checkpoint again"
        )
    if isinstance(places, str):
        yield replace(tensor, name=f"{numbered(places, numbers)}.{leaf}")
        return
    counts = [math.prod(config[name] for name in rows.count) for rows in places]
    rows = tensor.shape[0] if tensor.shape else 0
    if sum(counts) != rows:
        raise ModelError(
            f"{written['model_type']}: {tensor.name} has {rows} rows, config.json says "
            f"{' + '.join(map(str, counts))}. Copy the checkpoint again"
        )
    yield from _cut(tensor, places, counts, numbers, leaf)


def _cut(
    tensor: Tensor, places: tuple[Rows, ...], counts: list[int], numbers: list[str], leaf: str
) -> Iterator[Tensor]:
    start, row = tensor.start, tensor.nbytes // tensor.shape[0]
    for place, count in zip(places, counts, strict=True):
        name = f"{numbered(place.module, numbers)}.{leaf}"
        yield replace(tensor, name=name, shape=(count, *tensor.shape[1:]), start=start)
        start += count * row


def numbered(module: str, numbers: list[str]) -> str:
    """The module with the numbers of its layers in the places of *."""
    parts = iter(numbers)
    return re.sub(r"\*", lambda _: next(parts), module)
