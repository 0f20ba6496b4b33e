"""The published files of ChatGLM2, ChatGLM3 and Qwen of 2023, made small, and what the authors' own code gives."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from job.chat import Encoded, chat_format, encode
from job.tokenizer import Tokenizer
from job.turns import Segment, turns_of
from tests.conftest import REPOSITORY

MODELS = ("chatglm2", "chatglm3", "qwen1")
ORIGINALS = REPOSITORY / "tests/legacy_models"
VECTORS = {name: json.loads((ORIGINALS / name / "tokenizer_vectors.json").read_text()) for name in MODELS}
"""What the authors' unmodified code gives for texts and chats."""
TALK = [
    Segment("user", "你好"),
    Segment("assistant", "in", True),
    Segment("user", "on"),
    Segment("assistant", "你好", True),
]


@cache
def original(name: str) -> Tokenizer:
    """The model's tokenizer."""
    return Tokenizer(str(ORIGINALS / name))


def ids_of(parts: Sequence[Encoded]) -> list[int]:
    """The ids of a row."""
    return [token for part in parts for token in part.ids]


def encoded(tokenizer: Tokenizer, turns: Sequence[Segment]) -> list[Encoded]:
    """The turns in the model's own format."""
    return encode(turns, tokenizer, chat_format(tokenizer, None))


def asked(name: str, chat: dict[str, Any]) -> list[Segment]:
    """A chat of the vectors as turns, with an empty answer at the end."""
    if "messages" in chat:
        return [*turns_of(chat["messages"]), Segment("assistant", "", True)]
    turns = [Segment("system", chat["system"])] if name == "qwen1" else []
    for question, answer in chat["history"]:
        turns += [Segment("user", question), Segment("assistant", answer)]
    return [*turns, Segment("user", chat["query"]), Segment("assistant", "", True)]
