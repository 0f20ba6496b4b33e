"""The output layer and the loss as one operation, a chunk of positions at a time: logits for all of them never exist.

For 8,192 positions and a vocabulary of 128,000, logits, their probabilities and gradients in fp32 take 12 GiB; here it
is the size of a chunk. As the loss is a sum and the layer is frozen, the gradient of the hidden states is made in the
forward pass, chunk by chunk (as in Hsu et al. 2024, Liger Kernel, section 3.2), and scaled in the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from job.activations import CHUNK

if torch.cuda.is_available():
    from job.kernels.losses import losses_in_place


class LossHead(nn.Linear):
    """An output layer that gives logits, or, told the targets, the sum of -log p in their place."""

    targets: torch.Tensor | None = None
    ignored: int = -100

    @classmethod
    def of(cls, model: Any) -> "LossHead | None":
        """The model's output layer as one of these, if it is a plain and frozen linear. In fp16 the gradient would
        lose what is small, for it is made before the loss is scaled."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if type(head) is not nn.Linear or any(value.requires_grad for value in head.parameters()):
            return None
        if head.weight.dtype == torch.float16:
            return None
        head.__class__ = cls
        return head  # type: ignore[return-value]

    @property
    def took_loss(self) -> bool:
        """Whether the gradient is made with the loss, so that the backward pass does not read the weight."""
        return self.targets is not None

    def forget(self) -> None:
        """Be the plain layer again."""
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @contextmanager
    def told(self, targets: torch.Tensor, ignored: int) -> Iterator[None]:
        """For the while, the targets [B, T] of the positions that come; those that are `ignored` have no loss."""
        self.targets, self.ignored = targets, ignored
        try:
            yield
        finally:
            self.targets = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of hidden states [B, T, H]; told the targets, the loss as [1, 1, 1] in fp32."""
        if self.targets is None:
            return super().forward(hidden)
        loss: torch.Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, self.targets, self.ignored
        )
        return loss.view(1, 1, 1)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        ignored: int,
    ) -> torch.Tensor:
        states, wanted = hidden.flatten(0, -2), targets.flatten()
        rows = max(CHUNK // weight.shape[0], 1)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            slot = None if gradient is None else gradient[part]
            total += _of_chunk(states[part], weight, bias, wanted[part], ignored, slot)
        ctx.shape = hidden.shape
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0]).to(gradient.dtype).view(ctx.shape), None, None, None, None


def _of_chunk(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wanted: torch.Tensor,
    ignored: int,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The sum of losses of states [N, H] in fp64, and the states' gradient into `gradient` [N, H] if there is one; what
    it takes is gone before the next chunk."""
    logits = nn.functional.linear(states, weight, bias)
    if logits.is_cuda:
        total = losses_in_place(logits, wanted, ignored, gradient is not None).sum(dtype=torch.float64)
        if gradient is not None:
            torch.mm(logits, weight, out=gradient)
        return total
    logits = logits.float()
    learnt = (wanted != ignored).unsqueeze(1)
    places = wanted.unsqueeze(1).where(learnt, 0)
    norms = logits.logsumexp(1, keepdim=True)
    total = (norms - logits.gather(1, places)).where(learnt, 0).sum(dtype=torch.float64)
    if gradient is not None:  # softmax less the target, in the place of the logits
        slopes = logits.sub_(norms).exp_()
        slopes.scatter_add_(1, places, slopes.new_full((), -1.0).expand_as(places))
        torch.mm(slopes.masked_fill_(~learnt, 0).to(states.dtype), weight, out=gradient)
    return total
