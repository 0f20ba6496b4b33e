"""Bytes that autograd keeps between forward and backward, tensor by tensor.

The list is that of transformers 5's decoder layers under bitsandbytes linears with peft's LoRA and our dropout. What a
test counts with torch's saved-tensor hooks on real layers must equal it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from job.shape import GATES, NORMS, Linear, Shape
from job.zero import Place, Strategy

ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes an element of each precision."""
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "down_proj", "fc2", "fc_out", "w2", "dense_4h_to_h")
"""Last names of the linears that end an attention or an MLP."""
CHUNK = 1 << 25
"""Logits that exist at once where the loss is taken in chunks, at least those of one position."""
SILU = ("silu", "swish")
"""transformers' names of that activation."""
COMPOSITE = ("gelu_new", "gelu_fast")
"""Activations that transformers writes out in products, so that autograd keeps four tensors instead of one."""


@dataclass(frozen=True)
class Job:
    """What of a run decides its memory, as plain values."""

    strategy: Strategy = "replicate"
    """How state is spread."""
    ranks: int = 1
    """Processes in all, one a GPU."""
    ranks_per_node: int = 1
    """Of these on one machine."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the base is stored."""
    double_quant: bool = True
    """Whether 4-bit scales are quantized too."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of activations and of what is not quantized."""
    rank: int = 16
    """LoRA's r."""
    targets: tuple[str, ...] | None = None
    """Last names of the linears with an adapter; None is all."""
    dropout: float = 0.0
    """LoRA's dropout."""
    share_a: bool = False
    """Whether the parts of what the model's authors fused share one A."""
    dora: bool = False
    """Whether magnitudes are trained too."""
    micro_batch: int = 1
    """Sequences a forward."""
    length: int = 2048
    """Tokens a sequence (data.max_length)."""
    masked: bool = False
    """Whether attention takes a mask instead of a causal kernel."""
    eager: bool = False
    """Whether attention is written out instead of one kernel; models that cap its scores have no other."""
    learnt_share: float = 1.0
    """Share of positions that have logits."""
    fused: bool = True
    """Whether adapters are computed in one step with their linears, and the loss in chunks."""
    values_kept: bool = False
    """Whether the values of 4-bit weights with an adapter stay beside them."""
    recompute: Literal["none", "full"] | int = "full"
    """full keeps each layer's input alone, a number those of so many layers and all of the others."""
    offload_activations: bool = False
    """Whether these inputs may wait in host memory."""
    attention_away: bool = False
    """Whether what attention gave waits beside them."""
    optimizer: str = "adamw"
    """By its name in the run file."""
    offload_optimizer: Place = "none"
    """Where masters and moments live; none is the GPU."""
    offload_parameters: Place = "none"
    """Where a sharded base lives; none is the GPU."""
    bucket: int = 50_000_000
    """Elements of a gradient bucket."""
    overlap_comm: bool = True
    """Whether there are two buckets."""
    contiguous_gradients: bool | None = None
    """Whether there are buckets at all; None is what the strategy does by itself."""
    persistence: int = 1_000_000
    """Parameters of at most so many stored elements stay whole under zero3 and hpz."""
    max_live: int = 400_000_000
    """Stored elements that may stay gathered, those fetched ahead included."""
    layer_gathers: bool = True
    """Whether zero3's layers are gathered in one step, where adapters stay whole."""
    gathers_ahead: bool = True
    """Whether the next of these is gathered while one computes."""
    storage_bytes: int = 1
    """Bytes of a stored element of the 4-bit base."""
    evaluation_micro_batch: int = 1
    """Sequences a forward of the evaluation."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What computes."""

    @property
    def tokens(self) -> int:
        """Tokens of a forward."""
        return self.micro_batch * self.length

    @property
    def item(self) -> int:
        """Bytes of an activation's element."""
        return ITEM[self.precision]

    @property
    def inputs_away(self) -> bool:
        """Whether layers' inputs wait in host memory."""
        return self.offload_activations and self.recompute != "none" and self.device == "cuda"

    @property
    def in_one_step(self) -> bool:
        """Whether no dropped copy of a linear's input is kept: masks are made again."""
        return self.fused and not self.dora and self.quantization != "int8"

    def adapts(self, linear: Linear) -> bool:
        """Whether this linear gets an adapter: experts never do."""
        return "*" not in linear.path and (self.targets is None or linear.name in self.targets)


def in_chunks(shape: Shape, job: Job) -> bool:
    """Whether the loss is taken a chunk of positions at a time, and its gradient made with it."""
    return job.fused and not shape.changes_logits and job.precision != "fp16"


