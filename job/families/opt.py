"""OPT."""

from job.families.family import Family

OPT = Family(
    name="OPT",
    model_types=("opt",),
    targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
)
