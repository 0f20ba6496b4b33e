"""GPT-2 and DialoGPT. Their files, if old, hold the causal masks too."""

from job.families.family import Family

GPT2 = Family(
    name="GPT-2, DialoGPT",
    model_types=("gpt2",),
    targets=("c_attn", "c_proj", "c_fc"),
    ignored=(".attn.bias", ".attn.masked_bias"),
)
