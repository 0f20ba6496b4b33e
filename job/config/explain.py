"""The documentation of the settings, made from the settings themselves."""

import json
from typing import Any

from pydantic_core import PydanticUndefined

from job.config.load import suggest
from job.config.run import RunConfig, fields, rule_of
from job.errors import ConfigError


def schema() -> dict[str, Any]:
    """JSON schema of the run file, for editors."""
    return RunConfig.model_json_schema()


def explain(key: str) -> str:
    """What a setting (`lora.rank`) or a section (`lora`) means: type, default, rule and meaning.

    Raises:
        ConfigError: no such setting; the message has the nearest one.
    """
    known = {f"{section}.{name}": field for section, name, field in fields()}
    wanted = [name for name in known if name == key or name.startswith(key + ".")]
    if not wanted:
        names = known if "." in key else {name.partition(".")[0] for name in known}
        raise ConfigError("--explain", [f"{key}: unknown name. {suggest(key, names)}"])
    schemas = schema()["$defs"]
    blocks = []
    for name in wanted:
        field = known[name]
        section, _, leaf = name.partition(".")
        properties = schemas[RunConfig.model_fields[section].annotation.__name__]["properties"]  # type: ignore[union-attr]
        default = "required" if field.default is PydanticUndefined else f"default {json.dumps(field.default)}"
        rule = rule_of(field)
        meaning = " ".join((field.description or "").split())
        blocks.append(f"{name} ({_kind(properties[leaf])}; {default})\n  {meaning}\n  {rule.name}: {rule.meaning}.")
    return "\n\n".join(blocks)


def _kind(schema: dict[str, Any]) -> str:
    """The allowed values in one line."""
    if "anyOf" in schema:
        return " | ".join(_kind(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " ".join(f"{sign} {schema[word]}" for word, sign in bounds.items() if word in schema)
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'])}"
    return f"{schema['type']} {limits}".rstrip()
