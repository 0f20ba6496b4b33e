"""Which settings may change between two runs that share an output URL: the marks on the fields.

*fixed* settings decide what is learnt: another value is another run. *extendable* ones say how far it goes and what
is kept. *free* ones say where and how it runs; results do not depend on them beyond rounding.
"""

from dataclasses import dataclass
from typing import Annotated, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """How a setting may change on one output URL; `name` is "fixed", "extendable" or "free"."""

    name: str
    meaning: str


FIXED = Rule("fixed", "another value is another run and needs another output.url")
EXTENDABLE = Rule("extendable", "may change when a run is continued")
FREE = Rule("free", "may change at any time")

Fixed = Annotated[T, FIXED]
Extendable = Annotated[T, EXTENDABLE]
Free = Annotated[T, FREE]
