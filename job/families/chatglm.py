"""ChatGLM2 and ChatGLM3 as their authors published them: transformers' Glm under other names.

Rotary positions turn the first half of each head. rope_ratio multiplies their base in ChatGLM3-32k and GLM-4-9B.
"""

from job.families.family import Family, From, Multiple, Only, Original, Rows, Weights

_LAYER, _NATIVE = "transformer.encoder.layers.*", "model.layers.*"
_FIRST, _LATER = "this is ChatGLM-6B of March 2023, another architecture", "Use ChatGLM2 or ChatGLM3"

CONFIG = {
    "model_type": "glm",
    "vocab_size": From("padded_vocab_size"),
    "hidden_size": From("hidden_size"),
    "intermediate_size": From("ffn_hidden_size"),
    "num_hidden_layers": From("num_layers"),
    "num_attention_heads": From("num_attention_heads"),
    "num_key_value_heads": From("multi_query_group_num"),
    "head_dim": From("kv_channels"),
    "attention_bias": From("add_qkv_bias", "flag", absent=False),
    "rms_norm_eps": From("layernorm_epsilon", "number", absent=1e-5),
    "max_position_embeddings": From("seq_length"),
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": From("rope_ratio", "number", absent=1, times=10_000),
        "partial_rotary_factor": 0.5,
    },
    # the authors' code never ties, and the class's own ids lie beyond these vocabularies
    "tie_word_embeddings": False,
    "eos_token_id": From("eos_token_id", "ids", absent=2),
    "pad_token_id": From("pad_token_id", "ids", absent=0),
}
ONLY = (
    Only("position_encoding_2d", (False,), _FIRST, cure=_LATER),
    Only("inner_hidden_size", (None,), _FIRST, cure=_LATER),
    Only("quantization_bit", (None, 0), "its weights are packed", cure="Give the 16-bit checkpoint it was made from"),
    Only("pre_seq_len", (None,), "Glm has no place for a trained prefix before the keys of every layer"),
    Only("add_bias_linear", (False,), "Glm's linears other than query, key and value have no bias"),
    Only("rmsnorm", (True,), "Glm has RMS norms alone"),
    Only("post_layer_norm", (True,), "Glm always ends with a norm"),
    Only("apply_residual_connection_post_layernorm", (False,), "Glm takes residuals before its norms"),
    Only("original_rope", (True,), "other rotary positions were never published"),
    Only("multi_query_attention", (True,), "query, key and value then lie in another order", absent=False),
    Only("fp32_residual_connection", (False,), "Glm has residuals in the type of its weights"),
    Only("vision_config", (None,), "Glm sees no images", cure="Give the language model"),
    Only(
        "rope_ratio",
        (1,),
        "ChatGLM2-32k divides positions by it, which was not compared with the authors' code, and nothing says that "
        "this is a later one",
        cure='Use ChatGLM3-6B-32k; if it is that, write "_name_or_path": "THUDM/chatglm3-6b-32k" into its config.json',
        unless=("chatglm3", "glm-4"),
    ),
)
WEIGHTS: Weights = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    f"{_LAYER}.input_layernorm": f"{_NATIVE}.input_layernorm",
    f"{_LAYER}.self_attention.query_key_value": (
        Rows(f"{_NATIVE}.self_attn.q_proj", ("num_attention_heads", "head_dim")),
        Rows(f"{_NATIVE}.self_attn.k_proj", ("num_key_value_heads", "head_dim")),
        Rows(f"{_NATIVE}.self_attn.v_proj", ("num_key_value_heads", "head_dim")),
    ),
    f"{_LAYER}.self_attention.dense": f"{_NATIVE}.self_attn.o_proj",
    f"{_LAYER}.post_attention_layernorm": f"{_NATIVE}.post_attention_layernorm",
    f"{_LAYER}.mlp.dense_h_to_4h": f"{_NATIVE}.mlp.gate_up_proj",
    f"{_LAYER}.mlp.dense_4h_to_h": f"{_NATIVE}.mlp.down_proj",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
}
CHATGLM = Family(
    name="ChatGLM2, ChatGLM3",
    model_types=("chatglm",),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    weights=WEIGHTS,
    ignored=(".rotary_pos_emb.inv_freq",),
    original=Original(
        config=CONFIG,
        only=ONLY,
        multiples=(Multiple("num_attention_heads", ("num_key_value_heads",)),),
        cure="Give a checkpoint with the settings of the published ChatGLM2 or ChatGLM3",
    ),
)
