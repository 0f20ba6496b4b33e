"""The whole run file as one value, and a walk over its fields."""

from collections.abc import Iterator
from typing import Self

from pydantic import model_validator
from pydantic.fields import FieldInfo

from job.config.learning import Data, Evaluation, Generation, Lora, Model, Quantization, Train
from job.config.rules import Rule
from job.config.running import Checkpoint, Output, Parallel, Storage, Tracking
from job.config.section import Section


class RunConfig(Section):
    """One fine-tuning run: what is learnt, where it runs, where the results go."""

    model: Model
    """The pretrained model."""
    quantization: Quantization = Quantization()
    """How the frozen base is stored."""
    lora: Lora = Lora()
    """The adapter."""
    data: Data
    """The rows."""
    evaluation: Evaluation = Evaluation()
    """Held-out loss."""
    train: Train = Train()
    """The optimisation."""
    generation: Generation = Generation()
    """Answers of compare and chat."""
    parallel: Parallel = Parallel()
    """Processes and memories."""
    checkpoint: Checkpoint = Checkpoint()
    """State kept on the way."""
    storage: Storage = Storage()
    """Access to object storage."""
    output: Output
    """Where the results go."""
    tracking: Tracking = Tracking()
    """Who hears about the progress."""

    @model_validator(mode="after")
    def _best_by_evaluations(self) -> Self:
        if self.checkpoint.keep_best and not (self.evaluation.every_steps and self._holds_out):
            raise ValueError(
                "checkpoint.keep_best: judges by evaluations on the way. Set evaluation.every_steps, and "
                "evaluation.file or evaluation.share"
            )
        return self

    @model_validator(mode="after")
    def _streams_what_can_be_streamed(self) -> Self:
        if not self.data.streaming:
            return self
        if self.train.max_steps is None:
            raise ValueError(
                "data.streaming: nobody knows how many steps an epoch has before it was read. Set train.max_steps"
            )
        if self.data.workers not in ("auto", 1):
            raise ValueError(
                f"data.workers: {self.data.workers} processes, but a stream becomes tokens in a thread of the first "
                "rank. Use 1, or set data.streaming: false"
            )
        if self.evaluation.share:
            raise ValueError(
                "evaluation.share: takes rows from all of data.train, which data.streaming never holds. "
                "Put them into a file of their own and set evaluation.file"
            )
        return self

    @property
    def _holds_out(self) -> bool:
        return bool(self.evaluation.file or self.evaluation.share)

    @property
    def run_name(self) -> str:
        """The name people see: tracking.run_name, or the last part of output.url."""
        return self.tracking.run_name or self.output.url.rstrip("/").rpartition("/")[2]


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every setting as (section, name, pydantic field), in the order of the documentation."""
    for section, holder in RunConfig.model_fields.items():
        assert isinstance(holder.annotation, type) and issubclass(holder.annotation, Section)
        for name, field in holder.annotation.model_fields.items():
            yield section, name, field


def rule_of(field: FieldInfo) -> Rule:
    """How this setting may change on one output URL."""
    return next(mark for mark in field.metadata if isinstance(mark, Rule))
