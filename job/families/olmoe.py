"""OLMoE, whose experts lie apart in its files."""

from job.families.family import Family

OLMOE = Family(
    name="OLMoE",
    model_types=("olmoe",),
    targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    experts=True,
)
