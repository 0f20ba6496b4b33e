"""Added tokens that are markup though their tokenizers do not say so: the text of special ones is kept out of content,
that of these would become tokens there."""

import re
from collections.abc import Iterable

_MARKUP = re.compile(r"<[|｜].+[|｜]>|</?(think|tool_call|tool_response|arg_key|arg_value)>")
"""Roles of DeepSeek, what Qwen fills the middle with, thoughts and tools of Qwen, GLM and Phi. Others are text that got
a token of its own, such as Gemma's HTML."""
_SPOKEN = re.compile(r"</?(think|tool_call|arg_key|arg_value)>|<[|｜]/?tool[_▁](calls?|sep)(▁begin|▁end)?[|｜]>")
"""Those that a model writes into its answers: thoughts, and calls of tools."""


_BRACKETED = re.compile(r"<\S+>|\[\S+\]|\{\S+\}")
_SPOKEN_ABOUT = re.compile(r"think|thought|reason|tool|func|call|answer", re.IGNORECASE)
"""What is in the name of a token that a model writes into its answers, where the template alone makes it markup."""


def marks_in(tokens: Iterable[str], spoken: bool, template: str) -> frozenset[str]:
    """Those of the tokens that content may not hold: of a known form, or in brackets and written by the model's own
    chat template.

    Args:
        spoken: the content is what the model says.
        template: the chat template, or nothing.
    """
    return frozenset(token for token in tokens if _is_mark(token, spoken, template))


def _is_mark(token: str, spoken: bool, template: str) -> bool:
    if _MARKUP.fullmatch(token):
        return not (spoken and _SPOKEN.fullmatch(token))
    written = _BRACKETED.fullmatch(token) is not None and token in template
    return written and not (spoken and _SPOKEN_ABOUT.search(token))
