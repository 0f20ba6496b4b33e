"""What tests share: a tiny real model with a real tokenizer, rows, run files, and the command in its own process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.s3 import S3, serve

for deaf in (signal.SIGINT, signal.SIGHUP):  # a shell's background job, nohup: what is started here would be deaf too
    if signal.getsignal(deaf) == signal.SIG_IGN:
        signal.signal(deaf, signal.default_int_handler if deaf == signal.SIGINT else signal.SIG_DFL)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers on two cores would spin against each other
# DeepSpeed's operators are compiled for these tests alone: a process that was ended while it compiled leaves a lock
# that all others wait for, and another checkout compiles the same files anew; by few, for the sake of other tests
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
os.environ.setdefault("MAX_JOBS", "2")
os.environ.setdefault("CXX", str(Path(__file__).parents[1] / "images/portable-c++"))  # as in the image, without symbols
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which bitsandbytes does
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
REPOSITORY = Path(__file__).parent.parent


def make_tokenizer(folder: Path, chat_template: str | None = CHATML) -> None:
    """A byte-level BPE tokenizer of 512 tokens whose eos is <|im_end|> and which has no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([(REPOSITORY / "LICENSE").read_text()] * 2, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    made.chat_template = chat_template
    made.save_pretrained(folder)


def make_llama(folder: Path, dtype: str = "bfloat16", **shape: Any) -> None:
    """A Llama of 2 layers with random weights; `shape` overrides its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            "bos_token_id": 1,
            **shape,
        }
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in bf16 and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_llama(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's real model, which `make test` fetches."""
    folder = REPOSITORY / "models/SmolLM2-135M-Instruct"
    assert folder.is_dir(), "run `make test`, which fetches the demo's model"
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server on loopback with an empty bucket named `bucket`."""
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The S3 server, its keys in this process's environment."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca_rows(count: int) -> list[dict[str, str]]:
    """Rows of different lengths with a pattern."""
    return [
        {
            "instruction": f"Count to {n}.",
            "input": "in words" if n % 3 else "",
            "output": " ".join(["one"] * (n % 7 + 1)),
        }
        for n in range(count)
    ]


def settings(
    model: Path | str, train: Path | str, output: Path | str, /, **sections: Mapping[str, Any]
) -> dict[str, Any]:
    """A run file's values for a tiny run in fp32 without dropout; keyword arguments are merged into the sections."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(model)},
        "data": {"train": str(train), "max_length": 128},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "train": {
            "max_steps": 3,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "recompute": "none",
        },
        "output": {"url": str(output)},
    }
    for section, changed in sections.items():
        values[section] = {**values.get(section, {}), **changed}
    return values


@pytest.fixture
def run_file(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a run file for the tiny model over 24 alpaca rows; keyword arguments are merged into its sections."""
    import yaml

    def write(name: str = "run", /, **sections: Mapping[str, Any]) -> Path:
        rows = tmp_path / "rows.jsonl"
        if not rows.exists():
            write_rows(rows, alpaca_rows(24))
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings(tiny_model, rows, tmp_path / "out" / name, **sections)))
        return path

    return write


def qlora(
    *words: str | Path, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "job", *map(str, words)],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=900,  # ends what hangs; the demo takes two minutes on two cores and far more on busy ones
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
    )


def metrics(output: Path) -> list[dict[str, Any]]:
    """All rows of a local run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    """The training losses of a local run."""
    return [row["loss"] for row in metrics(output) if "loss" in row]
