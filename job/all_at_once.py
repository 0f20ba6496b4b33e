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

    def buffered_reduce_fallback(self: Any, rank: Any, grads: Any, *args: Any, **kwargs: Any) -> None:
        """The mean over ranks in each gradient's place; of a rank alone it is there."""
        if rank is not None or dist.get_world_size(group=self.dp_process_group) > 1:
            super().buffered_reduce_fallback(rank, grads, *args, **kwargs)  # type: ignore[misc]

    def partition_grads(self: Any, params: Any, partitions: Any) -> Any:
        """Each gradient's part of this rank to where it is kept or added up (stage 3), one operation for all."""
        kept = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        rank = self._get_param_partition_rank(params[0]) if params else 0
        # a parameter of few elements has none on the last ranks
        pairs = [
            (buffer if buffer.numel() == part.numel() else buffer.narrow(0, 0, part.numel()), part)
            for parameter, part in zip(params, partitions, strict=True)
            if parameter.partition_numel() * rank < parameter.ds_numel
            for buffer in (kept[parameter.ds_id],)
        ]
        alike = all(buffer.dtype == part.dtype and buffer.device == part.device for buffer, part in pairs)
        if not pairs or not alike or self.offload_optimizer or self.zenflow:
            return super().partition_grads(params, partitions)  # type: ignore[misc]
        buffers, parts = map(list, zip(*pairs, strict=True))
        if self.micro_step_id == 0:
            torch._foreach_copy_(buffers, parts, non_blocking=True)
        else:
            torch._foreach_add_(buffers, parts)
        for parameter in params:
            if parameter.grad is not None and parameter.grad.is_cuda:
                parameter.grad.record_stream(torch.cuda.current_stream(parameter.grad.device))
            parameter.grad = None
        return buffers

    def _unflatten_partitioned_parameters(self: Any, group_index: int) -> None:
        """Have parts of parameters be parts of the flat copy that was stepped, as they are from the first step on."""
        known = self.__dict__.setdefault("_parts_of_flat", {})
        parts = self.fp16_partitioned_groups[group_index]
        places = [self.fp16_partitioned_groups_flat[group_index].data_ptr(), *(one.data_ptr() for one in parts)]
        if known.get(group_index) != places:
            super()._unflatten_partitioned_parameters(group_index)  # type: ignore[misc]
            known[group_index] = [places[0], *(one.data_ptr() for one in parts)]

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
