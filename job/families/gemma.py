"""Gemma, Gemma 2 and Gemma 3, of which the larger ones see images too: they are read without their eyes."""

from job.families.family import Family, Inner

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

GEMMA = Family(
    name="Gemma 1, 2, 3",
    model_types=("gemma", "gemma2", "gemma3_text"),
    targets=_TARGETS,
)
GEMMA3 = Family(
    name="Gemma 3 with images, for text",
    model_types=("gemma3",),
    targets=_TARGETS,
    inner=Inner(
        config="text_config",
        prefix="language_model.",
        # which the 4B model leaves out
        absent={
            "model_type": "gemma3_text",
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
        },
    ),
)
