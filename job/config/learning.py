"""Settings that say what is learnt, from what, and how: model, quantization, lora, data, evaluation, train.

The sentence beneath a field is its documentation: what it is, its unit, what "off" means, and its rule (see `rules`).
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from job.config.rules import Extendable, Fixed, Free
from job.config.section import Section
from job.config.urls import NO_KEYS

PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}|\{[^{}]*\}|[{}]")
"""Braces in a template: doubled ones stand for themselves, {word} is a field (group 1), all others are a fault."""


def _named(sources: str | list[str]) -> str | list[str]:
    """The sources as they are, when each has a name: an empty one would be the current folder."""
    if not sources or not all(source.strip() for source in sources):
        raise ValueError("names nothing. Give a file, glob, folder, URL or hub id, or a list of them")
    return sources


def _refuse_open_marks(part: str, text: str) -> None:
    """[[ and ]] must follow each other in turn: one without the other would be written into every row."""
    marks = re.findall(r"\[\[|\]\]", text)
    if marks != ["[[", "]]"] * (len(marks) // 2):
        raise ValueError(
            f"{part} has {' '.join(marks)}, expected a ]] behind every [[, none within another. Write both into this "
            "part, around what is left out when a field in it is empty"
        )


def _places(part: str, text: str) -> list[str]:
    """The fields that a part of a template names, when all its braces mean something."""
    found = list(PLACE.finditer(text))
    for place in found:
        if not place[1] and place[0] not in ("{{", "}}"):
            doubled = place[0].replace("{", "{{").replace("}", "}}")
            raise ValueError(
                f"{part} has {place[0]}, which is no {{field}} (letters, digits and _). "
                f"Write {doubled} for braces that stand for themselves"
            )
    return [place[1] for place in found if place[1]]


class Model(Section):
    """The pretrained model that is adapted."""

    name: Annotated[Fixed[str], NO_KEYS]
    """Hub id (owner/name), folder or URL of a transformers checkpoint in safetensors; pickled weights and a GGUF file
    are converted first. Required. Fixed."""
    revision: Fixed[str | None] = None
    """Branch, tag or commit of a hub id; off (null) is the default branch. Fixed."""
    trust_remote_code: Fixed[bool] = False
    """Run Python code that comes with the checkpoint, as you; off (false) refuses such models. Fixed."""
    attention: Free[Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"]] = "auto"
    """Attention implementation, by transformers' names; auto is sdpa. Free."""

    @field_validator("name")
    @classmethod
    def _some_name(cls, name: str) -> str:
        if not name.strip():  # it would be the current folder
            raise ValueError("names nothing. Give a hub id (owner/name), a folder or a URL")
        return name


class Quantization(Section):
    """How the frozen base is stored."""

    type: Fixed[Literal["nf4", "fp4", "int8", "none"]] = "nf4"
    """nf4 and fp4 take 4 bits a weight (nf4 is the more exact for normal weights; same size), int8 takes 8;
    off (none) keeps the compute dtype. Fixed."""
    double_quant: Fixed[bool] = True
    """Quantize the scales of the 4-bit blocks too: 0.127 instead of 0.5 bits a weight; off (false) keeps fp32
    scales. Fixed."""
    compute_dtype: Fixed[Literal["auto", "bf16", "fp16", "fp32"]] = "auto"
    """Type in which weights are multiplied after dequantization; auto follows train.precision. Fixed."""


