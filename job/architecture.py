"""An architecture's settings, before and after transformers uses them: the impossible ones are refused by name."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from job.errors import ModelError

SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads")
"""Settings that are 1 or more in every architecture that has them."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What the number of experts is called; the first that is there counts, and 1 or fewer make a dense model."""
AGAIN = "Copy the checkpoint again"


def refuse_impossible(config: Any, name: str) -> None:
    """Refuse sizes that make no model. Settings that only one architecture has are left to transformers.

    Args:
        config: the transformers configuration, of any architecture.
        name: what model.name says, for the message.

    Raises:
        ModelError: names the setting, its value and what is expected.
    """
    text = config.get_text_config(decoder=True)
    for setting in SIZES:
        value = _number(text, setting)
        if value is not None and value < 1:
            raise _wrong(text, name, setting, "a whole number, 1 or more")
    heads, groups = _number(text, "num_attention_heads"), _number(text, "num_key_value_heads")
    if heads and groups and heads % groups:
        raise _wrong(text, name, "num_key_value_heads", f"a divisor of {_own(text, 'num_attention_heads')} {heads}")
    experts = next((setting for setting in EXPERTS if _number(text, setting) is not None), None)
    chosen = _number(text, "num_experts_per_tok")
    if experts and chosen and (there := _number(text, experts) or 0) > 1 and chosen > there:
        raise _wrong(text, name, "num_experts_per_tok", f"at most the number of experts, {there}")


def refuse_encoder(model: Any, name: str) -> None:
    """Refuse a module whose tokens see those after them: BERT and its kind, unless config.json calls it a decoder."""
    config = model.config
    encoders = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # GPT-NeoX, a decoder, says false too
    if getattr(config, "is_decoder", None) is False and config.model_type in encoders:
        raise ModelError(
            f"model.name: {name}: {config.model_type} is an encoder (config.json has is_decoder false), whose tokens "
            "see those that they would have to learn. Use a decoder, such as Llama or Qwen"
        )


def explained(config: Any, fault: Exception) -> str:
    """What transformers says of settings it cannot use; where it says only a word, the setting that has that word."""
    for setting, value in _settings(config.to_dict()) if isinstance(fault, KeyError) else ():
        if fault.args == (value,):
            known = sorted({"default", *ROPE_INIT_FUNCTIONS} if setting.endswith("rope_type") else ACT2FN)
            if setting.endswith("rope_type") or "act" in setting:
                return f"config.json has {setting} {json.dumps(value)}, expected one of {', '.join(known)}. {AGAIN}"
            return f"config.json has {setting} {json.dumps(value)}, which transformers does not know. {AGAIN}"
    return " ".join(str(fault).split())[:300]


def _settings(settings: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting with a text for its value, by the path to it."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{inside}{name}.")
        elif isinstance(value, str):
            yield f"{inside}{name}", value


def _number(config: Any, setting: str) -> int | None:
    value = config.to_dict().get(_own(config, setting))  # as an attribute, one that layers have each would raise
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _own(config: Any, setting: str) -> str:
    """What this architecture's config.json calls the setting."""
    return str(getattr(config, "attribute_map", {}).get(setting, setting))


def _wrong(config: Any, name: str, setting: str, expected: str) -> ModelError:
    found = _number(config, setting)
    return ModelError(
        f"model.name: {name}: config.json has {_own(config, setting)} {found}, expected {expected}. {AGAIN}"
    )