def kept_bytes(shape: Shape, job: Job) -> int:
    """What all layers keep for the backward pass, bytes; neither parameters nor logits.

    Of a layer that is computed again it is its input. The final norm stands for the first layer's, which keeps nothing
    because no gradient reaches the embedding. Rotary tables are made once for all layers, and the boolean mask lives on
    where layers are called again with it.
    """
    once = job.tokens * 2 * job.item * shape.head_size
    if again := layers_again(shape, job):
        once += job.micro_batch * job.length**2 * job.masked
        # one that comes back, and the next; the one that is computed with leaves the GPU as the next one comes
        inputs = min(2, again) if job.inputs_away else again
        once += job.tokens * (inputs * job.item * shape.hidden + _norm(shape, job))
        if job.inputs_away and job.attention_away:
            once += job.tokens * shape.heads * (min(2, again) * job.item * shape.head_size + 4 * again)
    return once + (shape.layers - again) * layer_bytes(shape, job)


def layers_again(shape: Shape, job: Job) -> int:
    """How many layers are computed again, the first ones."""
    if job.recompute == "none":
        return 0
    return shape.layers if job.recompute == "full" else min(job.recompute, shape.layers)


def on_host_bytes(shape: Shape, job: Job) -> int:
    """What a rank keeps in pinned host memory instead, of which torch gives out powers of two."""
    widths = [shape.hidden, shape.heads * shape.head_size][: 1 + job.attention_away]
    each = sum(2 ** math.ceil(math.log2(job.tokens * job.item * width)) for width in widths)
    return layers_again(shape, job) * each if job.inputs_away else 0


def layer_bytes(shape: Shape, job: Job) -> int:
    """What one layer keeps when it is not recomputed, bytes."""
    each = shape.norms * _norm(shape, job) + _head_norms(shape, job) + _attention(shape, job) + _mlp(shape, job)
    each += _experts(shape, job)
    whole = 0.0
    if job.masked:  # made from the boolean mask in every layer anew
        whole += job.micro_batch * job.length**2 * job.item
    groups: set[tuple[str, str]] = set()
    for linear, times in _per_layer(shape, job):
        # autograd's A and B keep their inputs; bitsandbytes' 4-bit product keeps none, its 8-bit product does
        group = (linear.parent, _role(shape, linear))
        # attention's output is what the linear after it keeps, unless query and key were put together from two parts,
        # which changes its layout
        first, has_twin = group not in groups, group[1] == "attention_out" and not shape.partly_rotated
        groups.add(group)
        remade = group[1] == "inner" and job.in_one_step and _gate_in_one_step(shape, job)
        copies = 1.0 if job.dropout and not job.in_one_step else float(first and not has_twin and not remade)
        if job.quantization == "int8" and job.dropout and first and not has_twin:
            copies += 1
        each += times * job.item * (copies * linear.inputs + job.rank)
        if job.dora:
            whole += times * _dora(linear, job)
    return round(job.tokens * each + whole)


def _experts(shape: Shape, job: Job) -> float:
    """Bytes a token: the output of each expert that it is sent to, and the same weighted; the probability of every
    expert in fp32; the output of an expert that all tokens share, before its own weight."""
    count = max((linear.count / shape.layers for linear in shape.linears if "*" in linear.path), default=0)
    if not count:
        return 0
    shared = any("shared_expert" in linear.parent for linear in shape.linears)
    return job.item * shape.hidden * (2 * shape.experts_per_token + shared) + 4 * count


def working_bytes(shape: Shape, job: Job, tokens: int) -> int:
    """What one layer's backward takes besides what was kept, bytes.

    At the end of the MLP there are three gradients as wide as its inner features: of the base's product, of the
    adapter's, their sum. With the adapter in one step it is one, and with dropout a copy without what it drops; with
    gate and up in one step too those of gate and up besides, which a GPU puts in the place of gate and up. There are
    two of the residual, and the largest linear is dequantized for its product.
    """
    inner = max(_inner(shape), shape.hidden)
    largest = max((linear.numel for linear in shape.linears), default=0)
    dequantized = 0 if job.quantization == "none" else largest * job.item
    in_place = job.device == "cuda" or not _gate_in_one_step(shape, job)
    wide = 1 + bool(job.dropout) if job.in_one_step and in_place else 3
    return tokens * job.item * (wide * inner + 2 * shape.hidden) + dequantized


