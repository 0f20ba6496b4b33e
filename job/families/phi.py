"""Phi-3, Phi-3.5 and Phi-4, with query, key and value in one linear, gate and up in another."""

from job.families.family import Family

PHI = Family(
    name="Phi-3, Phi-4",
    model_types=("phi3",),
    targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
)
