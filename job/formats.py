"""Rows of the usual data formats as role / content / learn segments. Nothing here knows a tokenizer.

To add a format: one function from a row to segments, one line in FORMATS, one case in the test.
"""

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.config.learning import PLACE
from job.errors import InputError
from job.turns import Segment, kind_of, turns_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A kind of row: the fields it needs, and what they say."""

    needs: tuple[str, ...]
    segments: Callable[[Row], list[Segment]]
    ask: Callable[[str], list[Segment]]
    """A question as the segments of a row whose answer is still empty."""


def _ask_chat(question: str) -> list[Segment]:
    return [Segment("user", question), Segment("assistant", "", True)]


def alpaca(row: Row) -> list[Segment]:
    """{instruction, input, output}: input follows the instruction on a new line, when there is one."""
    question = "\n".join(part for part in (_text(row, "instruction"), _text(row, "input", optional=True)) if part)
    system = _text(row, "system", optional=True)
    turns = [Segment("user", question), Segment("assistant", _text(row, "output"), True)]
    return [Segment("system", system), *turns] if system else turns


def _conversation(field: str) -> Callable[[Row], list[Segment]]:
    def segments(row: Row) -> list[Segment]:
        system = _text(row, "system", optional=True)
        turns = _turns(row, field)
        return [Segment("system", system), *turns] if system and turns[0].role != "system" else turns

    return segments


def _turns(row: Row, field: str) -> list[Segment]:
    try:
        return turns_of(row[field])
    except ValueError as fault:
        raise ValueError(f"{field}: {fault}") from fault


def prompt_completion(row: Row) -> list[Segment]:
    """{prompt, completion}: joined as they stand (as TRL does), or both lists of messages."""
    if isinstance(row["prompt"], list):
        asked = [turn._replace(learn=False) for turn in _turns(row, "prompt")]
        return asked + _turns(row, "completion")
    return [Segment("text", _text(row, "prompt")), Segment("text", _text(row, "completion"), True)]


def content_summary(row: Row) -> list[Segment]:
    """AdvertiseGen's {content, summary}."""
    return [Segment("user", _text(row, "content")), Segment("assistant", _text(row, "summary"), True)]


def text(row: Row) -> list[Segment]:
    """{text}: all of it is learnt."""
    return [Segment("text", _text(row, "text"), True)]


FORMATS = {
    "alpaca": Format(("instruction", "output"), alpaca, _ask_chat),
    "conversations": Format(("conversations",), _conversation("conversations"), _ask_chat),
    "messages": Format(("messages",), _conversation("messages"), _ask_chat),
    "prompt_completion": Format(
        ("prompt", "completion"), prompt_completion, lambda q: [Segment("text", q), Segment("text", "", True)]
    ),
    "content_summary": Format(("content", "summary"), content_summary, _ask_chat),
    "text": Format(("text",), text, lambda q: [Segment("text", q), Segment("text", "", True)]),
}


def template_format(template: Mapping[str, str]) -> Format:
    """The user's own prompt: {field} is filled in, [[...]] is left out when a field in it is empty or missing, and
    {{ and }} are braces."""
    always = [re.sub(r"\[\[.*?\]\]", "", template[part], flags=re.S) for part in ("prompt", "completion")]
    needs = tuple(dict.fromkeys(name for part in always for name in _names(part)))

    def segments(row: Row) -> list[Segment]:
        return _fill(template["prompt"], row) + [
            part._replace(learn=True) for part in _fill(template["completion"], row)
        ]

    def ask(question: str) -> list[Segment]:
        asked = next(iter(_names(template["prompt"])), "")
        return [*_fill(template["prompt"], {asked: question}), Segment("text", "", True)]

    return Format(needs, segments, ask)


def _fill(pattern: str, row: Row) -> list[Segment]:
    def keep(part: re.Match[str]) -> str:
        full = all(_text(row, name, optional=True) for name in _names(part[1]))
        return part[1] if full else ""

    pattern = re.sub(r"\[\[(.*?)\]\]", keep, pattern, flags=re.S)
    woven, end = [], 0
    for place in PLACE.finditer(pattern):
        if place[1]:
            woven += [Segment("markup", single_braces(pattern[end : place.start()]))]
            woven += [Segment("text", _text(row, place[1], optional=True))]
            end = place.end()
    woven.append(Segment("markup", single_braces(pattern[end:])))
    return [segment for segment in woven if segment.content]


