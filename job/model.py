"""The model: built without memory, filled from streamed pieces, with the adapter on top. The door to transformers."""

import hashlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from job.architecture import explained, refuse_encoder, refuse_impossible
from job.config.learning import Lora, Model, Quantization
from job.dropout import Places, RowDropout
from job.errors import ConfigError, ModelError
from job.experts import Experts, fused_experts, separate
from job.families import adapted, family_of, fused, unread_experts
from job.families.names import authors_names
from job.quantize import quantize
from job.weights import Piece

DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build(
    config: Any, model: Model, quantization: Quantization, precision: str, compute_dtype: str, untied: bool = False
) -> Any:
    """The module on the meta device, its linears replaced by quantized ones, everything frozen.

    Args:
        config: its transformers configuration.
        untied: give the output layer weights of its own from now on, whatever the configuration says.

    Raises:
        ModelError: a setting makes no model; transformers has no such architecture, or it is an encoder, or cannot use
            the attention asked for; its experts are in other tensors than the files'; or much would not be quantized.
    """
    refuse_impossible(config, model.name)
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    attention = None if model.attention == "auto" else model.attention  # None: sdpa where there is one
    try:
        with torch.device("meta"):
            module: Any = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPE[precision],
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
            )
    except Exception as fault:  # a damaged config.json fails wherever it is first used
        raise ModelError(f"model.name: {model.name}: {explained(config, fault)}") from fault
    refuse_encoder(module, model.name)
    if (family := family_of({"model_type": config.model_type})) and family.experts:
        separate(module)
    else:
        _refuse_unread_experts(module, model.name)
    if quantization.type != "none":
        quantize(module, model.name, quantization, DTYPE[compute_dtype])
    module.requires_grad_(False)
    _no_base_dropout(module)
    return module


def _refuse_unread_experts(model: Any, name: str) -> None:
    """Where transformers makes its fused experts of other tensors while it loads."""
    made = get_model_conversion_mapping(model, add_legacy=False)
    targets = [target.replace("\\", "") for each in made for target in each.target_patterns]
    fused = {re.sub(r"^.*(?=experts\.)", "", name) for name in fused_experts(model)}
    if any(name in target for target in targets for name in fused):
        raise ModelError(f"model.name: {name}: {unread_experts(model.config.model_type)}")


def _no_base_dropout(model: nn.Module) -> None:
    """A frozen base has nothing to regularise, and its masks would depend on the order of random draws."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # attn_pdrop, residual_dropout, layerdrop, ...
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


Hold = Callable[[Any, Piece], None]


def place(model: Any, pieces: Iterable[Piece], device: str, hold: Hold | None = None) -> None:
    """Fill the module with pieces, tie what is tied, compute what no checkpoint holds (rotary tables).

    Args:
        hold: makes a partition of a parameter that got only this rank's piece; None when the pieces are whole.
    """
    _fill_buffers(model, device)
    for piece in pieces:
        path, _, leaf = piece.share.name.rpartition(".")
        module = model.get_submodule(path)
        parameter = _parameter(module, piece)
        if hold:
            hold(parameter, piece)
        module._parameters[leaf] = parameter
        if isinstance(module, bnb.nn.Linear4bit) and leaf == "weight":
            module.quant_state = piece.state
            # on CPUs with AVX512-BF16 an evaluation would repack the weight for good, and training after it gets no
            # gradient (bitsandbytes 0.50)
            module.support_avx512bf16_for_cpu = False
    model.tie_weights()
    meta = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if meta:
        raise ModelError(f"{meta[0]} got no value from the checkpoint. This architecture cannot be streamed yet")


def _fill_buffers(model: Any, device: str) -> None:
    """Buffers that no checkpoint holds. Before any parameter: what computes a module's buffers draws its parameters at
    random too (the embeddings of Gemma, which have a scale), and those on meta are only named."""
    for module in model.modules():
        own = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if own:
            for name, buffer in own.items():
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
            model._init_weights(module)


def _parameter(module: nn.Module, piece: Piece) -> Any:
    if piece.state is not None:
        return bnb.nn.Params4bit(
            piece.data,
            requires_grad=False,
            quant_state=piece.state,
            blocksize=piece.state.blocksize,
            compress_statistics=piece.state.nested,
            quant_type=piece.state.quant_type,
            module=module,
            bnb_quantized=True,
        )
    if piece.row_scale is not None:
        return bnb.nn.Int8Params(piece.data, requires_grad=False, CB=piece.data, SCB=piece.row_scale)
    return nn.Parameter(piece.data, requires_grad=False)


def refuse_leaking_packs(logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], name: str) -> None:
    """Prove that a row's logits do not depend on the row before it in its sequence.

    Args:
        logits: ids [1, T] and positions [1, T] to logits [1, T, V].
        name: the architecture, for the message.

    Raises:
        ConfigError: they do: this architecture does not restart at position 0.
    """
    row, positions = torch.arange(16, 28), torch.cat([torch.arange(8), torch.arange(12)])
    before = (torch.arange(8), torch.arange(8, 16))
    found = [logits(torch.cat([first, row])[None], positions[None])[0, 8:].float() for first in before]
    if (found[0] - found[1]).abs().max() > 1e-3 * found[0].abs().max():
        reason = f"{name} lets packed rows see each other. Set data.packing: false"
        raise ConfigError("the settings for this model", [f"data.packing: {reason}"])


def linear_names(model: Any) -> list[str]:
    """Last names of the linears that can get an adapter: all but the output layer, and experts, on which plain peft
    would not find it again (it knows them fused); nor others of their names, for an adapter goes by last names."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = (nn.Linear, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, transformers.pytorch_utils.Conv1D)
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, linears)]
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    theirs = {name.rpartition(".")[2] for module in experts for name, _ in module.named_modules()}
    return sorted(
        {last for name, module in named if module is not head and (last := name.rpartition(".")[2]) not in theirs}
    )


