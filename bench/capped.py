"""A base whose 4-bit form does not fit one GPU loads and trains on two: shown with a cap on each GPU's memory.

    python bench/capped.py [FOLDER]

A 7B Llama-2 shape takes 3.9 GiB in 4 bits with what stays in bf16. Each process may have CAP_GIB, so one GPU runs out
while the base is loaded, and ZeRO-3 over two does not.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from one_gpu import make_model, make_rows

CAP_GIB = 3.8


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    make_model(work / "7b")
    rows = make_rows(work / "rows-256.jsonl", *[256] * 8)
    share = CAP_GIB * 2**30 / torch.cuda.get_device_properties(0).total_memory
    for processes, strategy in ((1, "replicate"), (2, "zero3")):
        words = [
            *("train", str(work / "run.yaml"), f"parallel.processes={processes}", f"parallel.strategy={strategy}"),
            *(f"model.name={work / '7b'}", f"data.train={rows}", "data.max_length=256", "train.max_steps=3"),
            *("train.global_batch_size=2", f"output.url={work / f'capped-{processes}'}"),
        ]
        (work / "run.yaml").write_text("model: {}\ndata: {}\noutput: {}\n")
        how = f"per_process_memory_fraction:{share:.5f},expandable_segments:True"
        env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": how}
        print(f"{processes} x {CAP_GIB} GiB, {strategy}", flush=True)
        done = subprocess.run([sys.executable, "-m", "job", *words], stderr=subprocess.STDOUT, env=env)
        print(f"exit code {done.returncode}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/bench"))
