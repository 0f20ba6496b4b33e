"""What headers and config.json say about a model: its sizes, what quantization takes, what stays in 16 bits.

Nothing is loaded. From names and shapes alone, the 2-D weights inside numbered layers are the linears that transformers
hands to bitsandbytes; embeddings, output layer, norms, biases and weights of any other rank stay as they are.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.errors import ModelError
from job.tensors import Tensor

CONV1D = ("gpt2", "openai-gpt")
"""Model types whose linears are transformers' Conv1D, which stores a weight as [in, out]."""
IGNORED = ("rotary_emb.inv_freq",)
"""Tensors of old checkpoints that newer code computes itself."""
ROUTERS = (".gate.weight", ".router.weight")
"""Weights that choose experts, which are no linears of transformers' and stay as they are."""
FLOATS = ("BF16", "F16", "F32", "F64")
HEADS = ("lm_head.weight", "output_layer.weight", "embed_out.weight")
"""How output layers are called."""
NORMS = (
    *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe", "granite"),
    *("phi3", "glm", "glm4", "smollm3", "exaone4", "seed_oss", "internlm3", "hunyuan_v1_dense"),
)
"""Model types whose RMS norms are Llama's to the letter, so that `norm_and_gate` takes them in one step."""
GATES = (
    *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe", "granite"),
    *("smollm3", "exaone4", "internlm3", "hunyuan_v1_dense", "olmo", "olmo2", "olmo3", "cohere", "cohere2", "stablelm"),
)
"""The same of gated MLPs."""
CAUSAL = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmo", "olmo2", "olmoe", "granite"),
    *("phi3", "glm", "glm4", "smollm3", "seed_oss", "internlm3", "gemma", "starcoder2"),
)
"""Model types whose attention is causal and nothing else but for windows, so that `row_attention` takes it."""
HEAD_SIZES = range(8, 257, 8)
"""Sizes of a head that FlashAttention takes."""
OF_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap", "lm_head_multiplier")
"""Settings by which some models change what their output layer gives."""
NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads"),
    "head_size": ("head_dim", "kv_channels"),
    "intermediate": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"),
    "experts_per_token": ("num_experts_per_tok", "moe_topk", "top_k_experts"),
}
"""What config.json calls the sizes, by family; the first that is there counts."""
REQUIRED = ("hidden", "layers", "vocabulary", "heads")
"""Sizes that every decoder model has; the others may be off (0), or a list with one for each layer."""

_LAYER = re.compile(r"^(.*?)(?<![^.])(\d+)\.(.+)$")
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


@dataclass(frozen=True)
class Linear:
    """All linears of one place in the layers: `path` within a layer (numbers of experts become *), features in and
    out, `count` in the whole model."""

    path: str
    inputs: int
    outputs: int
    count: int

    @property
    def name(self) -> str:
        """Its last name, as in lora.targets."""
        return self.path.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """The module that it is in."""
        return self.path.rpartition(".")[0]

    @property
    def numel(self) -> int:
        """Elements of one of them."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """A model in numbers. All counts are elements.

    `quantized` is the sum over `linears`; `kept` everything else, a tied output layer once; `largest` the largest
    single tensor, `largest_kept` the largest that is not quantized; `layer` and `layer_quantized` belong to the largest
    decoder layer. `norms` are those over the hidden size in a layer; `rms` when they have no bias. `head_norms` are
    those over single heads; `softcap` when attention caps its scores, `causal` when it is known to do nothing but look
    back; `partly_rotated` when positions turn only a part of each head; `changes_logits` when they are not what the
    output layer gives. `notes` say what these numbers leave out.
    """

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    experts_per_token: int
    tied: bool
    linears: tuple[Linear, ...]
    quantized: int
    kept: int
    largest: int
    largest_kept: int
    layer: int
    layer_quantized: int
    norms: int
    head_norms: int
    rms: bool
    activation: str
    softcap: bool
    causal: bool
    partly_rotated: bool
    changes_logits: bool
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All elements of the model."""
        return self.quantized + self.kept


