"""What checkpoints cost the training: how long a step boundary stands still, and whether steps beside an upload slow.

    python bench/checkpoints.py CONFIG [section.key=value ...]

Runs the configuration without checkpoints, with one after every step, and without again (machines drift), and prints
medians over the steps, the first two left out. One process.
"""

import shutil
import statistics
import sys
import tempfile
import time
from typing import Any

from job.config import load_config
from job.data.batches import GlobalBatch
from job.model import quiet_libraries
from job.progress import Progress
from job.saving import Saver
from job.sinks import read_metrics
from job.store import Store
from job.train import train
from job.world import World

after_step = Saver.after_step


def measured(config: str, words: list[str], every: str) -> tuple[float, float, int]:
    """(median seconds of a step, median seconds at a step boundary, bytes of a checkpoint)."""
    stalls: list[float] = []

    def timed(self: Saver, progress: Progress, batch: GlobalBatch) -> None:
        begun = time.perf_counter()
        after_step(self, progress, batch)
        stalls.append(time.perf_counter() - begun)

    Saver.after_step = timed  # type: ignore[method-assign]
    out = tempfile.mkdtemp()
    settings: list[Any] = [*words, f"output.url={out}/run", f"checkpoint.every_steps={every}", "tracking.sinks=[jsonl]"]
    run = load_config(config, settings)
    train(run, World(), lambda line: None)
    store = Store(run.output.url)
    steps = [row["tokens"] / row["tokens_per_s"] for row in read_metrics(store) if "loss" in row]
    (folder,) = [store.child(f"checkpoints/{name}") for name in store.child("checkpoints").names(folders=True)][-1:]
    size = sum(folder.size(name) for name in folder.names())
    shutil.rmtree(out)
    return statistics.median(steps[2:]), statistics.median(stalls[2:]), size


def main(config: str, words: list[str]) -> None:
    quiet_libraries()
    print("checkpoint  step, s  boundary, s  boundary / step  MB")
    for every in ("null", "1", "null"):
        step, stall, size = measured(config, words, every)
        name = "each step" if every == "1" else "none"
        print(f"{name:10}  {step:7.3f}  {stall:11.4f}  {stall / step:14.2%}  {size / 1e6:4.0f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
