"""A model's tokenizer with two ways of encoding: content is always text, markup may hold special tokens."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from transformers import AutoTokenizer

from job.errors import ModelError

TODAY = datetime(2024, 7, 26)
"""The day that chat templates are told it is. Some write today's date into the prompt, and a run repeated tomorrow
would learn other prompts. Llama 3's templates name this one where they are given no clock."""
_ANCHOR = "\n"


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
            self.inner: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as fault:
            raise ModelError(
                f"{folder}: no usable tokenizer ({_short(fault)}). Copy tokenizer.json next to it"
            ) from fault
        if not self.inner.get_vocab():
            raise ModelError(f"{folder}: the tokenizer is empty. Its files are in a format that is not read")
        if self.inner.eos_token_id is None:
            raise ModelError(f"{folder}: the tokenizer has no eos token. Set eos_token in tokenizer_config.json")
        added = self.inner.added_tokens_decoder.values()
        self.specials = {token.content for token in added if token.special} | set(self.inner.all_special_tokens)
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

    def text(self, text: str, first: bool = False) -> list[int]:
        """Ids of content: the text of special tokens in it is plain text. `first`: nothing comes before it.

        Raises:
            ValueError: the text has half a character (a lone surrogate, from JSON such as "\\ud83d").
        """
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            half = f"\\u{ord(text[fault.start]):04x}"
            raise ValueError(f"half a character ({half}, a lone surrogate). Repair the row") from fault
        return self._encode(text, first, split_special_tokens=True)

    def markup(self, text: str, first: bool = False) -> list[int]:
        """Ids of a template's own text, in which special tokens are special."""
        return self._encode(text, first, split_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The ids as text."""
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))

    def render(self, messages: list[dict[str, str]]) -> str:
        """The messages through the model's chat template, on the day TODAY."""
        template = self.chat_template or ""
        if "strftime_now" in template:
            template = _CALENDAR + template
        return str(self.inner.apply_chat_template(messages, chat_template=template, tokenize=False))

    def save(self, folder: str) -> None:
        """Write the tokenizer's files into a local folder."""
        self.inner.save_pretrained(folder)

    def _encode(self, text: str, first: bool, split_special_tokens: bool) -> list[int]:
        if not text:
            return []
        if not first and self._anchor:
            ids = self._raw(_ANCHOR + text, split_special_tokens)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return self._raw(text, split_special_tokens)

    def _raw(self, text: str, split_special_tokens: bool) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens))

    def _prefix(self) -> list[int]:
        """What the tokenizer puts before every text, such as bos."""
        plain, full = self._raw("a", False), list(self.inner.encode("a"))
        return full[: full.index(plain[0])] if plain and plain[0] in full else []

    def _anchor_ids(self) -> list[int]:
        """SentencePiece tokenizers put a space before every text they are given; a text that continues another must
        not get one. Encoding it behind a newline, whose ids are then cut off, avoids that."""
        tokens = self.inner.convert_ids_to_tokens(self._raw("a", False))
        return self._raw(_ANCHOR, False) if tokens and tokens[0].startswith("▁") else []


def _calendar() -> str:
    """A Jinja macro in place of transformers' strftime_now, which asks the clock; a function cannot be handed over."""
    codes = [f"%{flag}{code}" for code in "aAbBcdHIjmMpSUwWxXyY" for flag in ("", "-")]
    filled = "".join(f".replace({code!r}, {TODAY.strftime(code)!r})" for code in codes)
    # behind the last tag one newline is dropped, so that the template itself begins at the start of a line
    return "{% macro strftime_now(format) %}{{ format" + filled + " }}{% endmacro %}\n"


_CALENDAR = _calendar()


def _short(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:160]
