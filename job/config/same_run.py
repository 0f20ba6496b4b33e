"""Is this the run that already lies under the output URL? Old and new settings, side by side."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from job.config.run import RunConfig, fields, rule_of
from job.config.urls import unsigned


@dataclass(frozen=True)
class Change:
    """One setting that differs between the run under output.url and the one asked for."""

    key: str
    rule: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} there, {_shown(self.new)} here"


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """All settings whose values differ, in the order of the documentation."""
    found = []
    for section, name, field in fields():
        before, after = (unsigned(getattr(getattr(config, section), name)) for config in (old, new))
        if before != after:
            found.append(Change(f"{section}.{name}", rule_of(field).name, before, after))
    return found


def fixed_hash(config: RunConfig) -> str:
    """SHA-256 over the fixed settings: equal hashes, same run."""
    fixed = {
        f"{section}.{name}": unsigned(getattr(getattr(config, section), name))
        for section, name, field in fields()
        if rule_of(field).name == "fixed"
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def without_signatures(config: RunConfig) -> dict[str, dict[str, Any]]:
    """All settings by section, as they may be written into a file: without the queries of addresses."""
    return {
        section: {name: unsigned(value) for name, value in values.items()}
        for section, values in config.model_dump().items()
    }


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
