"""A user's own format, as data.format names it: tests.my_rows:ask."""

from typing import Any


def ask(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Three turns, the first answer not learnt."""
    return [
        {"role": "user", "content": row["q"]},
        {"role": "assistant", "content": "Let me think.", "learn": False},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": row["a"]},
    ]
