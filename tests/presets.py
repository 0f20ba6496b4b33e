"""The run files in configs/, and the models that they name as a machine without network has them: headers alone."""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from job.config import RunConfig, load_config
from job.families.native import native_config
from job.outlook import Outlook, look_ahead, planned_for
from tests.conftest import REPOSITORY
from tests.test_legacy_models import as_chatglm, as_qwen

FILES = {path.stem: path for path in sorted(REPOSITORY.glob("configs/*.yaml")) if not path.stem.endswith("-demo")}
PUBLISHED = Path(__file__).parent / "published_models"
AUTHORS = {"chatglm": as_chatglm, "qwen": as_qwen}
"""How tensors of transformers' class are named in the files of a model type that has others."""
TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
SMALLEST = 0.9
"""What the smallest cards of so many GB show of them: 14.6 GiB of a T4's 16, 22 of an L4's 24, 44.4 of an L40S's 48."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Preset:
    """A run file, and what its name says: nodes, GPUs a node, GB a GPU."""

    name: str

    @property
    def path(self) -> Path:
        return FILES[self.name]

    @cached_property
    def head(self) -> str:
        """The comment that it opens with."""
        (found,) = re.findall(r"\A(?:#.*\n)+", self.path.read_text("utf-8"))
        return str(found)

    @property
    def hardware(self) -> tuple[int, int, float]:
        found = re.search(r"-(?:(\d)x)?(\d)x(\d+)g$", self.name)
        assert found, "named model-method-hardware"
        return int(found[1] or 1), int(found[2]), int(found[3]) * SMALLEST

    @property
    def plan_command(self) -> str:
        """What its head tells to type first."""
        nodes, gpus, memory_gib = self.hardware
        said = f"--nodes {nodes} " * (nodes > 1) + f"--gpus {gpus} --gpu-memory {memory_gib:g}"
        return f"qlora plan configs/{self.name}.yaml {said}"

    def config(self, *overrides: str) -> RunConfig:
        return load_config(str(self.path), overrides)

    def outlook(self, *overrides: str) -> Outlook:
        """Its plan on the hardware that it is named after."""
        config = self.config(*overrides)
        return look_ahead(config, *planned_for(config, *self.hardware))


PRESETS = [Preset(name) for name in FILES]


def published_config(model: str) -> dict[str, Any]:
    """The config.json of a hub id, as much of it as decides the model's tensors."""
    written: dict[str, Any] = json.loads((PUBLISHED / f"{model.rpartition('/')[2]}.json").read_text())
    return written


def module(model: str) -> Any:
    """transformers' own class for it, without memory."""
    settings = native_config(published_config(model))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))


def publish(cache: Path, model: str) -> None:
    """Put config.json and weights that are a header and nothing else into the hub's cache."""
    written = published_config(model)
    native, tied = module(model).state_dict(), written.get("tie_word_embeddings", True)
    tensors = {name: value for name, value in native.items() if not (tied and name == "lm_head.weight")}
    rename, layers = AUTHORS.get(written["model_type"]), native_config(written).get("num_hidden_layers", 0)
    if rename:
        tensors = rename(tensors, layers)
    folder = cache / f"models--{model.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    (snapshot / "config.json").write_text(json.dumps(written))
    write_header(snapshot / "model.safetensors", tensors, TYPES[written.get("torch_dtype", "float32")])


def write_header(path: Path, tensors: Mapping[str, torch.Tensor], dtype: str) -> None:
    """A safetensors file whose tensors are a hole in it."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * (4 if dtype == "F32" else 2)
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