def _norm(shape: Shape, job: Job) -> int:
    """Bytes a token: an RMS norm keeps its input in fp32, in one step as it came, and the root; LayerNorm its input,
    mean and root."""
    return _wide(shape, job) * shape.hidden + 4 if shape.rms else job.item * shape.hidden + 8


def _wide(shape: Shape, job: Job) -> int:
    """Bytes an element of what an RMS norm keeps of its input."""
    return job.item if job.fused and shape.model_type in NORMS else 4


def _gate_in_one_step(shape: Shape, job: Job) -> bool:
    """Whether a gated MLP keeps gate and up alone."""
    return job.fused and shape.model_type in GATES and shape.activation in SILU


def _head_norms(shape: Shape, job: Job) -> int:
    """Norms of each head's query and key."""
    return (_wide(shape, job) * shape.head_size + 4) * (shape.heads + shape.kv_heads) if shape.head_norms else 0


def _attention(shape: Shape, job: Job) -> int:
    """Bytes a token: query, key, value and output, and the logarithm of each head's sum in fp32. With a mask, grouped
    keys and values are repeated for every head (transformers' sdpa_attention.py), though one for all heads is only seen
    as many. Written out, attention keeps each head's row of probabilities in fp32 and in the type it computes in, and
    the capped scores where there is a cap."""
    heads = shape.heads if job.masked and shape.kv_heads > 1 else shape.kv_heads
    kept = job.item * shape.head_size * 2 * (shape.heads + heads) + 4 * shape.heads
    fused = [linear for linear in shape.linears if _is_fused(shape, linear)]
    if fused and not (job.masked and 1 < shape.kv_heads < shape.heads):  # the value is a view of all three
        kept += job.item * (fused[0].outputs - shape.head_size * shape.kv_heads)
    if job.eager or shape.softcap:
        kept += job.length * shape.heads * (4 + job.item * (2 if shape.softcap else 1))
    return kept


def _mlp(shape: Shape, job: Job) -> float:
    """Bytes a token: a gated MLP keeps gate, up and, unless in one step, activated gate; a plain one what its
    activation takes. The input of the last linear is kept by its adapter, see above."""
    gated = 2 if _gate_in_one_step(shape, job) else 3
    bytes_a_token = 0.0
    for linear, times in _per_layer(shape, job, adapted_only=False):
        if _role(shape, linear) == "inner":
            fan = sum(
                other.outputs
                for other in shape.linears
                if other.parent == linear.parent and _role(shape, other) == "mlp_in"
            )
            plain = 4 if shape.activation in COMPOSITE else 1
            if shape.activation == "relu" and job.adapts(linear) and not job.dropout:
                plain = 0  # it keeps what it gives, which the adapter keeps already
            bytes_a_token += times * job.item * linear.inputs * (gated if fan >= 2 * linear.inputs else plain)
    return bytes_a_token


def _dora(linear: Linear, job: Job) -> int:
    """peft's DoRA keeps the base's output and the adapter's, and to know the adapter as a matrix an identity of the
    input's size sent through A; with dropout the dequantized weight too (peft/tuners/lora/dora.py)."""
    matrix = linear.inputs * (linear.inputs + job.rank) + (linear.numel if job.dropout else 0)
    return job.item * (2 * job.tokens * linear.outputs + matrix)


def _per_layer(shape: Shape, job: Job, adapted_only: bool = True) -> Iterator[tuple[Linear, float]]:
    """Each linear and how often a token meets it in one layer: of experts only those that it is sent to."""
    for linear in shape.linears:
        if adapted_only and not job.adapts(linear):
            continue
        yield linear, shape.experts_per_token if "*" in linear.path else linear.count / shape.layers


def _inner(shape: Shape) -> int:
    return max((linear.inputs for linear in shape.linears if _role(shape, linear) == "inner"), default=shape.hidden)


def _is_fused(shape: Shape, linear: Linear) -> bool:
    return _role(shape, linear) == "attention_in" and linear.outputs > shape.heads * shape.head_size


def _role(shape: Shape, linear: Linear) -> str:
    """Which tensor of its layer a linear reads: attention_in, attention_out, mlp_in or inner."""
    if "attn" in linear.parent or "attention" in linear.parent:
        return "attention_out" if linear.name in OUTPUTS else "attention_in"
    widened = linear.inputs == shape.intermediate != shape.hidden
    # w2 ends Mixtral's experts but begins first-generation Qwen's MLP, where c_proj ends it
    ends = linear.name in OUTPUTS and (linear.name != "w2" or "*" in linear.path)
    return "inner" if widened or ends else "mlp_in"
