"""Architectures that nobody knows, with Llama's settings: read as Llama, or refused for what Llama lacks."""

import json
from collections.abc import Mapping
from typing import Any

from job.errors import ModelError

NEEDED = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size",
)  # fmt: skip
"""Settings that an architecture has to have to be taken for Llama."""
KNOWN = (
    *NEEDED, "attention_bias", "attention_dropout", "head_dim", "hidden_act", "max_position_embeddings", "mlp_bias",
    "num_key_value_heads", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
)  # fmt: skip
"""Settings that Llama computes with."""
SILENT = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "model_type",
    "pad_token_id", "pretraining_tp", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
"""Settings that change no number of the model."""


def is_like_llama(written: Mapping[str, Any]) -> bool:
    """Whether config.json has Llama's settings, and no code of its authors that might compute otherwise."""
    return "model_type" in written and "auto_map" not in written and all(name in written for name in NEEDED)


def as_llama(written: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as Llama's. Whether the tensors are Llama's too shows when they are matched with its module.

    Raises:
        ModelError: names a setting that Llama does not have and that is not off.
    """
    for name, value in written.items():
        if value and name not in (*KNOWN, *SILENT):
            raise ModelError(
                f"{written['model_type']}: config.json has {name} {json.dumps(value)}, which Llama does not have, and "
                "transformers does not know this architecture. Use one that it knows"
            )
    return {**written, "model_type": "llama"}
