"""Short rows on one GPU: tokens of rows a second, packed as ours are and padded to 512 one by one as tutorials do.

    python bench/short_rows.py [FOLDER]

Rows have as many tokens as Alpaca's, some 145 on average, and are of random words; the model is the
7B Llama-2 shape of `one_gpu.py`. Tutorials' way is the stack `trainer` of `peers.py` with one row a forward and
recomputation, which prepare_model_for_kbit_training turns on; ours is `qlora train` with what it chooses by itself.
Padding counts as nothing. Results with date and hardware: bench/RESULTS.md.
"""

import json
import random
import sys
from pathlib import Path

import torch
from one_gpu import STEPS, make_model, make_rows, measure, measure_peer

PADDED, PACKED, MICRO = 512, 2048, 4
PADDED_ROWS = 40


def lengths(count: int) -> list[int]:
    """Tokens of rows: log-normal as those of instruction data, 20 to 512, some 145 on average."""
    chance = random.Random(0)
    return [min(max(int(chance.lognormvariate(4.75, 0.7)), 20), PADDED) for _ in range(count)]


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    model = work / "7b"
    make_model(model)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    enough = lengths(PACKED * MICRO * (STEPS + 1) // 100)
    packed = make_rows(work / "short.jsonl", *enough)
    padded = make_rows(work / "short-padded.jsonl", *enough[:PADDED_ROWS])
    print(json.dumps({"way": "padded", **measure_peer("trainer", model, PADDED, 1, "full", padded)}), flush=True)
    how = ["train.optimizer=paged_adamw_8bit", "lora.dropout=0"]
    for compute in ("bf16", "fp8"):
        figures = measure(model, work, PACKED, MICRO, *how, f"train.base_compute={compute}", rows=packed)
        print(json.dumps({"way": f"packed, {compute}", **figures}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/bench"))
