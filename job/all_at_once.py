"""DeepSpeed's ZeRO optimizers for many small parameters: what they do for each of them, done for all at once.

A LoRA of a 7B model has 448. Looking at each gradient for what is not finite and taking its norm launches 5,000 kernels
a step, which takes longer than the rest of a step on few tokens.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed.comm as dist
import torch


def step_all_at_once(optimizer: Any) -> None:
    """Have one of DeepSpeed's ZeRO optimizers do so from now on."""
    in_front(optimizer, AtOnce)


def in_front(one: Any, before: type) -> None:
    """Put a class in front of that of one of DeepSpeed's objects."""
    kind = type(one)
    one.__class__ = type(kind.__name__, (before, kind), {"__module__": kind.__module__})


class AtOnce:
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

    def buffered_reduce_fallback(self: Any, rank: Any, grads: Any, *args: Any, **kwargs: Any) -> None:
        """The mean over ranks in each gradient's place; of a rank alone it is there."""
        if rank is not None or dist.get_world_size(group=self.dp_process_group) > 1:
            super().buffered_reduce_fallback(rank, grads, *args, **kwargs)  # type: ignore[misc]

    def _update_model_bit16_weights(self: Any, group_index: int) -> None:
        """Have parameters be parts of the flat copy that was stepped, as they are from the first step on."""
        known = self.__dict__.setdefault("_parts_of_flat", {})
        places = [self.bit16_groups_flat[group_index].data_ptr()]
        places += [parameter.data_ptr() for parameter in self.bit16_groups[group_index]]
        if known.get(group_index) != places:
            super()._update_model_bit16_weights(group_index)  # type: ignore[misc]
            known[group_index] = [places[0], *(one.data_ptr() for one in self.bit16_groups[group_index])]


def _norms(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """2-norms [N] in fp32."""
    return torch.stack(torch._foreach_norm([grad.detach() for grad in grads], 2, dtype=torch.float32))
