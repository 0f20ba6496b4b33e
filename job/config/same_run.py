"""Is this the run that already lies under the output URL? Old and new settings, side by side."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from job.config.run import RunConfig, fields, rule_of


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
        before, after = getattr(getattr(old, section), name), getattr(getattr(new, section), name)
        if before != after:
            found.append(Change(f"{section}.{name}", rule_of(field).name, before, after))
    return found


def fixed_hash(config: RunConfig) -> str:
    """SHA-256 over the fixed settings: equal hashes, same run."""
    fixed = {
        f"{section}.{name}": getattr(getattr(config, section), name)
        for section, name, field in fields()
        if rule_of(field).name == "fixed"
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
