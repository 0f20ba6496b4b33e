"""The model: built without memory, filled from streamed pieces, with the adapter on top. The door to transformers."""

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import nn
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from job.config import RunConfig
from job.config.learning import Lora, Quantization
from job.dropout import Places, RowDropout
from job.errors import ConfigError, ModelError
from job.headers import Tensor
from job.linear import FrozenLinear4bit
from job.weights import TORCH_DTYPE, Piece, Share

DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IGNORED_TENSORS = ("rotary_emb.inv_freq",)
"""Tensors of old checkpoints that newer code computes itself."""


def build(config: Any, run: RunConfig, precision: str, compute_dtype: str) -> Any:
    """The module on the meta device, its linears replaced by quantized ones, everything frozen.

    Raises:
        ModelError: transformers has no such architecture, or cannot use the attention asked for, or its experts are
            fused and would not be quantized.
    """
    attention = None if run.model.attention == "auto" else run.model.attention  # None: sdpa where there is one
    try:
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPE[precision],
                attn_implementation=attention,
                trust_remote_code=run.model.trust_remote_code,
            )
    except Exception as fault:  # a damaged config.json fails wherever it is first used
        raise ModelError(f"model.name: {run.model.name}: {' '.join(str(fault).split())[:300]}") from fault
    if run.quantization.type != "none":
        keep = get_keys_to_not_convert(model)
        replace_with_bnb_linear(model, keep, quantization_config=_bnb_config(run.quantization, compute_dtype))
        for module in model.modules():
            if type(module) is bnb.nn.Linear4bit:
                module.__class__ = FrozenLinear4bit
        _refuse_fused_experts(model, run.model.name)
    model.requires_grad_(False)
    _no_base_dropout(model)
    return model


def _refuse_fused_experts(model: nn.Module, name: str) -> None:
    fused = next((key for key, value in model.named_parameters() if value.dim() == 3 and "expert" in key), None)
    if fused:
        raise ModelError(
            f"model.name: {name}: {fused} holds all experts in one tensor, which bitsandbytes does not quantize: most "
            "of the model would stay in 16 bits. Use a dense model, or quantization.type: none"
        )


def _bnb_config(quantization: Quantization, compute_dtype: str) -> transformers.BitsAndBytesConfig:
    if quantization.type == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=DTYPE[compute_dtype],
    )


def _no_base_dropout(model: nn.Module) -> None:
    """A frozen base has nothing to regularise, and its masks would depend on the order of random draws."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def shares(model: nn.Module, headers: dict[str, Tensor], name: str, storage_bytes: int = 1) -> list[Share]:
    """Each parameter whole, tied ones once, in the order in which they lie in the files.

    Args:
        storage_bytes: bytes of the elements that hold packed 4-bit weights.

    Raises:
        ModelError: the checkpoint lacks a parameter, or one has another shape, or tensors are left over.
    """
    wanted, faults = [], []
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    used = set()
    for parameter, value in model.named_parameters(remove_duplicate=False):
        tensor = headers.get(parameter)
        if tensor is None and parameter in tied:
            continue
        module = model.get_submodule(parameter.rpartition(".")[0])
        quantize = isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and parameter.endswith(".weight")
        shape = (module.out_features, module.in_features) if quantize else tuple(value.shape)
        if tensor is None or tensor.shape != shape or tensor.dtype not in TORCH_DTYPE:
            found = "is missing" if tensor is None else f"has shape {list(tensor.shape)} of {tensor.dtype}"
            faults.append(f"{parameter} {found}, expected {list(shape)} of 16- or 32-bit floats")
            continue
        used.add(parameter)
        if parameter not in tied:
            unit = 1
            if quantize:  # a row of int8 has its scale
                unit = 2 * storage_bytes if isinstance(module, bnb.nn.Linear4bit) else value.shape[-1]
            wanted.append(Share(parameter, tensor, 0, tensor.numel, quantize, unit))
    left = [key for key in headers if key not in used and not key.endswith(IGNORED_TENSORS)]
    faults += [f"{key} is in the checkpoint but not in the model" for key in left]
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(
            f"model.name: the weights of {name} do not fit its config.json\n  " + "\n  ".join(faults[:5]) + more
        )
    return sorted(wanted, key=lambda share: (share.tensor.file, share.tensor.start))


Hold = Callable[[Any, Piece], None]


def place(model: Any, pieces: Iterable[Piece], device: str, hold: Hold | None = None) -> None:
    """Fill the module with pieces, tie what is tied, compute what no checkpoint holds (rotary tables).

    Args:
        hold: makes a partition of a parameter that got only this rank's piece; None when the pieces are whole.
    """
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
    for module in model.modules():
        own = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if own:
            for name, buffer in own.items():
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
            model._init_weights(module)
    meta = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if meta:
        raise ModelError(f"{meta[0]} got no value from the checkpoint. This architecture cannot be streamed yet")


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
    """Last names of the linears that can get an adapter: all but the output layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = (nn.Linear, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, transformers.pytorch_utils.Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linears) and module is not head]
    return sorted({name.rpartition(".")[2] for name in names})


def lora_targets(model: Any, targets: str | Sequence[str]) -> list[str]:
    """The linears that get an adapter, by their last names.

    Raises:
        ConfigError: the model has no linear of that name; lists those it has.
    """
    there = linear_names(model)
    if isinstance(targets, str):
        return there
    missing = [name for name in targets if name not in there]
    if missing:
        raise ConfigError(
            "the settings for this model",
            [f"lora.targets: {', '.join(missing)}: no such linear in this model. It has {', '.join(there)}"],
        )
    return list(targets)


def add_adapter(model: Any, lora: Lora, seed: int, base_name: str, dtype: torch.dtype) -> tuple[Any, Places]:
    """Put LoRA beside the target linears; returns the peft model and the places its dropout reads.

    The initial values depend on `seed` and each parameter's name alone, not on device, ranks or order.
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
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.peft_config["default"].base_model_name_or_path = base_name  # peft put the folder it was built from
    places = Places(seed)
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and lora.dropout:
            module.lora_dropout["default"] = RowDropout(lora.dropout, name, places)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if ".lora_A." in name:
                parameter.data.copy_(_kaiming(parameter.shape, f"{seed}:{name}"))
    return adapted, places


def _kaiming(shape: torch.Size, key: str) -> torch.Tensor:
    """peft's initialisation of A: uniform within 1 / sqrt(in_features) (kaiming with a = sqrt(5))."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def recompute_activations(model: Any) -> None:
    """Keep only each layer's input for the backward pass. Our dropout needs no random state to be restored."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})  # the first is the name since transformers 5.20


def quiet_libraries() -> None:
    """Leave warnings to those who call transformers and bitsandbytes themselves."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in ("transformers", "peft", "bitsandbytes", "deepspeed", "torch"):
        warnings.filterwarnings("ignore", module=library)
    with suppress(AttributeError):
        transformers.utils.logging.disable_progress_bar()
