"""Dropout whose masks are a function of seed, step, row, position, module and feature, and of nothing else.

Ranks, micro-batches, accumulation and recomputation therefore never change a mask, and none is kept for the backward
pass: it is made again from two short vectors of keys.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn

from job.sending import sent

if torch.cuda.is_available():
    from job.kernels.dropout import drop_on_gpu

MULTIPLY = (-1640531535, -2048144777)
"""0x9E3779B1 and 0x85EBCA77 as int32: the odd constants of xxHash32, which spread low bits to high ones. The kernel in
`kernels.dropout` has the same."""


class Places:
    """Where each token of the current micro-batch stands in the run; the loop moves it, dropout reads it.

    Attributes:
        step: of the micro-batch, from 0; what is rounded in another way in every step reads it (`job.fp8`).
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.step = 0
        self.keys: torch.Tensor | None = None

    def move(self, step: int, rows: np.ndarray, positions: np.ndarray, device: torch.device | str) -> None:
        """Set the tokens: `rows` [B, T] are places in the global batch of `step`, `positions` [B, T] within the row."""
        keys = _mix(
            _mix(_mix(np.uint64(self.seed), np.uint64(step)), rows.astype(np.uint64)), positions.astype(np.uint64)
        )
        self.step, self.keys = step, sent(_as_int32(keys), device)


class RowDropout(nn.Module):
    """Inverted dropout on [B, T, features], with masks from the places of the tokens.

    Args:
        p: share of features that is zeroed, 0 to 1; the rest is scaled by 1 / (1 - p).
        name: the module's name, so that no two share masks.
        places: where the tokens stand.
    """

    def __init__(self, p: float, name: str, places: Places):
        super().__init__()
        self.p, self.places = p, places
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.module_key = np.frombuffer(digest, np.uint64)[0]
        self._features: torch.Tensor | None = None

    def forward(self, x_BTF: torch.Tensor) -> torch.Tensor:
        """`x_BTF` with features zeroed in training, unchanged in evaluation.

        Raises:
            RuntimeError: the tokens are not those that the places were moved to.
        """
        mask = self.mask(x_BTF)
        if mask is None:
            return x_BTF
        dropped: torch.Tensor = _Drop.apply(x_BTF, *mask, self.p)  # type: ignore[no-untyped-call]
        return dropped

    def mask(self, x_BTF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys of the tokens [B, T] and features [F] that make the mask of `x_BTF` (see `drop`); None in evaluation.

        Raises:
            RuntimeError: the tokens are not those that the places were moved to.
        """
        if not self.training or self.p == 0:
            return None
        keys = self.places.keys
        if keys is None or keys.numel() != x_BTF.shape[:-1].numel():
            raise RuntimeError(f"dropout got tokens {tuple(x_BTF.shape[:-1])} whose places were not given")
        # some architectures (OPT) have all tokens of a batch in one dimension
        return keys.view(x_BTF.shape[:-1]), self._feature_keys(x_BTF)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"p={self.p}"

    def _feature_keys(self, x: torch.Tensor) -> torch.Tensor:
        if self._features is None or self._features.shape[0] != x.shape[-1] or self._features.device != x.device:
            keys = _mix(self.module_key, np.arange(x.shape[-1], dtype=np.uint64))
            self._features = torch.from_numpy(_as_int32(keys)).to(x.device)
        return self._features


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor, p: float) -> torch.Tensor:
        ctx.save_for_backward(tokens, features)
        ctx.p = p
        return drop(x, tokens, features, p)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        tokens, features = ctx.saved_tensors
        return drop(grads[0], tokens, features, ctx.p), None, None, None


def drop(x_BTF: torch.Tensor, tokens_BT: torch.Tensor, features_F: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element whose keys' hash is below the share `p`, scale the rest: on a GPU in one kernel."""
    if x_BTF.is_cuda:
        return drop_on_gpu(x_BTF, tokens_BT, features_F, threshold(p), 1 / (1 - p))
    return torch.where(kept(tokens_BT, features_F, p), x_BTF * (1 / (1 - p)), 0)


def kept(tokens_BT: torch.Tensor, features_F: torch.Tensor, p: float) -> torch.Tensor:
    """[B, T, F], False with probability p: a hash of each pair of int32 keys against a threshold."""
    mixed = tokens_BT.unsqueeze(-1) ^ features_F
    mixed.mul_(MULTIPLY[0])
    mixed ^= mixed >> 15
    mixed.mul_(MULTIPLY[1])
    return mixed >= threshold(p)


def threshold(p: float) -> int:
    """The int32 below which lies the share `p` of all int32."""
    return round(p * 2**32) - 2**31


def _mix(a: Any, b: Any) -> Any:
    """Two uint64 keys into one (the finalizer of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (a * np.uint64(0x9E3779B97F4A7C15)) ^ (b + np.uint64(0xD1B54A32D192ED03))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _as_int32(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((keys >> np.uint64(32)).astype(np.uint32)).view(np.int32)
