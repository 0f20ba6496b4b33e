"""DeepSpeed's stage 3 for many small parameters: gradients are reduced, kept and measured as one tensor.

A LoRA of a 7B model has 448 gradients. DeepSpeed copies each into a bucket, cuts it into parts, joins the parts of all,
cuts what was reduced again and copies each part to its place, and in every forward pass it walks through all modules
twice: on a fast GPU a twentieth of a step, in which the GPU has nothing to do. The optimizer's states stay where
DeepSpeed has them. What goes to the host, or is scaled otherwise, goes DeepSpeed's way.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

from job.all_at_once import AtOnce, in_front


def shard_at_once(engine: Any) -> None:
    """Have a DeepSpeed engine of stage 3 do so from now on."""
    in_front(engine, _MarksAtOnce)
    in_front(engine.optimizer, _ShardedAtOnce)


class _MarksAtOnce:
    """In front of DeepSpeedEngine: modules are told that a forward pass begins or ends without looking for them."""

    marked: list[Any] | None = None
    marking = False

    def zero_optimization_partition_weights(self) -> bool:
        """Whether there is stage 3; not while what is marked is known."""
        return not self.marking and super().zero_optimization_partition_weights()  # type: ignore[misc]

    def _forward_prologue(self: Any, inputs: Any, kwargs: Any) -> Any:
        if self.marked is None:
            found = super()._forward_prologue(inputs, kwargs)  # type: ignore[misc]
            kept = [module._parameters for module in self.module.modules()]
            self.marked = [one for one in kept if isinstance(one, ZeROOrderedDict)]
            return found
        return self._marked_with(True, super()._forward_prologue, inputs, kwargs)  # type: ignore[misc]

    def _forward_epilogue(self: Any) -> None:
        self._marked_with(False, super()._forward_epilogue)  # type: ignore[misc]

    def _marked_with(self: Any, forward: bool, then: Any, *given: Any) -> Any:
        for parameters in self.marked:
            parameters._in_forward = forward
        self.marking = True
        try:
            return then(*given)
        finally:
            self.marking = False


class _Bucket:
    """Gradients that are reduced together, in the order of their parts in the flat buffer.

    Args:
        parameters: those of the bucket.
        parts: where this rank's part of each is kept, views of the flat buffer.
        ranks: how many there are.
    """

    def __init__(self, parameters: Sequence[Any], parts: Sequence[torch.Tensor], ranks: int):
        both = sorted(zip(parameters, parts, strict=True), key=lambda one: one[1].storage_offset())
        self.parameters = [(parameter, ranks * part.numel() - parameter.ds_numel) for parameter, part in both]
        """Each with how many elements its parts have more than it."""
        self.runs: list[tuple[int, int]] = []
        """From where to where in the flat buffer."""
        for _, part in both:
            start, stop = int(part.storage_offset()), int(part.storage_offset()) + part.numel()
            if self.runs and self.runs[-1][1] == start:
                start = self.runs.pop()[0]
            self.runs.append((start, stop))


class _ShardedAtOnce(AtOnce):
    """In front of DeepSpeedZeroOptimizer_Stage3."""

    computing: Any = None
    """The stream of the backward pass."""

    def _DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket(self: Any, param: Any) -> None:
        """A gradient waits where it is, for the others."""
        if self.contiguous_gradients or self.zenflow:
            super()._DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket(param)  # type: ignore[misc]
            return
        bucket = self.ipg_buckets[self.get_param_comm_dtype(param)]
        bucket.params.append(param)
        bucket.process_group = self._get_param_partition_group(param)
        bucket.elements += param.grad.numel()
        self.computing = get_accelerator().current_stream()

    @torch.no_grad()
    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(self: Any, params: list[Any], dtype: torch.dtype) -> Any:
        """This rank's part of the gradients' mean over ranks to where it is kept or added up; None, for
        `partition_grads` to know that."""
        group, here = self._get_param_partition_group(params[0]), get_accelerator()
        own = here.current_stream()
        if self.computing is not None and not here.resolves_data_dependency():
            own.wait_stream(self.computing)
        ranks = dist.get_world_size(group)
        bucket = self._bucket(params, ranks)
        if not self._reduces_plainly(params, dtype, ranks):
            return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(params, dtype)  # type: ignore[misc]
        # on the stream that made them, so that their memory need not wait for another one
        with here.stream(self.computing or own):
            grads = ((parameter.grad.view(-1), more) for parameter, more in bucket.parameters)
            sent = torch.cat(
                [(F.pad(grad, (0, more)) if more else grad).view(ranks, -1) for grad, more in grads], dim=1
            )
            sent.div_(ranks)
        if self.computing is not None and not here.resolves_data_dependency():
            own.wait_stream(self.computing)
            sent.record_stream(own)
        mean = sent[dist.get_rank(group)]
        dist.reduce_scatter_fn(mean, sent.view(-1), group=group)
        for start, stop in bucket.runs:
            kept, part = self.grad_partitions_flat_buffer[start:stop], mean[: stop - start]
            kept.copy_(part) if self.micro_step_id == 0 else kept.add_(part)
            mean = mean[stop - start :]
        return None

    def partition_grads(self: Any, params_to_release: Sequence[Any], grad_partitions: Any) -> Any:
        """Parts of gradients to where they are kept, unless they are there."""
        if grad_partitions is not None:
            return super().partition_grads(params_to_release, grad_partitions)  # type: ignore[misc]
        for parameter in params_to_release:
            if self.computing is None and parameter.grad.is_cuda:  # read on this stream, and made on another
                parameter.grad.record_stream(get_accelerator().current_stream())
            parameter.grad = None
        return []

    def independent_gradient_partition_epilogue(self: Any) -> None:
        """What remains is reduced; the stream waits for it, and not the host, which has more to launch."""
        if self.offload_optimizer or self.zenflow:
            super().independent_gradient_partition_epilogue()  # type: ignore[misc]
            return
        for dtype in sort_dtypes(self.ipg_buckets.keys()):
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        if not get_accelerator().resolves_data_dependency():
            get_accelerator().current_stream().wait_stream(self.reduce_and_partition_stream)
        self.params_already_reduced.update(dict.fromkeys(self.params_already_reduced, False))
        for number, group in enumerate(self.fp16_groups):
            found = [self.grad_partitions_flat_buffer[slice(*run)] for run in self._bucket(group, 1).runs]
            # what is clipped has to be a copy, which another type is
            same = self.fp32_partitioned_groups_flat[number].dtype == self.gradient_accumulation_dtype
            self.averaged_gradients[number] = [one.clone() for one in found] if same else found
        self._epilogue_ran_this_backward = True

    def _unflatten_partitioned_parameters(self: Any, sub_group_id: int) -> None:
        """Have parts of parameters be parts of the flat copy that was stepped, as they are from the first step on."""
        known = self.__dict__.setdefault("_parts_of_flat", {})
        parts = self.fp16_partitioned_groups[sub_group_id]
        places = [self.fp16_partitioned_groups_flat[sub_group_id].data_ptr(), *(one.data_ptr() for one in parts)]
        if known.get(sub_group_id) != places:
            super()._unflatten_partitioned_parameters(sub_group_id)  # type: ignore[misc]
            known[sub_group_id] = [places[0], *(one.data_ptr() for one in parts)]

    def _bucket(self: Any, params: Sequence[Any], ranks: int) -> _Bucket:
        """Of these parameters, which come together in every step."""
        known: dict[tuple[int, ...], _Bucket] = self.__dict__.setdefault("_buckets_in_flat", {})
        key = (ranks, *[parameter.ds_id for parameter in params])
        if key not in known:
            kept = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            known[key] = _Bucket(params, [kept[parameter.ds_id] for parameter in params], ranks)
        return known[key]

    def _reduces_plainly(self: Any, params: Sequence[Any], dtype: torch.dtype, ranks: int) -> bool:
        """Whether the mean over ranks is all there is to do, and what it is of lies on this device."""
        scaled = self.postscale_gradients and self.gradient_predivide_factor != 1.0
        otherwise = scaled or self.offload_optimizer or self.zenflow or self.all2all_process_group is not None
        alike = dtype == self.dtype and all(one.grad.dtype == dtype for one in params)
        return alike and not otherwise and self._gradient_averaging_world_size(params, ranks) == ranks
