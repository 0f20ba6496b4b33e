"""GLM-4 under transformers' names: of 2024 (glm) and of April 2025 (glm4)."""

from job.families.family import Family

GLM = Family(
    name="GLM-4",
    model_types=("glm", "glm4"),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
)