def read_shape(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Shape:
    """The numbers of a model.

    Args:
        tensors: its tensors by name, from `read_headers`.
        config: its parsed config.json; a text model may be nested under text_config.

    Raises:
        ModelError: the checkpoint has no numbered layers, is quantized already, or does not fit its config.json.
    """
    nested = config.get("text_config") or {}
    if not isinstance(nested, Mapping):
        raise _wrong(str(config.get("model_type", "this model")), "text_config", nested, "an object")
    text = {**config, **nested}
    model_type = str(text.get("model_type", "this model"))
    there = {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}
    stacks = _stacks(there)
    if not stacks:
        raise ModelError(f"{model_type}: no numbered layers in the checkpoint, such as model.layers.0. It is not read")
    main = max(stacks, key=lambda stack: sum(tensor.numel for layer in stacks[stack].values() for tensor in layer))
    sizes = _sizes(text, model_type)
    notes = _compare_layers(len(stacks[main]), sizes["layers"], model_type)
    quantized = {name: tensor for name, tensor in there.items() if _is_linear(name, tensor)}
    _refuse_quantized(quantized, model_type)
    tied, twice = _tying(there, text)
    kept = [tensor for name, tensor in there.items() if name not in quantized and name != twice]
    linears = _linears(quantized, model_type in CONV1D)
    if len(stacks) > 1:
        notes.append(f"{len(stacks)} stacks of layers: sizes are those of the largest, {main.rstrip('.')}")
    bulky = sum(tensor.numel for name, tensor in there.items() if _LAYER.match(name) and len(tensor.shape) > 2)
    if bulky:
        notes.append(f"{bulky:,} elements of the layers are no matrices and stay in 16 bits")
    layers = stacks[main].values()
    first = next(iter(layers))
    norms = [tensor for tensor in first if "norm" in tensor.name or ".ln_" in tensor.name]
    return Shape(
        model_type=model_type,
        **sizes,
        tied=tied,
        linears=linears,
        quantized=sum(linear.numel * linear.count for linear in linears),
        kept=sum(tensor.numel for tensor in kept),
        largest=max(tensor.numel for tensor in there.values()),
        largest_kept=max((tensor.numel for tensor in kept), default=0),
        layer=max(sum(tensor.numel for tensor in layer) for layer in layers),
        layer_quantized=max(sum(t.numel for t in layer if t.name in quantized) for layer in layers),
        norms=sum(tensor.shape == (sizes["hidden"],) and tensor.name.endswith(".weight") for tensor in norms),
        head_norms=sum(tensor.shape == (sizes["head_size"],) for tensor in norms),
        rms=not any(tensor.name.endswith(".bias") for tensor in norms),
        activation=str(text.get("activation_function") or text.get("hidden_act") or "silu"),
        softcap=bool(text.get("attn_logit_softcapping")),
        causal=model_type in CAUSAL and sizes["head_size"] in HEAD_SIZES and not _has_windows(text, model_type),
        partly_rotated=_rotated(text) < 1,
        changes_logits=any(text.get(name, 1) not in (None, 1) for name in OF_LOGITS),
        notes=tuple(notes),
    )


def _has_windows(text: Mapping[str, Any], model_type: str) -> bool:
    unsaid = 4096 if model_type == "mistral" else None  # transformers' own, where a config.json says nothing
    return bool(text.get("sliding_window", unsaid) and text.get("use_sliding_window", True))


def _rotated(text: Mapping[str, Any]) -> float:
    """Share of each head that positions turn."""
    rope = text.get("rope_parameters")
    found = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    return float(found or text.get("partial_rotary_factor") or 1)


def _stacks(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, list[Tensor]]]:
    """Tensors by what stands before the number of their layer, and by that number."""
    stacks: dict[str, dict[int, list[Tensor]]] = {}
    for name, tensor in tensors.items():
        found = _LAYER.match(name)
        if found:
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), []).append(tensor)
    return stacks


def _is_linear(name: str, tensor: Tensor) -> bool:
    matrix = len(tensor.shape) == 2 and name.endswith(".weight") and not name.endswith(ROUTERS)
    return matrix and _LAYER.match(name) is not None


def _sizes(text: Mapping[str, Any], model_type: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for size, names in NAMES.items():
        off = (None,) if size in REQUIRED else (None, 0)
        name = next((name for name in names if text.get(name) not in off), None)
        if name is None:
            continue
        whole = isinstance(text[name], int) and not isinstance(text[name], bool)
        if (whole and text[name] < 1) or (not whole and size in REQUIRED):
            raise _wrong(model_type, name, text[name], "a whole number, 1 or more")
        if whole:
            found[size] = text[name]
    missing = [size for size in REQUIRED if size not in found]
    if missing:
        wanted = ", ".join(NAMES[size][0] for size in missing)
        raise ModelError(f"{model_type}: config.json has no {wanted}. Expected the config.json of a decoder model")
    found.setdefault("head_size", found["hidden"] // found["heads"])
    found.setdefault("kv_heads", 1 if text.get("multi_query") else found["heads"])
    found.setdefault("intermediate", 4 * found["hidden"])
    found.setdefault("experts_per_token", 1)
    return found


def _wrong(model_type: str, name: str, value: Any, expected: str) -> ModelError:
    return ModelError(
        f"{model_type}: config.json has {name} {json.dumps(value)}, expected {expected}. Copy the checkpoint again"
    )


def _compare_layers(found: int, expected: int, model_type: str) -> list[str]:
    if found < expected:
        raise ModelError(
            f"{model_type}: config.json says {expected} layers, the checkpoint has {found}. Copy the checkpoint again"
        )
    return [f"{found} layers in the checkpoint, {expected} in config.json"] if found > expected else []


def _refuse_quantized(linears: Mapping[str, Tensor], model_type: str) -> None:
    odd = next((tensor for tensor in linears.values() if tensor.dtype not in FLOATS), None)
    if odd:
        raise ModelError(
            f"{model_type}: {odd.name} is {odd.dtype}, expected floats. Give the 16-bit checkpoint it was made from"
        )
    if not linears:
        raise ModelError(
            f"{model_type}: no 2-D weights in the layers of the checkpoint. Packed checkpoints (GPTQ, AWQ) are not "
            "read: give the 16-bit checkpoint it was made from"
        )


def _tying(tensors: Mapping[str, Tensor], text: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether the output layer is the embedding, and the name of a copy of it that is stored all the same."""
    head = next((name for name in tensors if name.endswith(HEADS)), None)
    says = text.get("tie_word_embeddings")
    tied = head is None or says is True
    return tied, head if tied else None


def _linears(quantized: Mapping[str, Tensor], transposed: bool) -> tuple[Linear, ...]:
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, tensor in quantized.items():
        found = _LAYER.match(name)
        path = _NUMBER.sub("*", found[3] if found else name).removesuffix(".weight")
        inputs, outputs = tensor.shape if transposed else tensor.shape[::-1]
        counts[path, inputs, outputs] += 1
    return tuple(Linear(path, inputs, outputs, count) for (path, inputs, outputs), count in counts.items())
