"""How a model answers in transformers' words: its generation_config.json, and where training taught answers to end."""

from pathlib import Path
from typing import Any

import transformers

from job.chat import chat_format, encode, stop_ids
from job.config.learning import Model
from job.errors import ModelError
from job.pretrained import has_own_names
from job.tokenizer import GENERATION, Tokenizer, generation_file
from job.turns import Segment

_TALK = (Segment("user", "a"), Segment("assistant", "b", True))
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def stops(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer in the model's own chat format, as training teaches them."""
    chat = chat_format(tokenizer, None)
    try:
        encoded = encode(_TALK, tokenizer, chat)
    except ValueError:  # a template that wants other turns: what ends them is not known before there are rows
        encoded = []
    return stop_ids(encoded, tokenizer, chat)


def generation_settings(folder: str, architecture: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json for a model whose authors' own code ended its answers: their settings as far as
    transformers has them, and all the tokens that end an answer.

    Args:
        folder: the model's small files.
        architecture: its native configuration, for the ids that the authors did not write down.
        tokenizer: None keeps the authors' ends.

    Raises:
        ModelError: the file is damaged.
    """
    known = vars(transformers.GenerationConfig())
    written = {name: value for name, value in generation_file(folder).items() if name in known and name[0] != "_"}
    ids = {name: value for name in _IDS if (value := getattr(architecture, name, None)) is not None}
    ends = {"eos_token_id": stops(tokenizer)} if tokenizer else {}
    return {**ids, **written, **ends}


def generation_config(folder: str, model: Model, architecture: Any, tokenizer: Tokenizer | None) -> Any:
    """What transformers' `generate` asks: as `from_pretrained` loads it, or as `generation_settings` says.

    Raises:
        ModelError: the file is damaged.
    """
    generation_file(folder)
    kind = transformers.GenerationConfig
    try:
        if has_own_names(folder, model):
            return kind.from_dict(generation_settings(folder, architecture, tokenizer))
        if Path(folder, GENERATION).is_file():
            return kind.from_pretrained(folder)
        return kind.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    except (ValueError, TypeError, AttributeError) as fault:  # values of a wrong kind fail where they are compared
        raise ModelError(f"{folder}/{GENERATION} is damaged ({fault}). Copy it again") from fault
