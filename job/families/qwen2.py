"""Qwen2, Qwen2.5 and Qwen3, and their Mixtures-of-Experts, whose experts lie apart in their files."""

from job.families.family import Family

QWEN2 = Family(
    name="Qwen2, Qwen2.5, Qwen3",
    model_types=("qwen2", "qwen3"),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
QWEN2_MOE = Family(
    name="Qwen1.5-MoE, Qwen2-MoE",
    model_types=("qwen2_moe",),
    targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    experts=True,
)
QWEN3_MOE = Family(
    name="Qwen3-MoE",
    model_types=("qwen3_moe",),
    targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    experts=True,
)