def is_transposed(model: Any, linear: str) -> bool:
    """Whether the linear's weight is [in, out], as transformers' Conv1D has it."""
    return isinstance(model.get_submodule(linear), transformers.pytorch_utils.Conv1D)


def lora_targets(model: Any, targets: str | Sequence[str]) -> list[str]:
    """The linears that get an adapter, by their last names.

    Raises:
        ConfigError: the model has no linear of that name; lists those it has.
    """
    there = linear_names(model)
    wanted = adapted(targets, model.config.model_type)
    if wanted is None:
        return there
    if isinstance(targets, str):
        return [name for name in wanted if name in there]
    missing = [name for name in wanted if name not in there]
    if missing:
        authors = [f"{name} ({', '.join(parts)})" for name, parts in authors_names(model.config.model_type).items()]
        also = f"; by its authors' names {', '.join(authors)}" if authors else ""
        raise ConfigError(
            "the settings for this model",
            [f"lora.targets: {', '.join(missing)}: no such linear in this model. It has {', '.join(there)}{also}"],
        )
    return list(wanted)


def add_adapter(model: Any, lora: Lora, seed: int, base_name: str, dtype: torch.dtype) -> tuple[Any, Places]:
    """Put LoRA beside the target linears; returns the peft model and the places its dropout reads.

    The initial values depend on `seed` and each parameter's name alone, not on device, ranks or order.

    Raises:
        ConfigError: lora.targets or lora.share_a do not go with this model.
    """
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora_targets(model, lora.targets),
        bias=lora.bias,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    # DoRA's magnitudes are made from A and B; elsewhere peft would draw 4e7 numbers that nobody reads
    tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=not lora.dora)
    for module in tuned.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and not lora.dora:
            for one in (module.lora_A["default"], module.lora_B["default"]):
                one.to_empty(device=module.get_base_layer().weight.device)
                torch.nn.init.zeros_(one.weight)
    if lora.share_a:
        _share_a(tuned, model.config.model_type)
    tuned.peft_config["default"].base_model_name_or_path = base_name  # peft put the folder it was built from
    places = Places(seed)
    for name, module in tuned.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and lora.dropout:
            module.lora_dropout["default"] = RowDropout(lora.dropout, name, places)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if ".lora_A." in name:
                parameter.data.copy_(_kaiming(parameter.shape, f"{seed}:{name}"))
    return tuned, places


def _share_a(tuned: Any, model_type: str) -> None:
    """Give the parts of what the model's authors fused one A, as an adapter of a fused linear has."""
    groups = fused(model_type)
    if not groups:
        reason = f"the authors of {model_type} fused no linears that are parted here. Set it to false"
        raise ConfigError("the settings for this model", [f"lora.share_a: {reason}"])
    for parent in tuned.modules():
        for parts in groups:
            there = [getattr(parent, part, None) for part in parts]
            layers = [layer for layer in there if isinstance(layer, peft.tuners.lora.LoraLayer)]
            for layer in layers[1:]:
                layer.lora_A["default"] = layers[0].lora_A["default"]


def _kaiming(shape: torch.Size, key: str) -> torch.Tensor:
    """peft's initialisation of A: uniform within 1 / sqrt(in_features) (kaiming with a = sqrt(5))."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def quiet_libraries() -> None:
    """Leave warnings to those who call transformers and bitsandbytes themselves."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in ("transformers", "peft", "bitsandbytes", "deepspeed", "torch"):
        warnings.filterwarnings("ignore", module=library)
    with suppress(AttributeError):
        transformers.utils.logging.disable_progress_bar()
