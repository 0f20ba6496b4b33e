"""What is said of a family of models, all of it plain data; what is done with it is in `native`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["size", "number", "flag", "ids"]
"""A whole number from 1; a number above 0; true or false; a token id, several, or none."""
REQUIRED = object()
"""Stands for the value of a setting that cannot be left out."""


@dataclass(frozen=True)
class From:
    """A setting of transformers' class, taken from the first of `name` and `also` that config.json has.

    A number is multiplied by `times`, a size also divided by `over` and rounded down. `absent` is what the authors'
    code takes where the setting is left out or null; None leaves it to transformers' class.
    """

    name: str
    kind: Kind = "size"
    also: tuple[str, ...] = ()
    absent: Any = REQUIRED
    times: int = 1
    over: int = 1


@dataclass(frozen=True)
class Only:
    """A setting that transformers' class has no place for: it has to be one of `values`, or the checkpoint is refused.

    `why` is the reason, and `cure`, when given, what to do instead of the family's own. Where the setting is left out
    it is the first of `values`, unless `absent` is what the authors' code takes then. Where config.json
    has one of the texts `unless` anywhere in it, all this does not hold.
    """

    name: str
    values: tuple[Any, ...]
    why: str
    absent: Any = None
    cure: str = ""
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Multiple:
    """The native setting `name` has to be a multiple of the product of the native settings `of`, or just that product.

    A setting that is not there makes no demand.
    """

    name: str
    of: tuple[str, ...]
    exactly: bool = False


@dataclass(frozen=True)
class Rows:
    """The next rows of a fused tensor: as many as the product of these native settings, for the native module."""

    module: str
    count: tuple[str, ...]


Weights = Mapping[str, str | tuple[Rows, ...]]
"""The authors' modules, and which native ones lie in them one after the other; * is the number of a layer."""


@dataclass(frozen=True)
class Original:
    """How the settings of the authors' own checkpoints become those of a class of transformers.

    `config` holds the native settings: constants, `From`, or a dictionary of these. `cure` is what to do about a
    refused setting.
    """

    config: Mapping[str, Any]
    only: tuple[Only, ...]
    multiples: tuple[Multiple, ...]
    cure: str


@dataclass(frozen=True)
class Inner:
    """The language model in one that sees too, which alone is read.

    `config` is where its settings stand in config.json, `absent` what those are that may be left out there, and
    `prefix` what the names of its tensors begin with.
    """

    config: str
    prefix: str
    absent: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Models of one make.

    `model_types` are what config.json calls them. `targets` are the linears, by last name, that LoRA adapts unless told
    otherwise. Modules that `weights` does not name have transformers' own names, and with `original` there are none
    such. Tensors whose names end as one of `ignored` are not read: newer code computes what they hold. With `experts`,
    those that transformers fuses stay apart as they are in the files, for only linears are quantized.
    """

    name: str
    model_types: tuple[str, ...]
    targets: tuple[str, ...]
    weights: Weights = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    original: Original | None = None
    inner: Inner | None = None
    experts: bool = False

    @property
    def native_type(self) -> str:
        """transformers' name of the class that the authors' own checkpoints become; empty for other families."""
        return str(self.original.config["model_type"]) if self.original else ""

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """The native linears, by last name, of each of the authors' fused ones."""
        groups = [places for places in self.weights.values() if not isinstance(places, str)]
        return tuple(tuple(_last(rows.module) for rows in rows_of_one) for rows_of_one in groups)

    def parts(self, name: str) -> tuple[str, ...]:
        """The native linears, by last name, of the authors' modules of this last name, or of these last names
        (attn.c_proj): of a fused one all that are in it, in their order; none for a name that the authors did not
        have."""
        found: list[str] = []
        for source, places in self.weights.items():
            if f".{source}".endswith(f".{name}"):
                found += [places] if isinstance(places, str) else [rows.module for rows in places]
        return tuple(_last(module) for module in found)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
