"""GPT-NeoX and Pythia. Their files, if old, hold causal masks and rotary tables too."""

from job.families.family import Family

GPT_NEOX = Family(
    name="GPT-NeoX, Pythia",
    model_types=("gpt_neox",),
    targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ignored=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
)