class Lora(Section):
    """The adapter: low-rank products beside the frozen linears (arXiv:2106.09685)."""

    rank: Fixed[PositiveInt] = 16
    """Rank r of each product B A. More learns more and costs more memory. Fixed."""
    alpha: Fixed[int] = Field(default=32, gt=0)
    """Numerator of the scale alpha / rank on each product (alpha / sqrt(rank) with rslora). Fixed."""
    dropout: Fixed[float] = Field(default=0.05, ge=0, lt=1)
    """Share of an adapter's inputs set to zero in training, 0 to 1; off is 0. Fixed."""
    targets: Fixed[Literal["all"] | list[str]] = "all"
    """Names of the linears that get an adapter, such as [q_proj, v_proj]; all means every linear except the
    output layer, and except the experts of a Mixture-of-Experts. A fused name of the model's authors
    (query_key_value, c_attn) means its parts. Fixed."""
    bias: Fixed[Literal["none", "all", "lora_only"]] = "none"
    """Which bias vectors are trained too, by peft's names; off is none. Fixed."""
    rslora: Fixed[bool] = False
    """Scale by alpha / sqrt(rank) (arXiv:2312.03732); off (false) is alpha / rank. Fixed."""
    share_a: Fixed[bool] = False
    """One A for the parts of what the model's authors fused (query_key_value of ChatGLM, c_attn of Qwen): exported
    under their names the adapter then has the rank asked for, not three times it; off (false) is one each. Fixed."""
    dora: Fixed[bool] = False
    """Train a magnitude beside each direction (arXiv:2402.09353), slower; off (false) is plain LoRA. Fixed."""

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: Literal["all"] | list[str]) -> Literal["all"] | list[str]:
        if not targets:
            raise ValueError("an empty list trains nothing. Name linears such as [q_proj, v_proj], or write all")
        return targets


class Data(Section):
    """The rows and how they become sequences."""

    train: Annotated[Fixed[str | list[str]], NO_KEYS]
    """File, glob, folder or URL of JSON, JSONL, Parquet or CSV (compressed too), or a hub id; a list joins
    several. A split or slice follows a colon: owner/name:train[:1%]. Required. Fixed."""
    format: Fixed[str] = "auto"
    """alpaca, conversations, messages, prompt_completion, content_summary, text, template, or your own
    module:function; auto recognises it from the fields and says so. Fixed."""
    template: Fixed[dict[str, str] | None] = None
    """Your own prompt: {prompt, completion} with {field} places, or {system, user, assistant} with {content};
    [[...]] is left out when a field in it is empty, {{ and }} are braces. Off (null) is the model's chat format.
    Fixed."""
    learn: Fixed[Literal["all", "last"]] = "all"
    """Which assistant turns of a conversation are learnt: all, or only the last. Fixed."""
    max_length: Fixed[PositiveInt] = 2048
    """Longest sequence, in tokens. A longer row loses its oldest exchanges, then the middle of its prompt. Fixed."""
    packing: Fixed[bool] = True
    """Put several rows into one sequence, isolated from each other; off (false) pads rows to the longest of
    their batch. Fixed."""
    streaming: Fixed[bool] = False
    """Read rows while training instead of before, for data larger than memory and disk; needs train.max_steps. Off
    (false) holds the tokens in memory. Fixed."""
    shuffle_buffer: Fixed[PositiveInt] = 10_000
    """Rows among which a stream is shuffled. Fixed."""
    workers: Free[Literal["auto"] | PositiveInt] = "auto"
    """Processes that turn rows into tokens; auto is one for each 4,000 rows, up to the CPUs that this process may use
    and 16; off is 1, this process. Free."""
    cache: Annotated[Free[str | None], NO_KEYS] = "auto"
    """Folder at any URL where rows stay as tokens, named by a hash of all that these depend on, for every run that asks
    for the same; auto is `tokens` under output.url, used from 10,000 rows on; off is null. Not of streams, nor where
    the format or tokenizer is a program of your own. Nothing is removed there. Free."""
    shuffle: Fixed[bool] = True
    """New order each epoch, a function of train.seed and epoch alone; off (false) keeps the file's order. Fixed."""

    @field_validator("train")
    @classmethod
    def _some_source(cls, train: str | list[str]) -> str | list[str]:
        return _named(train)

    @field_validator("cache")
    @classmethod
    def _cache_can_be_written(cls, cache: str | None) -> str | None:
        if cache is not None and (not cache.strip() or cache.startswith(("http://", "https://"))):
            raise ValueError("is no folder that can be written. Name one such as s3://bucket/tokens, or use null")
        return cache

    @model_validator(mode="after")
    def _template_goes_with_format(self) -> Self:
        if self.format == "template" and "prompt" not in (self.template or {}):
            raise ValueError("data.format: template needs data.template with prompt and completion")
        return self

    @field_validator("template")
    @classmethod
    def _known_template_parts(cls, template: dict[str, str] | None) -> dict[str, str] | None:
        if template is None:
            return template
        places = {part: _places(part, text) for part, text in template.items()}
        if set(template) == {"prompt", "completion"}:
            for part, text in template.items():
                _refuse_open_marks(part, text)
            return template
        known = {"user", "assistant"} <= set(template) <= {"system", "user", "assistant"}
        if known and all(names == ["content"] for names in places.values()):
            return template
        raise ValueError(
            f"has {', '.join(sorted(template)) or 'no parts'}. Give prompt and completion, "
            "or user and assistant (and system), each with {content} in it once and no other field"
        )


