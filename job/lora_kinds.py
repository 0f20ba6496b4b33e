"""What the settings of a written adapter say of its values. A and B with one scale are read here; what else would
change the values is refused by its name, and so is what nobody here knows."""

import json
import math
from collections.abc import Mapping
from typing import Any

from job.adapter import SETTINGS
from job.errors import InputError

WITHOUT_VALUES = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
"""Settings that change no value: where things are, how training went, and details of what another setting turns on."""
IN_TENSORS = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"})
"""Which modules have an adapter: the names of the tensors say the same."""
READ = {
    "bias": (None, "none", "all", "lora_only"),
    "use_rslora": (None, True, False),
    "use_dora": (None, True, False),
    "fan_in_fan_out": (None, True, False),
}
"""Settings that are read with the tensors, and their values. None is that of a peft that did not have them yet."""
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""How A and B began where the base stayed what it was; all others took something out of the base's weights."""
SCALES = ("rank_pattern", "alpha_pattern")
REFUSED = {
    "alora_invocation_tokens": "the adapter acts behind these tokens alone, and no weight can hold that",
    "arrow_config": "each token chooses between adapters, and no weight can hold that",
    "ensure_weight_tying": "embeddings and output layer share what was trained",
    "kasa_config": "a part of the base's weights was taken out, and a diagonal lies between B and A",
    "layer_replication": "the tuned model has layers that the base has not",
    "lora_bias": "B has a bias of its own",
    "modules_to_save": "whole modules were trained beside the products",
    "monteclora_config": "the products were drawn at random around A and B",
    "target_parameters": "there are products on parameters that are no linear's weight",
    "trainable_token_indices": "rows of the embeddings were trained beside the products",
    "use_bdlora": "A or B holds blocks of a larger matrix",
    "use_qalora": "A reads means over groups of inputs",
    "velora_config": "there are projections beside A and B",
}
"""Settings of other kinds of LoRA, and why A and B do not say it all; off is None, false or empty."""


def refuse_other_kinds(settings: Mapping[str, Any], url: str) -> None:
    """Refuse an adapter that is more than products of A and B, with one scale, on a base as it was published.

    Args:
        settings: the parsed adapter_config.json.
        url: the adapter's folder.

    Raises:
        InputError: it is, or says what is not known here.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{url} holds an adapter of the kind {kind}, expected LORA. Only such are exported or merged")
    if not (_is_rank(settings.get("r")) and _is_number(settings.get("lora_alpha"))):
        raise InputError(f"{url}/{SETTINGS} has no numbers r and lora_alpha. Copy the adapter again")
    for name in SCALES:
        if settings.get(name):
            raise InputError(f"{url}: {name} gives modules scales of their own. Expected one for all: r and lora_alpha")
    for name, values in READ.items():
        _refuse_odd_value(name, settings.get(name), values, url)
    _refuse_changed_base(settings.get("init_lora_weights"), url)
    for name in sorted(settings):
        if settings[name] and name not in KNOWN:
            _refuse(name, settings[name], url)


KNOWN = WITHOUT_VALUES | IN_TENSORS | set(READ) | {"peft_type", "init_lora_weights", *SCALES, "r", "lora_alpha"}
"""Settings that do not have to be off."""


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _refuse_odd_value(name: str, value: Any, values: tuple[Any, ...], url: str) -> None:
    if not any(value is known or (isinstance(value, str) and value == known) for known in values):
        expected = " or ".join(json.dumps(known) for known in values if known is not None)
        raise InputError(f"{url}/{SETTINGS}: {name} is {_written(value)}, expected {expected}. Copy the adapter again")


def _refuse_changed_base(value: Any, url: str) -> None:
    beginning = value.lower() if isinstance(value, str) else value
    if not any(beginning is known or (isinstance(value, str) and beginning == known) for known in BEGINNINGS):
        raise InputError(
            f"{url}: init_lora_weights is {_written(value)}, which changes the base's weights before training, and A "
            "and B belong to the changed ones. Save the adapter again with peft's "
            "path_initial_model_for_weight_conversion"
        )


def _refuse(name: str, value: Any, url: str) -> None:
    if name in REFUSED:
        raise InputError(
            f"{url}: {name} is {_written(value)}: {REFUSED[name]}. Only products of A and B are exported or merged"
        )
    raise InputError(
        f"{url}: {name} is {_written(value)}, which is not known here and may change what the adapter computes. "
        f"Take it out of {SETTINGS} if it does not"
    )


def _written(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
