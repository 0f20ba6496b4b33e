"""A model's tokenizer with two ways of encoding: content is always text, markup may hold special tokens."""

import json
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from job.errors import ModelError
from job.families.added_tokens import marks_in
from job.families.originals import cure_of, original

TODAY = datetime(2024, 7, 26)
"""The day that chat templates are told it is. Some write today's date into the prompt, and a run repeated tomorrow
would learn other prompts. Llama 3's templates name this one where they are given no clock."""
GENERATION = "generation_config.json"
"""How a model answers, in transformers' words."""
_ANCHOR = "\n"
_MARKUP = 1000
"""Stretches of markup whose ids are remembered: every row has the same few."""
_one_at_a_time = threading.Lock()
"""transformers has the tokenizer itself remember whether special tokens are split, until the next call says: of two
threads one would encode as the other wants."""


class Tokenizer:
    """Wraps a transformers tokenizer; nothing in it is changed (no pad token is invented, eos stays eos).

    Args:
        folder: local folder with the tokenizer's files.
        trust_remote_code: allow tokenizers that come as Python code.

    Raises:
        ModelError: there is no tokenizer, or it is empty, or has no end-of-sequence token.
    """

    def __init__(self, folder: str, trust_remote_code: bool = False):
        try:
            self.inner: Any = _loaded(folder, trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as fault:
            raise ModelError(f"{folder}: no usable tokenizer ({_short(fault)}). {cure_of(folder)}") from fault
        if not self.inner.get_vocab():
            raise ModelError(f"{folder}: the tokenizer is empty. Its files are in a format that is not read")
        if self.inner.eos_token_id is None:
            raise ModelError(f"{folder}: the tokenizer has no eos token. Set eos_token in tokenizer_config.json")
        added = self.inner.added_tokens_decoder.values()
        self.specials = {token.content for token in added if token.special} | set(self.inner.all_special_tokens)
        plain = {token.content for token in added} - self.specials
        self._foreign = {spoken: marks_in(plain, spoken, self.chat_template or "") for spoken in (False, True)}
        self._strict: dict[bool, Any] = {}
        self._markup: dict[tuple[str, bool], list[int]] = {}
        self.ends = _ends(folder)
        self.prefix = self._prefix()
        self._anchor = self._anchor_ids()

    @property
    def eos(self) -> int:
        """Id of the end-of-sequence token."""
        return int(self.inner.eos_token_id)

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja chat template, if it has one."""
        template = self.inner.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def family_chat(self) -> str:
        """Name of the chat format of the model's family where no template can write it, else nothing."""
        return str(self.inner.init_kwargs.get("chat_format") or "")

    def text(self, text: str, first: bool = False, spoken: bool = False) -> list[int]:
        """Ids of content: the text of special tokens in it is plain text.

        Args:
            first: nothing comes before it.
            spoken: the model says it, and may write <think> and its like.

        Raises:
            ValueError: the text has half a character (a lone surrogate, from JSON such as "\\ud83d").
        """
        _refuse_half_characters(text)
        if any(mark in text for mark in self._foreign[spoken]):
            return self._encode(text, first, self._without_marks(spoken))
        return self._encode(text, first, self._plain)

    def joined(self, texts: Sequence[str], first: bool, markup: bool) -> list[list[int]]:
        """Ids of several stretches encoded as one, each id with the stretch in which it begins.

        Args:
            first: nothing comes before them.
            markup: special tokens in them are special.

        Raises:
            ValueError: as `text`.
        """
        stretches = ["" if first or not self._anchor else _ANCHOR, *texts]
        whole = "".join(stretches)
        _refuse_half_characters(whole)
        how = {"add_special_tokens": False, "return_offsets_mapping": True}
        with _one_at_a_time:
            encoding = self.inner(whole, split_special_tokens=not markup, **how)
        ends = list(accumulate(map(len, stretches)))
        ids: list[list[int]] = [[] for _ in stretches]
        for token, (start, _) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            ids[bisect_right(ends, start)].append(token)
        return ids[1:]

    def markup(self, text: str, first: bool = False) -> list[int]:
        """Ids of a template's own text, in which special tokens are special."""
        ids = self._markup.get((text, first))
        if ids is None:
            ids = self._encode(text, first, self._raw)
            if len(self._markup) < _MARKUP:
                self._markup[text, first] = ids
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The ids as text."""
        return str(self.inner.decode(list(ids)))

    def said(self, ids: Sequence[int]) -> str:
        """What an answer says, so far: without special tokens and space around it, and without the character at its
        end of which bytes are still to come. More ids make it longer and change nothing."""
        text = str(self.inner.decode(list(ids), skip_special_tokens=True))
        return text.rstrip("\ufffd").strip()

    def render(self, messages: list[dict[str, str]], ask: bool = False) -> str:
        """The messages through the model's chat template, on the day TODAY; `ask` for an answer behind them."""
        template = self.chat_template or ""
        if "strftime_now" in template:
            template = _CALENDAR + template
        return str(
            self.inner.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=ask)
        )

    def identity(self) -> str | None:
        """All that decides its ids, as text; None of a tokenizer that is a program, or has a part that is one."""
        kind = type(self.inner)
        if kind.__module__.startswith("transformers_modules"):
            return None
        try:
            backend = self.inner.backend_tokenizer.to_str()
        except Exception:  # there is none, or what is written in Python cannot be written down
            return None
        parts = {name: str(token) for name, token in self.inner.special_tokens_map.items()}  # templates are told them
        marks = [sorted(self.specials), *map(sorted, self._foreign.values())]
        around = [self.chat_template, self.family_chat, self.eos, self.ends, self.prefix, self._anchor]
        return json.dumps([kind.__name__, backend, parts, marks, *around])

    def save(self, folder: str) -> None:
        """Write the tokenizer's files into a local folder."""
        self.inner.save_pretrained(folder)

    def _encode(self, text: str, first: bool, encode: Callable[[str], list[int]]) -> list[int]:
        if not text:
            return []
        if not first and self._anchor:
            ids = encode(_ANCHOR + text)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return encode(text)

    def _raw(self, text: str) -> list[int]:
        with _one_at_a_time:
            return list(self.inner.encode(text, add_special_tokens=False, split_special_tokens=False))

    def _plain(self, text: str) -> list[int]:
        with _one_at_a_time:
            return list(self.inner.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _without_marks(self, spoken: bool) -> Callable[[str], list[int]]:
        """As `_plain`, by a copy to which more tokens are special; few texts hold any, so that it is seldom made."""
        if spoken not in self._strict:
            backend = self.inner.backend_tokenizer
            written = json.loads(backend.to_str())
            for token in written["added_tokens"]:
                token["special"] |= token["content"] in self._foreign[spoken]
            self._strict[spoken] = type(backend).from_str(json.dumps(written))
            self._strict[spoken].encode_special_tokens = True
        strict = self._strict[spoken]
        return lambda text: list(strict.encode(text, add_special_tokens=False).ids)

    def _prefix(self) -> list[int]:
        """What the tokenizer puts before every text, such as bos."""
        plain, full = self._raw("a"), list(self.inner.encode("a"))
        return full[: full.index(plain[0])] if plain and plain[0] in full else []

    def _anchor_ids(self) -> list[int]:
        """SentencePiece tokenizers put a space before every text they are given; a text that continues another must
        not get one. Encoding it behind a newline, whose ids are then cut off, avoids that."""
        tokens = self.inner.convert_ids_to_tokens(self._raw("a"))
        return self._raw(_ANCHOR) if tokens and tokens[0].startswith("▁") else []


def _after_fork() -> None:
    """A process of its own, in which no other thread will ever give the lock back."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _loaded(folder: str, trust_remote_code: bool) -> Any:
    made = original(folder)
    if made is None:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    inner = PreTrainedTokenizerFast(tokenizer_object=made.tokenizer, **made.settings)
    inner.split_special_tokens = made.splits
    return inner


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        half = f"\\u{ord(text[fault.start]):04x}"
        raise ValueError(f"half a character ({half}, a lone surrogate). Repair the row") from fault


def generation_file(folder: str) -> dict[str, Any]:
    """The parsed generation_config.json of a folder; empty where there is none.

    Raises:
        ModelError: it is damaged.
    """
    path = Path(folder, GENERATION)
    try:
        written = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as fault:
        raise ModelError(f"{path} is damaged ({fault}). Copy it again") from fault
    if not isinstance(written, dict):
        raise ModelError(f"{path} is damaged (no object with settings). Copy it again")
    return written


def _ends(folder: str) -> list[int]:
    """Tokens at which the model's authors end an answer, beside eos."""
    ends = generation_file(folder).get("eos_token_id") or []
    return ends if isinstance(ends, list) else [ends]


def _calendar() -> str:
    """A Jinja macro in place of transformers' strftime_now, which asks the clock; a function cannot be handed over."""
    codes = [f"%{flag}{code}" for code in "aAbBcdHIjmMpSUwWxXyY" for flag in ("", "-")]
    filled = "".join(f".replace({code!r}, {TODAY.strftime(code)!r})" for code in codes)
    # behind the last tag one newline is dropped, so that the template itself begins at the start of a line
    return "{% macro strftime_now(format) %}{{ format" + filled + " }}{% endmacro %}\n"


_CALENDAR = _calendar()


def _short(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:160]
