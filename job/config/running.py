"""Settings that say where and how a run happens: parallel, checkpoint, storage, output, tracking.

The sentence beneath a field is its documentation: what it is, its unit, what "off" means, and its rule (see `rules`).
"""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from job.config.rules import Extendable, Free
from job.config.section import Section
from job.config.urls import NO_KEYS


class Parallel(Section):
    """How the run is spread over processes and memories."""

    strategy: Free[Literal["auto", "replicate", "zero2", "zero3", "hpz"]] = "auto"
    """replicate holds the base on every rank and shards the optimizer's state, zero2 the gradients too, zero3 the
    base too, hpz that within each node; auto takes replicate when it fits the GPU, else zero3, and says why. Free."""
    processes: Free[Literal["all"] | PositiveInt] = "all"
    """Workers that `qlora train` starts on this machine: all is one a GPU, or one on a CPU. Free."""
    offload_optimizer: Free[Literal["none", "cpu", "nvme"]] = "none"
    """Where the optimizer's state lives: pinned host memory or files, the latter under zero3 and hpz only; off (none)
    is the GPU. Free."""
    offload_parameters: Free[Literal["none", "cpu", "nvme"]] = "none"
    """Where the base that zero3 and hpz shard lives: pinned host memory or files; off (none) is the GPU. Free."""
    nvme_path: Free[str | None] = None
    """Local folder for what is offloaded to nvme, on a fast disk; off is null. Free."""
    bucket: Free[PositiveInt | None] = None
    """Elements of gradients reduced at once; off (null) is 5e7. Free."""
    prefetch: Free[NonNegativeInt | None] = None
    """Stored elements (a byte holds two 4-bit weights) that zero3 and hpz gather ahead of use, 0 for none; off (null)
    is 200 MB of them. Free."""
    persistence: Free[NonNegativeInt | None] = None
    """Parameters of at most so many elements stay whole under zero3 and hpz; off (null) is 1e6. Free."""
    max_live: Free[NonNegativeInt | None] = None
    """Stored elements that may stay gathered under zero3 and hpz; off (null) is 400 MB of them. Free."""
    layer_gathers: Free[bool] = True
    """Under zero3 gather the frozen weights of a decoder layer in one step while the layer before computes (not with
    parallel.prefetch 0), so that two layers are whole at a time; off (false) leaves layers to DeepSpeed. Free."""
    overlap_comm: Free[bool] = True
    """Communicate while computing; off (false) takes turns. Free."""
    contiguous_gradients: Free[bool | None] = None
    """Copy gradients into one buffer as they come, against fragmented memory: takes longer than it saves where many
    small ones come; off is false, null is on under zero2 alone. Free."""
    deepspeed: Free[str | None] = None
    """Path of your own DeepSpeed JSON: what it says wins over what is generated, contradictions to the run file are
    refused; off (null) generates all of it. Free."""

    @model_validator(mode="after")
    def _a_folder_for_nvme(self) -> Self:
        uses = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if uses and not self.nvme_path:
            raise ValueError("parallel.nvme_path: offload to nvme needs a folder. Name one on a fast local disk")
        if self.nvme_path and not uses:
            raise ValueError(
                "parallel.nvme_path: nothing is offloaded to nvme. Leave it out, or set an offload to nvme"
            )
        return self


class Checkpoint(Section):
    """What is kept on the way so that an interrupted run goes on."""

    every_steps: Free[PositiveInt | None] = None
    """Steps between checkpoints; off is null. Free."""
    every_epoch: Free[bool] = False
    """A checkpoint after each epoch; off is false. Free."""
    every_minutes: Free[float | None] = Field(default=15.0, gt=0)
    """Minutes between checkpoints; off is null. A run that is asked to stop, or ends, writes one in any case. Free."""
    keep: Extendable[PositiveInt] = 3
    """Newest checkpoints that are kept. Extendable."""
    keep_best: Extendable[bool] = False
    """Write a checkpoint at each new lowest evaluation loss and keep the lowest one; off is false. Extendable."""
    max_restarts: Free[NonNegativeInt] = 3
    """Restarts of a lost run without new checkpoints, after which it counts as failed; off (0) allows none. Free."""


class Storage(Section):
    """How object storage is reached. Keys come from the environment or an .env file, never from here."""

    endpoint: Annotated[Free[str | None], NO_KEYS] = None
    """URL of an S3-compatible server; off (null) is AWS. Free."""
    region: Free[str | None] = None
    """Region of the bucket; off (null) is the environment's. Free."""
    path_style: Free[bool] = False
    """Address a bucket as endpoint/bucket instead of bucket.endpoint, as most own servers need; off is false. Free."""
    ca_bundle: Free[str | None] = None
    """File of certificate authorities for the endpoint; off (null) is the system's. Free."""
    cache_dir: Free[str | None] = None
    """Folder on the node's own disk that keeps downloaded and converted weights for its next run; off is null. Free."""
    cache_gib: Free[float | None] = Field(default=None, gt=0)
    """Largest size of what was downloaded into that folder, GiB, the least recently used removed first; off (null) is
    no limit. Free."""
    lease: Free[bool] = True
    """Have a second run on the same output.url refused; needs storage that honours conditional puts. Off (false) is
    for storage without them: two runs there would overwrite each other unnoticed. Free."""
    retry_minutes: Free[float] = Field(default=10.0, ge=0)
    """Minutes for which failing storage is tried again while the run waits for it: for streamed rows, for a checkpoint
    to go on from, for its last writes; off (0) fails at once. Free."""

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

    url: Annotated[Free[str], NO_KEYS]
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
