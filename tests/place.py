"""A run's folder on S3 as a client of the tests' own sees it, and the run that the chaos is done to."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load

from tests.conftest import alpaca_rows, settings, write_rows
from tests.s3 import BUCKET, S3

STEPS = 12
SPEEDS = ("tokens_per_s", "samples_per_s", "memory_gib")
"""What of a row of metrics no run repeats."""
MANIFEST = re.compile(r"checkpoints/step-(\d+)/manifest\.json")


@dataclass(frozen=True)
class Place:
    """A run's folder on S3, seen without what is between it and the run."""

    s3: S3
    name: str

    @property
    def root(self) -> str:
        """Bucket and folder."""
        return f"{BUCKET}/{self.name}"

    @cached_property
    def fs(self) -> Any:
        """A client that remembers nothing."""
        return self.s3.fs()

    def read(self, name: str) -> bytes:
        """A file."""
        return bytes(self.fs.cat_file(f"{self.root}/{name}"))

    def files(self) -> list[str]:
        """Names of all files."""
        return [path.removeprefix(f"{self.root}/") for path in self.fs.find(self.root)]

    def newest(self) -> int:
        """The newest step that is complete: its manifest is there, and all parts with size and SHA-256; 0 without."""
        steps = {int(match[1]): name for name in self.files() if (match := MANIFEST.fullmatch(name))}
        return next((step for step in sorted(steps, reverse=True) if self.whole(steps[step])), 0)

    def whole(self, manifest: str) -> bool:
        """Whether a manifest holds its own SHA-256, and its parts are what it says."""
        try:
            values = json.loads(self.read(manifest))
            digest = values.pop("sha256")
            if sha256(json.dumps(values).encode()).hexdigest() != digest:
                return False
            for name, part in values["parts"].items():
                found = self.read(f"{manifest.removesuffix('manifest.json')}{name}")
                if (len(found), sha256(found).hexdigest()) != (part["bytes"], part["sha256"]):
                    return False
        except FileNotFoundError:  # removed meanwhile
            return False
        return True

    def finished(self) -> bool:
        """Whether status.json says so."""
        return "status.json" in self.files() and json.loads(self.read("status.json"))["state"] == "finished"

    def result(self) -> tuple[list[dict[str, Any]], str, dict[tuple[str, str], str]]:
        """What a finished run came to: the rows of metrics without speeds, and as hashes its adapter and every tensor
        of every rank's state. Python's random state is none of them: botocore draws from it how long it waits."""
        rows = [json.loads(line) for line in self.read("metrics.jsonl").splitlines()]
        last = f"checkpoints/step-{STEPS:08d}"
        tensors = {
            (part.partition("-")[0], name): sha256(tensor.tobytes()).hexdigest()
            for part in json.loads(self.read(f"{last}/manifest.json"))["parts"]
            if part.startswith("rank")
            for name, tensor in load(self.read(f"{last}/{part}")).items()
        }
        return (
            [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows],
            sha256(self.read("adapter/adapter_model.safetensors")).hexdigest(),
            tensors,
        )

    def check_tidy(self, late: bool = False) -> None:
        """One row of metrics a step, and nothing left of what was given up but probes of a few bytes.

        Args:
            late: the run was killed after its last checkpoint: its lease may be there, and a checkpoint too many.
        """
        steps = [row["step"] for row in self.result()[0] if "loss" in row]
        assert steps == list(range(1, STEPS + 1)), steps
        folders = {name.rpartition("/")[0] for name in self.files() if not name.endswith(".probe")}
        assert "metrics-parts" not in folders and ("lease" not in folders or late), sorted(self.files())
        kept = {folder for folder in folders if folder.startswith("checkpoints/")}
        assert late or (all(self.whole(f"{folder}/manifest.json") for folder in kept) and len(kept) <= 4), kept


def run_file(place: Place, storage: dict[str, Any], model: str | Path, rows: str | Path, work: Path) -> Path:
    """A run of twelve steps with dropout and evaluations, and checkpoints as often as they can be written."""
    values = settings(
        model,
        rows,
        f"s3://{place.root}",
        storage=storage,
        lora={"dropout": 0.1},
        data={"max_length": 64},
        train={"max_steps": STEPS, "global_batch_size": 48, "micro_batch_size": 1},
        evaluation={"share": 0.05, "every_steps": 3, "keep_best": True},
        checkpoint={"every_steps": 1, "keep_best": True, "max_restarts": 1000},
    )
    path = work / f"{place.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def some_rows(work: Path) -> Path:
    """Rows for twelve steps."""
    return write_rows(work / "rows.jsonl", alpaca_rows(400))
