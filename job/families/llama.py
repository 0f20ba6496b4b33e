"""Llama 1, 2 and 3, and all that share its architecture."""

from job.families.family import Family

LLAMA = Family(
    name="Llama 1, 2, 3",
    model_types=("llama",),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
