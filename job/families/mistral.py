"""Mistral."""

from job.families.family import Family

MISTRAL = Family(
    name="Mistral",
    model_types=("mistral",),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
