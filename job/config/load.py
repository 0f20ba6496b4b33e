"""From a YAML file and `section.key=value` words to a RunConfig, with every fault reported at once."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import dotenv
import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from job.config.run import RunConfig
from job.config.urls import holds_keys
from job.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number (YAML 1.1 wants 2.0e-4), a repeated key is a fault."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):  # such as {{place}}, which is a mapping as a key
                raise yaml.MarkedYAMLError(problem="a name is no plain text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_dotenv_file(path: str = ".env") -> bool:
    """Put the secrets of an .env file into the environment, where set variables win. True if there is one.

    Raises:
        ConfigError: the file cannot be read, or is no text that can be put there. Its content is not repeated.
    """
    try:
        return dotenv.load_dotenv(path, override=False)
    except OSError as fault:
        raise ConfigError(path, [f"cannot be read: {fault.strerror}. Make it readable, or remove it"]) from fault
    except UnicodeDecodeError as fault:
        raise ConfigError(path, ["is no UTF-8 text. Save it as UTF-8"]) from fault
    except ValueError as fault:  # such as a NUL byte in a value
        raise ConfigError(path, [f"cannot be put into the environment: {fault}. Repair the line"]) from fault


def load_config(path: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: a YAML file.
        overrides: words like `train.max_steps=20`; values are YAML.

    Raises:
        ConfigError: the file is missing or no YAML, or any setting is wrong; all faults in one message.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as fault:
        raise ConfigError(
            path, [f"cannot be read: {fault.strerror}. Give the path of a run file, see configs/"]
        ) from fault
    except UnicodeDecodeError as fault:
        raise ConfigError(path, ["is no UTF-8 text. Give the path of a run file, see configs/"]) from fault
    words = list(overrides)
    return parse_config(text, words, path, f"{path} and the settings behind it" if words else path)


def parse_config(
    text: str, overrides: Iterable[str] = (), source: str = "the run file", sources: str | None = None
) -> RunConfig:
    """Read a run file's text; see `load_config`.

    Args:
        source: what messages call the text.
        sources: what they call it together with the overrides; the same when left out.
    """
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as fault:  # an impossible date is a ValueError
        if holds_keys(text):  # YAML's own message quotes the text, and so would the exception behind ours
            mark = fault.problem_mark if isinstance(fault, yaml.MarkedYAMLError) else None
            where = f" in line {mark.line + 1}" if mark else ""
            raise ConfigError(source, [f"is no valid YAML{where}, and holds a user name or password"]) from None
        raise ConfigError(source, [f"is no valid YAML: {' '.join(str(fault).split())}"]) from fault
    if not isinstance(values, dict):
        raise ConfigError(source, ["is no mapping of sections such as model, data, output"])
    faults = _apply(values, overrides)
    values = {name: section for name, section in values.items() if section is not None}  # all its lines commented out
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as invalid:
        faults += _sentences(invalid.errors())
    if faults:
        raise ConfigError(sources or source, faults)
    return config


def _apply(values: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Write the overrides into `values`; returns what is wrong with them."""
    faults = []
    for word in overrides:
        key, equals, text = word.partition("=")
        word = "a setting with a user name or password" if holds_keys(word) else word
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            faults.append(f"{word}: is no setting. Write section.key=value, such as train.max_steps=20")
            continue
        if values.get(section) is None:
            values[section] = {}
        try:
            values[section][name] = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        except (yaml.YAMLError, TypeError, ValueError):
            faults.append(f"{word}: the value is no valid YAML, or {section} is no section")
    return faults


def _sentences(errors: Sequence[ErrorDetails]) -> list[str]:
    """One sentence a fault, in the order of the settings.

    pydantic reports every branch of a union such as `str | list[str]`: the ones that looked deepest count, and those
    that found the same are one sentence.
    """
    depth: dict[tuple[int | str, ...], int] = {}
    for error in errors:
        depth[error["loc"][:2]] = max(depth.get(error["loc"][:2], 0), len(error["loc"]))
    said: dict[str, str] = {}
    for error in errors:
        if len(error["loc"]) == depth[error["loc"][:2]]:
            found, expected = _sentence(error)
            said[found] = f"{said[found]} or {expected.removeprefix('input should be ')}" if found in said else expected
    return [found + expected for found, expected in said.items()]


def _sentence(error: ErrorDetails) -> tuple[str, str]:
    """(`section.key: what was found`, what was expected) in the words of this package."""
    at = [str(part) for part in error["loc"]]
    where = ".".join(at[:2])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown name. ", suggest(at[-1], _names(at[:-1]))
    if error["type"] == "missing":
        return f"{where}: is required. ", _required_hint(at)
    if error["type"] == "value_error":
        fault = str(error["ctx"]["error"])
        named = not where or fault.startswith(f"{where}.")  # a fault between sections names its setting itself
        return "" if named else f"{where}: ", fault
    found = error["input"]
    shown = type(found).__name__ if isinstance(found, (Mapping, BaseModel)) or holds_keys(str(found)) else repr(found)
    if error["type"] == "model_type":
        return f"{where}: {shown} is no section. ", "Write its settings beneath it, indented"
    return f"{where}: {shown} is wrong: ", error["msg"][0].lower() + error["msg"][1:]


def suggest(name: str, valid: Iterable[str]) -> str:
    """`Did you mean "rank"? Valid: alpha, rank.`"""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, 1)
    return (f'Did you mean "{near[0]}"? ' if near else "") + f"Valid: {', '.join(names)}."


def _names(section: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in section:
        annotation = model.model_fields[part].annotation
        model = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel))
    return list(model.model_fields)


def _required_hint(at: list[str]) -> str:
    return {
        "model": "Write model: {name: owner/name or a folder}",
        "data": "Write data: {train: rows.jsonl}",
        "output": "Write output: {url: runs/first}",
    }.get(at[0], "Give it a value") + "."