class Evaluation(Section):
    """Loss on rows that are not trained on: before training, on the way, and after."""

    file: Annotated[Extendable[str | list[str] | None], NO_KEYS] = None
    """Held-out rows, named as in data.train; off (null) leaves only evaluation.share. Extendable."""
    share: Fixed[float] = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows that is held out instead of trained on, 0 to 1; off is 0. Fixed."""
    every_steps: Extendable[PositiveInt | None] = None
    """Steps between evaluations; off (null) evaluates before and after training only. Extendable."""
    micro_batch_size: Free[PositiveInt] = 1
    """Sequences a forward of the evaluation, on each rank. Free."""
    keep_best: Extendable[bool] = False
    """Write the adapter of the lowest evaluation loss instead of the last one; off is false. Extendable."""
    patience: Extendable[PositiveInt | None] = None
    """Stop after so many evaluations without a new lowest loss; off (null) never stops early. Extendable."""

    @field_validator("file")
    @classmethod
    def _some_source(cls, file: str | list[str] | None) -> str | list[str] | None:
        return file if file is None else _named(file)

    @model_validator(mode="after")
    def _rows_to_judge_by(self) -> Self:
        if self.file is not None and self.share:
            raise ValueError("evaluation.file and evaluation.share are both set. Keep one of them")
        if (self.keep_best or self.patience) and self.file is None and not self.share:
            raise ValueError("keep_best and patience need held-out rows. Set evaluation.file or evaluation.share")
        if self.keep_best and not self.every_steps:
            raise ValueError("keep_best chooses among evaluations on the way. Set evaluation.every_steps")
        if self.patience and not self.every_steps:
            raise ValueError("patience counts evaluations on the way. Set evaluation.every_steps")
        return self


class Train(Section):
    """The optimisation."""

    epochs: Extendable[float] = Field(default=3.0, gt=0)
    """Passes over the rows; train.max_steps wins over it. Extendable."""
    max_steps: Extendable[PositiveInt | None] = None
    """Optimizer steps in all; off (null) counts train.epochs. Extendable."""
    learning_rate: Fixed[float] = Field(default=2e-4, gt=0)
    """Highest learning rate, reached after the warm-up. Fixed."""
    schedule: Fixed[Literal["linear", "cosine", "constant"]] = "cosine"
    """How the learning rate falls after the warm-up: to 0 by a line or half a cosine; off is constant. Fixed."""
    warmup_steps: Fixed[float] = Field(default=0.03, ge=0)
    """Steps of rising learning rate: below 1 a share of all steps, else their number; off is 0. Fixed."""
    weight_decay: Fixed[float] = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapter; off is 0. Fixed."""
    max_grad_norm: Fixed[float] = Field(default=1.0, ge=0)
    """Gradients with a larger global L2 norm are scaled down to it; off is 0. Fixed."""
    global_batch_size: Fixed[PositiveInt] = 16
    """Sequences a step over all ranks. Fixed."""
    micro_batch_size: Free[PositiveInt] = 1
    """Sequences a forward, on each rank. Gradient accumulation follows from it. Free."""
    precision: Fixed[Literal["auto", "bf16", "fp16", "fp32"]] = "auto"
    """Type of activations and frozen 16-bit weights; the optimizer works in fp32. fp16 scales the loss. auto is
    bf16, or fp16 on a GPU without it. Fixed."""
    optimizer: Fixed[Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]] = "adamw"
    """adamw is torch's; the others are bitsandbytes', with 8-bit moments, or pages that may leave the GPU. Fixed."""
    offload_activations: Free[bool] = False
    """Keep layers' inputs, and attention's outputs if it has no mask, in pinned host memory; off is false. Free."""
    recompute: Free[Literal["auto", "none", "full"] | PositiveInt] = "auto"
    """full computes activations again in the backward pass, layer by layer: less memory, about a third more work. A
    number is that of so many layers, auto of as few as a GPU can do with by the plan; off is none. Free."""
    dequantize: Free[Literal["auto", "always", "once"]] = "auto"
    """once keeps the values of 4-bit weights that have an adapter, at 2 bytes each, instead of making them for every
    product, in fp8 for four steps: faster, the same numbers. auto is once where the plan says that a GPU holds them
    with room to spare, else always; off is always. Free."""
    fused: Free[bool] = True
    """Compute the adapter in one step with its linear, norms and gated MLPs in one step each, and the loss a chunk of
    positions at a time, where the model allows it; off (false) leaves all to peft, transformers and torch. The numbers
    differ by rounding alone. Free."""
    seed: Fixed[int] = Field(default=42, ge=0, lt=2**31)
    """Seed of adapter initialisation, order and dropout. Fixed."""
    base_compute: Fixed[Literal["bf16", "fp8"]] = "bf16"
    """Products with frozen weights that have an adapter: bf16 means train.precision, fp8 8-bit floats with a scale for
    each row, rounded otherwise every four steps, faster on GPUs from Hopper on; a product of normal weights is then
    9.9% off what it was before nf4, which alone makes 9.2%. Evaluation stays as it is. Fixed."""
    max_hours: Extendable[float | None] = Field(default=None, gt=0)
    """Hours after which this start of the run saves and stops, train.stop_grace_s before; off (null) is no limit.
    Extendable."""
    stop_grace_s: Free[PositiveInt] = 120
    """Seconds that a stopping run may take for its save; a further signal after them ends it at once. Free."""
    stop_file: Free[str | None] = None
    """Path whose appearance on any node asks the run to save and stop; off is null. Free."""
    max_skipped_steps: Free[PositiveInt] = 10
    """Steps in a row whose loss or gradients are not finite, left out each, before the run fails. Free."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        whole, micro = self.global_batch_size, self.micro_batch_size
        if whole % micro:
            fits = f"{whole - whole % micro} or {whole - whole % micro + micro}" if whole > micro else str(micro)
            raise ValueError(
                f"train.global_batch_size: {whole} is not a multiple of micro_batch_size {micro}. Try {fits}"
            )
        return self


class Generation(Section):
    """How `compare` and `chat` answer."""

    max_new_tokens: Free[PositiveInt] = 128
    """Longest answer, in tokens. Free."""
    temperature: Free[float] = Field(default=0.0, ge=0)
    """Above 0 samples from the sharpened or flattened distribution; off (0) takes the likeliest token. Free."""
    top_p: Free[float] = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability; off is 1. Free."""
    top_k: Free[int] = Field(default=0, ge=0)
    """Sample from so many of the likeliest tokens; off is 0. Free."""
    repetition_penalty: Free[float] = Field(default=1.0, ge=1)
    """Divides the logits of tokens already there (arXiv:1909.05858); off is 1. Free."""
    rows: Free[PositiveInt] = 6
    """Held-out rows that `compare` asks when no question is given. Free."""
