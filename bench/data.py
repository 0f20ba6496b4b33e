"""Data before the first step: rows into tokens, with and without tokens that stayed, and how full packed sequences are.

    python -m bench.data [ROWS]

Rows are Alpaca-like (an instruction, sometimes an input, an answer; about 150 tokens) of random words of this project's
README, in the tokenizer of the demo's model. Prints a line a way, each the median of three. Results with date and
hardware: bench/RESULTS.md.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from job.config import RunConfig
from job.data.load import Dataset, load_dataset
from job.data.pack import epoch_order
from job.tokenizer import Tokenizer

MODEL = Path("models/SmolLM2-135M-Instruct")
TIMES = 3


def make_rows(path: Path, count: int) -> Path:
    """Answers of 5 to some 400 words, most of them short (log-normal), as those of instruction data are."""
    chance = random.Random(0)
    words = Path("README.md").read_text().split()

    def said(median: float, spread: float) -> str:
        length = min(max(int(chance.lognormvariate(0, spread) * median), 3), 400)
        return " ".join(chance.choices(words, k=length))

    with path.open("w") as file:
        for _ in range(count):
            given = said(10, 0.6) if chance.random() < 0.4 else ""
            file.write(json.dumps({"instruction": said(9, 0.4), "input": given, "output": said(28, 0.9)}) + "\n")
    return path


def loaded(rows: Path, work: Path, keep: bool = False, **data: Any) -> tuple[float, Dataset]:
    """Seconds until the rows are tokens, and these; `keep` writes them too, which is not in the seconds."""
    values = {
        "model": {"name": str(MODEL)},
        "data": {"train": str(rows), **data},
        "output": {"url": str(work / "out")},
    }
    config = RunConfig.model_validate(values)
    tokenizer = Tokenizer(str(MODEL))
    begun = time.perf_counter()
    found = load_dataset(config, tokenizer)
    seconds = time.perf_counter() - begun
    if keep:
        writing = found.keep(print)
        assert writing
        writing.join()
    return seconds, found


def filled(found: Dataset, length: int) -> float:
    """Share of the slots of packed sequences of this length that hold a token, over an epoch."""
    lengths = found.train.tokens.lengths  # type: ignore[union-attr]
    packed = epoch_order(lengths, length, True, True, seed=42, epoch=0)
    return float(lengths.sum() / (len(packed) * length))


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = make_rows(work / "rows.jsonl", count)
        cache = str(work / "tokens")
        ways: dict[str, dict[str, Any]] = {
            "1 process": {"cache": None, "workers": 1},
            f"auto, {len(os.sched_getaffinity(0))} CPUs": {"cache": None},
            "tokens that stayed": {"cache": cache},
        }
        _, found = loaded(rows, work, keep=True, cache=cache)
        for name, data in ways.items():
            seconds = statistics.median(loaded(rows, work, **data)[0] for _ in range(TIMES))
            print(json.dumps({"way": name, "rows": count, "seconds": round(seconds, 2)}), flush=True)
        size = sum(file.stat().st_size for file in Path(cache).iterdir())
        tokens = found.train.tokens  # type: ignore[union-attr]
        print(json.dumps({"tokens a row": round(tokens.lengths.mean(), 1), "kept MB": round(size / 1e6, 1)}))
        for length in (512, 1024, 2048, 4096):
            print(json.dumps({"max_length": length, "filled": round(filled(found, length), 4)}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 52_000)
