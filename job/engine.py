"""DeepSpeed's engine behind one door: train a step, evaluate, gather."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from job.all_at_once import step_all_at_once
from job.compile_later import compiled_when_called
from job.config.learning import Train
from job.data.batches import IGNORED, GlobalBatch, MicroBatch
from job.dropout import Places
from job.layer_gathers import gather_layers_at_once
from job.loss_head import LossHead
from job.plan import Plan
from job.row_attention import Rows
from job.saved import SCALER
from job.sending import sent
from job.sharding import gathered
from job.stage3 import shard_at_once
from job.state import Trained
from job.world import World


@dataclass(frozen=True)
class Step:
    """What one optimizer step was: `loss` a learnt token, `grad_norm` before clipping, `applied` false when gradients
    were not finite and the step was left out, `scaled` whether that may come from fp16's loss scaling."""

    loss: float
    grad_norm: float
    applied: bool
    scaled: bool = False


class Engine:
    """A model under DeepSpeed.

    Args:
        model: the peft model; only what requires gradients is trained.
        places: told where the tokens of each micro-batch stand, for dropout.
        rows: told where its rows begin, for attention; None where that takes a mask.
        plan: precision and batches.
        train: optimizer settings.
        world: this rank among its peers; the process group is open.
    """

    def __init__(self, model: Any, places: Places, rows: Rows | None, plan: Plan, train: Train, world: World):
        if plan.zero.shards_base:
            _gather_by_layer(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with compiled_when_called():
            self.inner, *_ = deepspeed.initialize(
                model=model, optimizer=_optimizer(trained, train), model_parameters=trained, config=plan.deepspeed()
            )
        if plan.zero.shards_base:
            shard_at_once(self.inner)
        else:
            step_all_at_once(self.inner.optimizer)
        if plan.zero.gathers_layers:
            gather_layers_at_once(self.inner, plan.zero.gathers_ahead)
        self.model, self.places, self.rows = model, places, rows
        self.world, self.device = world, self.inner.device
        names = {id(value): name for name, value in model.named_parameters()}
        self.trained = Trained(self.inner, names, plan.zero.shards_base, world.rank)
        base = model.get_base_model()
        self.head = self._proven_head() if train.fused else None
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    def train_step(self, batch: GlobalBatch, micro_batches: Sequence[MicroBatch], learning_rate: float) -> Step:
        """One optimizer step on this rank's share of a global batch.

        The loss is the sum over all learnt tokens of the batch over their global number. DeepSpeed averages
        gradients over ranks, hence the factor world_size.
        """
        if not self.model.training:  # walks through all modules, as long as a step of few tokens takes
            self.inner.train()
        for group in self.inner.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        scale = self.world.world_size / max(batch.learnt, 1)
        for number, micro_batch in enumerate(micro_batches, 1):
            self.inner.set_gradient_accumulation_boundary(number == len(micro_batches))
            self.places.move(batch.step, micro_batch.rows, micro_batch.positions, self.device)
            loss_sum = self._loss_sum(micro_batch)
            total += loss_sum.detach()
            self.inner.backward(loss_sum * scale, scale_wrt_gas=False)
            self.inner.step()
        self._sum_over_ranks(total)
        norm = self.inner.get_global_grad_norm()
        loss, applied = float(total) / max(batch.learnt, 1), bool(self.inner.was_step_applied())
        return Step(loss, float(norm or 0.0), applied, self.inner.optimizer.loss_scaler.dynamic)

    @torch.no_grad()
    def evaluate(self, batch: GlobalBatch, micro_batches: Sequence[MicroBatch]) -> float:
        """Mean loss over all learnt tokens of `batch`, of which this rank sees its micro-batches."""
        self.inner.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro_batch in micro_batches:
            total += self._loss_sum(micro_batch)
        self._sum_over_ranks(total)
        return float(total) / max(batch.learnt, 1)

    def gather(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name, whole, on the CPU, in the type the model computes with; every rank calls."""
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        return {name: whole.detach().to("cpu", copy=True) for name, whole in gathered(trained)}

    def scaler(self) -> dict[str, float]:
        """Where fp16's loss scaling stands; empty in other precisions."""
        scaler = self.inner.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in SCALER} if scaler.dynamic else {}

    def restore_scaler(self, values: Mapping[str, float]) -> None:
        """Go on with loss scaling from there.

        Raises:
            KeyError: a value is missing.
        """
        scaler = self.inner.optimizer.loss_scaler
        for name in SCALER if scaler.dynamic else ():
            setattr(scaler, name, values[name])

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The frozen parameters by their names in the base, whole, one at a time; every rank calls."""
        base = self.model.get_base_model()
        frozen = [(name, value) for name, value in base.named_parameters() if not value.requires_grad]
        return gathered([(name.replace(".base_layer", ""), value) for name, value in frozen])

    @torch.no_grad()
    def logits(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] in evaluation mode; every rank calls."""
        self.inner.eval()
        if self.rows is not None:
            self.rows.move(positions_BT.numpy(), self.device)
        # neither a mask nor a cache: with either, transformers 5 lets packed rows see each other
        ids, positions = ids_BT.to(self.device), positions_BT.to(self.device)
        logits: torch.Tensor = self.inner(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits

    def _loss_sum(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Sum of -log p over the learnt tokens, fp32; logits are made for learnt positions only."""
        if self.rows is not None:
            self.rows.move(micro_batch.positions, self.device)
        ids, positions, targets = map(self._sent, (micro_batch.ids, micro_batch.positions, micro_batch.targets))
        kept: dict[str, Any] = {}
        if self.keeps_logits:
            learnt = np.flatnonzero((micro_batch.targets != IGNORED).any(axis=0))
            used = self._sent(learnt if learnt.size else np.zeros(1))
            targets, kept = targets[:, used], {"logits_to_keep": used}
        # neither a mask nor a cache: with either, transformers 5 lets packed rows see each other
        if self.head is None:
            logits = self.inner(input_ids=ids, position_ids=positions, use_cache=False, **kept).logits
            return _sum_of_losses(logits, targets)
        with self.head.told(targets, IGNORED):
            loss: torch.Tensor = self.inner(input_ids=ids, position_ids=positions, use_cache=False, **kept).logits
        return loss.squeeze()

    def _sent(self, numbers: np.ndarray) -> torch.Tensor:
        return sent(numbers.astype(np.int64), self.device)

    @torch.no_grad()
    def _proven_head(self) -> LossHead | None:
        """The output layer that takes the loss itself, if that is the loss: some models do more to their logits. What
        is proven is its value; the gradient follows, for nothing behind the layer is trained."""
        head = LossHead.of(self.model.get_base_model())
        if head is None:
            return None
        self.inner.eval()
        ids = torch.arange(16, 24, device=self.device)[None]
        positions = torch.arange(8, device=self.device)[None]
        logits = self.inner(input_ids=ids, position_ids=positions, use_cache=False).logits
        expected = _sum_of_losses(logits, ids)
        with head.told(ids, IGNORED):
            found = self.inner(input_ids=ids, position_ids=positions, use_cache=False).logits
        whole = logits.shape[-1] == head.out_features
        if whole and found.numel() == 1 and bool((found - expected).abs().max() <= 1e-3 * expected):
            return head
        head.forget()
        return None

    def _sum_over_ranks(self, total: torch.Tensor) -> None:
        if self.world.world_size > 1:
            dist.all_reduce(total)


def _sum_of_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _gather_by_layer(model: Any) -> None:
    """Have ZeRO-3 gather a decoder layer at a time: one gather instead of one for each linear."""
    names = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    layers = {type(module) for module in model.modules() if type(module).__name__ in names}
    if layers:
        deepspeed.utils.set_z3_leaf_modules(model, list(layers))
    # DeepSpeed fetches a layer for its backward pass only where the layer's input has a gradient
    model.enable_input_require_grads()


def _optimizer(parameters: list[torch.nn.Parameter], train: Train) -> torch.optim.Optimizer:
    kinds: dict[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    made: torch.optim.Optimizer = kinds[train.optimizer](
        parameters, lr=train.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=train.weight_decay
    )
    return made
