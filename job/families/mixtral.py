"""Mixtral: experts that transformers fuses and its files hold apart, under other names."""

from job.families.family import Family

_FILE, _NATIVE = "model.layers.*.block_sparse_moe", "model.layers.*.mlp"

MIXTRAL = Family(
    name="Mixtral",
    model_types=("mixtral",),
    targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    weights={
        f"{_FILE}.gate": f"{_NATIVE}.gate",
        f"{_FILE}.experts.*.w1": f"{_NATIVE}.experts.*.gate_proj",
        f"{_FILE}.experts.*.w3": f"{_NATIVE}.experts.*.up_proj",
        f"{_FILE}.experts.*.w2": f"{_NATIVE}.experts.*.down_proj",
    },
    experts=True,
)
