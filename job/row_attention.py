"""Attention of packed rows by where they begin, by the FlashAttention that torch brings: a mask, which is as large as
the square of a sequence, has every pair of tokens computed that it then leaves out.

Taken where the models' attention is causal and nothing else, which their code says: transformers has one function for
each kind of attention and hands it queries, keys and values.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from job.attention_out import AttentionOutputs
from job.forward_code import calls, changed, names, together
from job.sending import sent
from job.shape import HEAD_SIZES

NAME = "rows"
"""Of this attention, as others are called sdpa. transformers makes no mask for a kind that has none registered."""
INTERFACE = "attention_interface"
"""What models call the function that they are handed."""
GIVEN = {"dropout", "scaling", "sliding_window", "**"}
"""What attention may be given besides queries, keys, values and mask."""
MASKS = {"create_causal_mask", "create_sliding_window_causal_mask"}
"""The functions that may make a model's masks; the second says nothing where no layer has a window."""
MORE_THAN_CAUSAL = {"or_mask_function", "and_mask_function", "block_sequence_ids"}


class Rows:
    """Where the rows of the current micro-batch begin; the engine moves it, attention reads it.

    Attributes:
        outputs: where what attention gives is kept for layers that are computed again; None keeps nothing.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        self.begins: torch.Tensor | None = None
        self.longest = 0
        self.outputs: AttentionOutputs | None = None

    def move(self, positions: np.ndarray, device: torch.device | str) -> None:
        """Set the rows: `positions` [B, T] are 0 where one begins. Where each sequence is one row there is nothing to
        keep apart, and attention stays torch's own."""
        self.shape = positions.shape
        begins = np.append(np.flatnonzero(positions == 0), positions.size).astype(np.int32)
        self.longest = int(np.diff(begins).max())
        one_each = len(begins) == len(positions) + 1
        self.begins = None if one_each else sent(begins, device)


def attend_by_rows(model: nn.Module) -> Rows | None:
    """Have a model's attention keep rows apart by where they begin, if all of it is causal and nothing else.

    Returns:
        What has to be moved to each micro-batch; None where attention stays as it is.
    """
    kinds: set[Any] = {type(module) for module in model.modules()}
    makers = {kind: masks for kind in kinds if (masks := {word for word in names(kind) if _makes_masks(word)})}
    if not makers or not all(masks <= MASKS and _of_rows_alone(kind) for kind, masks in makers.items()):
        return None
    layers: list[Any] = [module for module in model.modules() if _attends(type(module))]
    if not layers or not all(map(_only_causal, layers)):
        return None
    AttentionInterface.register(NAME, _attend)
    rows = Rows()
    for layer in layers:
        layer.rows = rows
        layer.config._attn_implementation = NAME
    return rows


def _makes_masks(word: str) -> bool:
    return word.startswith("create_") and word.endswith("_mask")


def _of_rows_alone(kind: Any) -> bool:
    """Whether a forward pass makes its masks of positions, and of nothing else that is not none here."""
    given = [known for known in together(kind) if {"config", "attention_mask"} <= known]
    told = all("position_ids" in known and not known & MORE_THAN_CAUSAL for known in given)
    return bool(given) and told and "attention_mask" not in changed(kind)


def _attends(kind: Any) -> bool:
    return INTERFACE in calls(kind) or ("Attention" in kind.__name__ and "attention_mask" in names(kind))


def _only_causal(layer: Any) -> bool:
    kind: Any = type(layer)
    config = getattr(layer, "config", None)
    if INTERFACE not in calls(kind) or not all(keywords <= GIVEN for keywords in calls(kind)[INTERFACE]):
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", NAME) or not getattr(layer, "is_causal", True):
        return False
    windows = any(getattr(owner, "sliding_window", None) for owner in (layer, config))
    return not windows and getattr(layer, "head_dim", None) in HEAD_SIZES


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Query [B, heads, T, D], key and value [B, key heads, T, D] to [B, T, heads, D].

    Raises:
        RuntimeError: the tokens are not those that the rows were moved to, a part of the weights is to be dropped, or
            values are of another size than queries.
    """
    rows: Rows = module.rows
    batch, _, length, width = query.shape
    if rows.shape not in (None, (batch, length)) or dropout:
        raise RuntimeError(f"rows of {rows.shape} were told, attention got {(batch, length)} with dropout {dropout}")
    if value.shape[-1] != width:
        raise RuntimeError(f"{type(module).__name__}: heads of {width} have values of {value.shape[-1]}")
    with rows.outputs.around() if rows.outputs is not None else nullcontext():
        return _computed(module, rows, query, key, value, attention_mask, scaling, **more)


def _computed(
    module: Any,
    rows: Rows,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    batch, heads, length, _ = query.shape
    if rows.begins is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return plain
    how: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if key.shape[1] < heads:
        how["enable_gqa"] = True
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    output: Any = varlen_attn(q, k, v, rows.begins, rows.begins, rows.longest, rows.longest, **how)
    return output.view(batch, length, heads, -1), None