def _names(pattern: str) -> list[str]:
    """The fields that a template's text names."""
    return [place[1] for place in PLACE.finditer(pattern) if place[1]]


def single_braces(text: str) -> str:
    """A template's text between its fields, in which braces that stand for themselves are doubled."""
    return text.replace("{{", "{").replace("}}", "}")


def own_format(name: str) -> Format:
    """The user's own function `module:function` from a row to a list of {role, content, learn} turns.

    The module may lie in the current folder, which an installed command does not search by itself.

    Raises:
        InputError: there is no such module or function, or the module fails; says where.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        made = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as fault:  # the user's own module may raise anything
        raise InputError(
            f"data.format: {name} cannot be imported ({_fault_and_place(fault)}). Expected module:function"
        ) from fault

    def segments(row: Row) -> list[Segment]:
        try:
            turns = made(dict(row))
            if isinstance(turns, (tuple, Iterator)):
                turns = list(turns)  # a generator's code runs only here
        except (Exception, SystemExit) as fault:  # the user's own code may raise anything
            raise ValueError(f"has {', '.join(row)}; {name} failed with {type(fault).__name__}: {fault}") from fault
        if not isinstance(turns, list) or not turns:
            found = "no turns" if turns in ([], ()) else kind_of(turns)
            raise ValueError(f"{name} returned {found}, expected a list of {{role, content}} turns")
        try:
            return turns_of(turns)
        except ValueError as fault:
            raise ValueError(f"{name}: {fault}") from fault

    return Format((), segments, _ask_chat)


def _fault_and_place(fault: BaseException) -> str:
    """What went wrong in an import, and the file and line of the user's module where it did."""
    if isinstance(fault, SyntaxError):
        return f"SyntaxError: {fault.msg}, {fault.filename} line {fault.lineno}"
    frames = traceback.extract_tb(fault.__traceback__)
    ours = (__file__, importlib.__file__)
    users = [frame for frame in frames if frame.filename not in ours and not frame.filename.startswith("<frozen")]
    return f"{type(fault).__name__}: {fault}, {users[0].filename} line {users[0].lineno}" if users else str(fault)


def format_of(name: str, template: Mapping[str, str] | None, first: Row) -> tuple[str, Format]:
    """The format that `data.format` and `data.template` ask for, or that the first row shows, with its name.

    Raises:
        InputError: the name is unknown, or auto and no format has these fields.
    """
    if name == "template" or (name == "auto" and template and "prompt" in template):
        return "template", template_format(template or {})
    if ":" in name:
        return name, own_format(name)
    if name in FORMATS:
        return name, FORMATS[name]
    if name != "auto":
        raise InputError(
            f"data.format: {name} is unknown. Valid: auto, template, module:function, {', '.join(FORMATS)}"
        )
    for known, kind in FORMATS.items():
        if all(field in first for field in kind.needs):
            return known, kind
    offers = "; ".join(f"{known}: {', '.join(kind.needs)}" for known, kind in FORMATS.items())
    raise InputError(f"data.format: no format has the fields {', '.join(first)}. Set data.template, or use {offers}")


def segments_of(kind: Format, name: str, row: Row) -> list[Segment]:
    """The row's segments.

    Raises:
        ValueError: a field is missing or of the wrong kind; says which were found.
    """
    missing = [field for field in kind.needs if row.get(field) is None]
    if missing:
        found = ", ".join(key for key, value in row.items() if value is not None) or "no fields"
        raise ValueError(
            f"has {found}; the format {name} needs {', '.join(kind.needs)} (missing: {', '.join(missing)})"
        )
    return kind.segments(row)


def learn_last(segments: Iterable[Segment]) -> list[Segment]:
    """Only the last learnt segment stays learnt (`data.learn: last`)."""
    kept = list(segments)
    if not any(segment.role == "assistant" for segment in kept):
        return kept  # rows without turns have one answer, however many segments it takes
    last = max((place for place, segment in enumerate(kept) if segment.learn), default=-1)
    return [segment._replace(learn=place == last) for place, segment in enumerate(kept)]


def _text(row: Row, name: str, optional: bool = False) -> str:
    value = row.get(name)
    if isinstance(value, (dict, list)):
        raise ValueError(f"{name} is {kind_of(value)}, expected text")
    if value is None and not optional:
        raise ValueError(f"{name} is missing")
    return "" if value is None else str(value)
