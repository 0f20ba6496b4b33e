"""Tokenizers that were published as Python code, built from their data instead: ChatGLM2, ChatGLM3, Qwen of 2023.

To add one: its class's name in ORIGINALS, with a function from its folder to the same tokenizer.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, processors

from job.errors import ModelError
from job.families import sentencepiece_bpe, tiktoken_bpe


class Original(NamedTuple):
    """A tokenizer, and what transformers has to be told of it: special tokens, sides, chat template.

    `chat_format` among the settings names the format of its chats, and is saved with the tokenizer. `splits` says that
    special tokens in a text are text to the authors' own: an attribute, not a setting, which would be saved and keep
    other programs from using the chat template.
    """

    tokenizer: Tokenizer
    settings: dict[str, Any]
    splits: bool = False


CHATGLM_MARKS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
CHATGLM_ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
CHATGLM2_TEMPLATE = (
    "[gMASK]sop{% set rounds = namespace(number=0) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set rounds.number = rounds.number + 1 %}"
    "{{ '[Round ' + rounds.number | string + ']\n\n问：' + message['content'] + '\n\n答：' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}"
    "{{ eos_token if loop.last else '\n\n' }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
CHATGLM3_TEMPLATE = (
    "[gMASK]sop{% for message in messages %}"
    "{{ '<|' + {'tool': 'observation'}.get(message['role'], message['role']) + '|>' }}"
    "{{ message.get('metadata', '') + '\n ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cure_of(folder: str) -> str:
    """What to do where the folder's own tokenizer cannot be had."""
    if _told(folder).get("tokenizer_class") == "ChatGLM4Tokenizer":
        return "Take the model in transformers' own layout, such as THUDM/glm-4-9b-chat-hf"
    return "Copy tokenizer.json next to it"


def _told(folder: str) -> dict[str, Any]:
    return _settings(folder, "config.json") | _settings(folder, "tokenizer_config.json")


def original(folder: str) -> Original | None:
    """The tokenizer of a folder whose own one is Python code that is known here; None for all others, and where a
    tokenizer.json makes it unnecessary.

    Raises:
        ModelError: a file is missing or damaged, or it is not told which ChatGLM this is.
    """
    if Path(folder, "tokenizer.json").is_file():
        return None
    told = _told(folder)
    build = ORIGINALS.get(told.get("tokenizer_class") or CLASSES.get(told.get("model_type", ""), ""))
    return build(folder) if build else None


def _chatglm(folder: str) -> Original:
    if Path(folder, "ice_text.model").is_file():
        raise ModelError(
            f"{folder} is the first ChatGLM-6B, whose architecture is not read. Use ChatGLM2-6B or ChatGLM3-6B"
        )
    third = _is_chatglm3(folder)
    content = _content(folder, "tokenizer.model")
    tokenizer, pieces = sentencepiece_bpe.build(content, f"{folder}/tokenizer.model")
    marks = CHATGLM_MARKS + CHATGLM_ROLES * third
    controls = [piece.text for piece in pieces if piece.kind in (sentencepiece_bpe.UNKNOWN, sentencepiece_bpe.CONTROL)]
    # "people" has an eop in it
    tokenizer.add_special_tokens([_mark(token, single_word=token.isalpha()) for token in [*controls, *marks]])
    prefix = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "sop")]
    tokenizer.post_processor = processors.TemplateProcessing("[gMASK] sop $A", "[gMASK] sop $A $B", prefix)
    settings = {
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "additional_special_tokens": marks,
        "chat_format": "chatglm3" if third else "chatglm2",
        "chat_template": CHATGLM3_TEMPLATE if third else CHATGLM2_TEMPLATE,
    }
    return Original(tokenizer, settings, splits=True)


def _is_chatglm3(folder: str) -> bool:
    """Both have one class of tokenizer, of which the later knows roles: the code tells, or else the model's name, which
    stands in its files or is the folder's."""
    code = Path(folder, "tokenization_chatglm.py")
    if code.is_file():
        text = code.read_text(encoding="utf-8")
        if "sMASK" in text:
            return "<|observation|>" in text
    written = (json.dumps(_settings(folder, name)) for name in ("config.json", "tokenizer_config.json"))
    for named in (*written, str(Path(folder).absolute())):
        versions: list[str] = re.findall(r"chatglm([23])", named.lower())
        if versions:
            return versions[-1] == "3"
    raise ModelError(
        f"{folder}: nothing says whether this is ChatGLM2 or ChatGLM3. "
        'Write "_name_or_path": "THUDM/chatglm3-6b" (or chatglm2-6b) into its config.json'
    )


def _qwen(folder: str) -> Original:
    tokenizer = tiktoken_bpe.build(_content(folder, "qwen.tiktoken"), QWEN_PATTERN, f"{folder}/qwen.tiktoken")
    tokenizer.add_special_tokens([_mark(token) for token in QWEN_MARKS])
    settings = {
        "eos_token": "<|endoftext|>",
        "additional_special_tokens": QWEN_MARKS[1:],
        "chat_template": QWEN_TEMPLATE,
    }
    return Original(tokenizer, settings)


ORIGINALS: dict[str, Callable[[str], Original]] = {"ChatGLMTokenizer": _chatglm, "QWenTokenizer": _qwen}
CLASSES = {"chatglm": "ChatGLMTokenizer", "qwen": "QWenTokenizer"}
"""The class of a model type's tokenizer where no file names it."""


def _mark(token: str, single_word: bool = False) -> AddedToken:
    return AddedToken(token, single_word=single_word, normalized=False, special=True)


def _content(folder: str, name: str) -> bytes:
    path = Path(folder, name)
    if not path.is_file():
        raise ModelError(
            f"{folder} has no {name}, which its tokenizer is made from. Copy it from where the model is from"
        )
    return path.read_bytes()


def _settings(folder: str, name: str) -> dict[str, Any]:
    path = Path(folder, name)
    try:
        written = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as fault:
        raise ModelError(f"{path} is damaged ({fault}). Copy it again") from fault
    return written if isinstance(written, dict) else {}
