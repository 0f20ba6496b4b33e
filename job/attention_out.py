"""What attention gave, kept in host memory for when its layer is computed again, which then leaves attention out.

With long sequences attention takes more of a layer than anything else, and its kernels' backward passes read nothing of
the forward pass but what went in, what came out and a number a row. torch's selective checkpointing keeps such results
too, on the GPU, and looks at every operation of a layer to find them; here only the call of attention is looked at.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its kernel
from torch.utils._python_dispatch import TorchDispatchMode

from job.host_inputs import HostInputs
from job.recompute import pass_now

KERNELS = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
)
"""What torch computes attention by. All give the output first."""


class AttentionOutputs:
    """Results of attention between the first and the second forward pass of a layer.

    Args:
        on_host: where the outputs wait; what is a number a row stays on the GPU.
    """

    def __init__(self, on_host: HostInputs):
        self.on_host = on_host

    @contextmanager
    def around(self) -> Iterator[None]:
        """While this is entered, a layer attends, once."""
        this = pass_now()
        if this is None:
            yield
        elif this.number == "first":
            with _Seen(lambda kernel: self._noted(kernel(), this.noted)):
                yield
        elif this.noted:
            away, *rest = this.noted.pop(0)
            given = (self.on_host.get(away), *rest)
            with _Seen(lambda kernel: given):
                yield
        else:  # torch chose a way of its own that is no kernel
            yield

    def _noted(self, result: tuple[Any, ...], noted: list[Any]) -> tuple[Any, ...]:
        # without autograd's marks, which it puts on what a kernel gives once that is through here
        output, *rest = (one.detach() if isinstance(one, torch.Tensor) else one for one in result)
        noted.append((self.on_host.put(output), *rest))
        return result


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has a function give what kernels of attention do, with the kernel to be called or not."""

    def __init__(self, instead: Callable[[Callable[[], Any]], Any]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.instead = instead

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KERNELS:
            return self.instead(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))
