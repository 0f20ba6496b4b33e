"""Settings that say where and how a run happens: parallel, checkpoint, storage, output, tracking.

The sentence beneath a field is its documentation: what it is, its unit, what "off" means, and its rule (see `rules`).
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from job.config.rules import Extendable, Free
from job.config.section import Section, works_only

_ONE_PROCESS = "This version trains in one process"
_NO_CHECKPOINTS = "Checkpoints are not there yet: a run is written once, at its end"


class Parallel(Section):
    """How the run is spread over processes and memories."""

    strategy: Annotated[
        Free[Literal["auto", "replicate", "zero2", "zero3", "hpz"]],
        works_only("auto", "replicate", because=_ONE_PROCESS),
    ] = "auto"
    """replicate holds the base on every rank, zero2 shards gradients and optimizer, zero3 the base too, hpz that
    within each node; auto chooses and says why. Free."""
    processes: Annotated[Free[Literal["all"] | PositiveInt], works_only("all", 1, because=_ONE_PROCESS)] = "all"
    """Workers that `qlora train` starts on this machine: all GPUs (or one on a CPU), or a number. Free."""
    offload_optimizer: Annotated[
        Free[Literal["none", "cpu", "nvme"]], works_only("none", because="Offload is not there yet")
    ] = "none"
    """Where the optimizer's state lives besides the GPU; off is none. Free."""
    offload_parameters: Annotated[
        Free[Literal["none", "cpu", "nvme"]], works_only("none", because="Offload is not there yet")
    ] = "none"
    """Where the sharded base lives besides the GPU; off is none. Free."""
    nvme_path: Annotated[Free[str | None], works_only(None, because="Offload is not there yet")] = None
    """Local folder for NVMe offload; off is null. Free."""
    bucket: Free[PositiveInt | None] = None
    """Elements reduced or gathered at once; null is DeepSpeed's default. Free."""
    prefetch: Annotated[Free[PositiveInt | None], works_only(None, because="zero3 is not there yet")] = None
    """Elements gathered ahead of use under zero3; null is chosen by the plan. Free."""
    persistence: Annotated[Free[PositiveInt | None], works_only(None, because="zero3 is not there yet")] = None
    """Parameters below so many elements stay whole under zero3; null is chosen by the plan. Free."""
    max_live: Annotated[Free[PositiveInt | None], works_only(None, because="zero3 is not there yet")] = None
    """Gathered elements that may live at once under zero3; null is chosen by the plan. Free."""
    deepspeed: Annotated[Free[str | None], works_only(None, because="The DeepSpeed configuration is generated")] = None
    """Path of your own DeepSpeed JSON; off (null) generates it. Free."""


class Checkpoint(Section):
    """What is kept on the way so that an interrupted run goes on."""

    every_steps: Annotated[Free[PositiveInt | None], works_only(None, because=_NO_CHECKPOINTS)] = None
    """Steps between checkpoints; off is null. Free."""
    every_epoch: Annotated[Free[bool], works_only(False, because=_NO_CHECKPOINTS)] = False
    """A checkpoint after each epoch; off is false. Free."""
    every_minutes: Annotated[Free[float | None], works_only(None, because=_NO_CHECKPOINTS)] = Field(default=None, gt=0)
    """Minutes between checkpoints; off is null. Free."""
    keep: Annotated[Extendable[PositiveInt], works_only(3, because=_NO_CHECKPOINTS)] = 3
    """Newest checkpoints that are kept. Extendable."""
    keep_best: Annotated[
        Extendable[bool], works_only(False, because=_NO_CHECKPOINTS + " (evaluation.keep_best keeps the best adapter)")
    ] = False
    """Keep the checkpoint of the lowest evaluation loss too; off is false. Extendable."""


class Storage(Section):
    """How object storage is reached. Keys come from the environment or an .env file, never from here."""

    endpoint: Free[str | None] = None
    """URL of an S3-compatible server; off (null) is AWS. Free."""
    region: Free[str | None] = None
    """Region of the bucket; off (null) is the environment's. Free."""
    path_style: Free[bool] = False
    """Address a bucket as endpoint/bucket instead of bucket.endpoint, as most own servers need; off is false. Free."""
    ca_bundle: Free[str | None] = None
    """File of certificate authorities for the endpoint; off (null) is the system's. Free."""
    cache_dir: Free[str | None] = None
    """Folder on the node's own disk that keeps downloaded weights for its next run; off is null. Free."""
    cache_gib: Free[float | None] = Field(default=None, gt=0)
    """Largest size of that folder, GiB, the least recently used removed first; off (null) is no limit. Free."""

    @field_validator("cache_dir")
    @classmethod
    def _on_this_machine(cls, folder: str | None) -> str | None:
        if folder is not None and (not folder.strip() or "://" in folder):
            raise ValueError(f"{folder!r} is no folder of this machine. Name one on its own disk, such as /tmp/weights")
        return folder

    @model_validator(mode="after")
    def _limit_has_a_folder(self) -> Self:
        if self.cache_gib is not None and self.cache_dir is None:
            raise ValueError(
                f"storage.cache_gib: {self.cache_gib:g} GiB of no folder. Set storage.cache_dir, or use null"
            )
        return self


class Output(Section):
    """Where the results go."""

    url: Free[str]
    """Folder or URL (file, s3, gs, memory) that holds this run and no other. Required. Free."""

    @field_validator("url")
    @classmethod
    def _not_empty(cls, url: str) -> str:
        if not url.strip("/ "):
            raise ValueError("is empty or the root. Name a folder such as runs/first or s3://bucket/runs/first")
        return url


class Tracking(Section):
    """Who hears about the progress."""

    sinks: Free[list[Literal["console", "jsonl"]]] = Field(default=["console", "jsonl"])
    """console shows progress, jsonl writes metrics.jsonl under output.url; off is an empty list. Free."""
    every_steps: Free[PositiveInt] = 1
    """Steps between rows that sinks other than jsonl show; jsonl gets every step. Free."""
    run_name: Free[str | None] = None
    """Name shown to people and trackers; off (null) is the last part of output.url. Free."""
