"""The norms of all gradients in one operation, for DeepSpeed's optimizers, which take a dozen for each of them.

A LoRA of a 7B model has 448 gradients: one by one, looking for what is not finite and taking norms launches 5,000
kernels a step, which takes longer than a step on few tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch


def take_norms_at_once(optimizer: Any) -> None:
    """Have one of DeepSpeed's ZeRO optimizers do so from now on."""
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (_AtOnce, kind), {"__module__": kind.__module__})


class _AtOnce:
    """In front of DeepSpeedZeroOptimizer and its like of stage 3."""

    def has_overflow_partitioned_grads_serial(self: Any) -> torch.Tensor:
        """Whether any gradient of this rank's part is not finite, as [1]."""
        grads = [grad for group in self.averaged_gradients.values() for grad in group or () if grad is not None]
        if not grads:
            plain: torch.Tensor = super().has_overflow_partitioned_grads_serial()  # type: ignore[misc]
            return plain
        return ~torch.isfinite(_norms(grads)).all()[None]

    def get_grad_norm_direct(self: Any, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        """The norm over all ranks; of this rank's part it is the norm of the norms."""
        counted = [grad for grad in gradients if not getattr(grad, "_zero_padding", False)]
        if norm_type == 2 and counted:
            gradients, params = [_norms(counted)], params[:1]
        norm: torch.Tensor = super().get_grad_norm_direct(gradients, params, norm_type)  # type: ignore[misc]
        return norm


def _norms(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """2-norms [N] in fp32."""
    return torch.stack(torch._foreach_norm([grad.detach() for grad in grads], 2, dtype=torch.float32))
