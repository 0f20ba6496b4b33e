"""Qwen of 2023 (1.8B, 7B, 14B, 72B) as its authors published it: transformers' Qwen2 under other names.

Dynamic NTK and logn attention act in evaluation alone, on texts beyond seq_length, to which answers are therefore
held; all that is shorter, and training, is unaffected. w2 is the gate, although it comes second.
"""

from job.families.family import Family, From, Multiple, Only, Original, Rows, Weights

_LAYER, _NATIVE = "transformer.h.*", "model.layers.*"
_LANGUAGE = "Give Qwen's language model"

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": From("padded_vocab_size", also=("vocab_size",)),
    "hidden_size": From("hidden_size", also=("n_embd",)),
    "intermediate_size": From("intermediate_size", also=("ffn_hidden_size",), over=2),
    "num_hidden_layers": From("num_hidden_layers", also=("n_layer",)),
    "num_attention_heads": From("num_attention_heads", also=("n_head",)),
    "num_key_value_heads": From("num_attention_heads", also=("n_head",)),
    "head_dim": From("kv_channels", absent=None),
    "rms_norm_eps": From("layer_norm_epsilon", "number", absent=1e-6),
    "max_position_embeddings": From("max_position_embeddings", also=("n_positions", "seq_length")),
    "seq_length": From("seq_length", absent=None),
    "rope_parameters": {"rope_type": "default", "rope_theta": From("rotary_emb_base", "number", absent=10_000)},
    "tie_word_embeddings": From("tie_word_embeddings", "flag", absent=False),
    "eos_token_id": From("eos_token_id", "ids", absent=None),
    "pad_token_id": From("pad_token_id", "ids", absent=None),
}
ONLY = (
    Only("visual", (None,), "Qwen2 sees no images", cure=_LANGUAGE),
    Only("audio", (None,), "Qwen2 hears no sound", cure=_LANGUAGE),
    Only("no_bias", (True,), "Qwen2's linears other than query, key and value have no bias"),
    Only("rotary_pct", (1,), "Qwen2's rotary positions turn whole heads"),
    Only("pos_emb", ("rotary",), "Qwen2 has rotary positions alone"),
    Only("scale_attn_weights", (True,), "Qwen2 always scales its attention"),
    Only("apply_residual_connection_post_layernorm", (False,), "Qwen2 takes residuals before its norms"),
    Only("use_cache_quantization", (False,), "Qwen2 keeps keys and values as they are"),
)
WEIGHTS: Weights = {
    "transformer.wte": "model.embed_tokens",
    f"{_LAYER}.ln_1": f"{_NATIVE}.input_layernorm",
    f"{_LAYER}.attn.c_attn": (
        Rows(f"{_NATIVE}.self_attn.q_proj", ("hidden_size",)),
        Rows(f"{_NATIVE}.self_attn.k_proj", ("hidden_size",)),
        Rows(f"{_NATIVE}.self_attn.v_proj", ("hidden_size",)),
    ),
    f"{_LAYER}.attn.c_proj": f"{_NATIVE}.self_attn.o_proj",
    f"{_LAYER}.ln_2": f"{_NATIVE}.post_attention_layernorm",
    f"{_LAYER}.mlp.w2": f"{_NATIVE}.mlp.gate_proj",
    f"{_LAYER}.mlp.w1": f"{_NATIVE}.mlp.up_proj",
    f"{_LAYER}.mlp.c_proj": f"{_NATIVE}.mlp.down_proj",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
}
QWEN = Family(
    name="Qwen (first generation)",
    model_types=("qwen",),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    weights=WEIGHTS,
    ignored=(".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".attn.logn_tensor"),
    original=Original(
        config=CONFIG,
        only=ONLY,
        multiples=(
            Multiple("hidden_size", ("num_attention_heads",)),
            Multiple("hidden_size", ("num_attention_heads", "head_dim"), exactly=True),
        ),
        cure="Give a checkpoint with the settings of the published Qwen-1.8B, 7B, 14B or 72B",
    ),
)
