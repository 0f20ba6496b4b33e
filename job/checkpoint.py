"""Checkpoints in a store: parts, and last of all the manifest that makes them one.

A checkpoint is complete if and only if its manifest is there and every part that it lists has the size and SHA-256 it
says. Parts are named by their content, so two writers never spoil each other's, and the manifest is created, never
replaced: of two that race one wins.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import OutputError
from job.store import Store

MANIFEST, FOLDER = "manifest.json", "checkpoints"
FORMAT = 2
_STEP = re.compile(r"step-(\d{8,})")


class Unusable(Exception):
    """This checkpoint is partial or damaged; says which part and why."""


@dataclass(frozen=True)
class Part:
    """A file of a checkpoint as its manifest lists it; `size` in bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What makes a checkpoint complete. `settings` is the hash of the fixed settings, `eval_loss` that of the very
    step, None without an evaluation there."""

    step: int
    settings: str
    eval_loss: float | None
    parts: tuple[Part, ...]

    def content(self) -> bytes:
        """The file: one line of JSON that ends with its own SHA-256, so that any changed bit shows."""
        values = {
            "format": FORMAT,
            "step": self.step,
            "settings": self.settings,
            "eval_loss": self.eval_loss,
            "parts": {part.name: {"bytes": part.size, "sha256": part.sha256} for part in self.parts},
        }
        return (json.dumps({**values, "sha256": _sha256(json.dumps(values).encode())}) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes) -> "Manifest":
        """The manifest that a file holds.

        Raises:
            Unusable: the file is damaged.
            OutputError: another version of this package wrote it.
        """
        try:
            values = json.loads(content)
            known = values["format"]
            parts = tuple(Part(name, about["bytes"], about["sha256"]) for name, about in values["parts"].items())
            found = cls(values["step"], values["settings"], values["eval_loss"], parts)
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise Unusable(f"{MANIFEST} is damaged ({type(fault).__name__})") from fault
        if known != FORMAT and _consistent(values, content):
            raise OutputError(f"a checkpoint there has format {known}, this version reads {FORMAT}. Use that version")
        if found.content() != content:
            raise Unusable(f"{MANIFEST} is damaged (its SHA-256 differs)")
        return found


def part_of(kind: str, content: bytes) -> Part:
    """The part for a content; `kind` is its name with an ending, into which the content's hash comes."""
    digest = _sha256(content)
    stem, dot, ending = kind.partition(".")
    return Part(f"{stem}-{digest[:16]}{dot}{ending}", len(content), digest)


class Checkpoints:
    """All checkpoints of a run.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Store):
        self.store = run.child(FOLDER)

    def steps(self) -> list[int]:
        """Steps with anything in their folder, complete or not, the newest first."""
        found = (_STEP.fullmatch(name) for name in self.store.names(folders=True))
        steps = sorted((int(match[1]) for match in found if match), reverse=True)
        # some object stores show a folder for a while after its last file
        return [step for step in steps if self.folder(step).names()]

    def folder(self, step: int) -> Store:
        """Where the checkpoint of a step lies."""
        return self.store.child(f"step-{step:08d}")

    def write(self, step: int, kind: str, content: bytes) -> Part:
        """Write a part; how it is listed in the manifest."""
        part = part_of(kind, content)
        self.folder(step).write(part.name, content)
        return part

    def publish(self, manifest: Manifest, replace: bool = False, conditional: bool = True) -> bool:
        """Make a checkpoint complete; False when another writer's is there already. What a dead writer left goes.

        Args:
            replace: what is there was found unusable.
            conditional: have the storage decide between writers that race; not on storage that cannot.
        """
        folder, content = self.folder(manifest.step), manifest.content()
        if replace:
            folder.remove(MANIFEST, missing_ok=True)
        if conditional:
            made = folder.create(MANIFEST, content)
        elif made := not folder.exists(MANIFEST):
            folder.write(MANIFEST, content)
        if not made and folder.read(MANIFEST) != content:
            return False
        listed = {part.name for part in manifest.parts} | {MANIFEST}
        for name in folder.names():
            if name not in listed and not name.endswith(".part"):  # a draft, of somebody who writes now
                folder.remove(name, missing_ok=True)
        return True

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            Unusable: there is none, or it is damaged.
        """
        try:
            content = self.folder(step).read(MANIFEST)
        except FileNotFoundError as fault:
            raise Unusable(f"it has no {MANIFEST}: whoever wrote it ended before") from fault
        found = Manifest.parse(content)
        if found.step != step:
            raise Unusable(f"{MANIFEST} is that of step {found.step}")
        return found

    def read(self, step: int, part: Part) -> bytes:
        """A part's content, verified.

        Raises:
            Unusable: it is missing, or differs from what the manifest lists.
        """
        try:
            content = self.folder(step).read(part.name)
        except FileNotFoundError as fault:
            raise Unusable(f"{part.name} is missing") from fault
        if len(content) != part.size:
            raise Unusable(f"{part.name} has {len(content)} bytes, expected {part.size}")
        if _sha256(content) != part.sha256:
            raise Unusable(f"{part.name} is damaged (its SHA-256 differs)")
        return content

    def discard(self, step: int) -> None:
        """Remove a checkpoint, its manifest first, so that it is never complete with a part missing."""
        folder = self.folder(step)
        for name in sorted(folder.names(), key=lambda name: name != MANIFEST):
            folder.remove(name, missing_ok=True)
        if folder.is_local:
            with suppress(FileNotFoundError):
                Path(folder.root).rmdir()

    def retain(self, keep: int, best: bool, unusable: Collection[int] = ()) -> None:
        """Remove all but the `keep` newest complete ones (and the one of the lowest evaluation loss), and what is
        incomplete and older than the newest.

        Args:
            unusable: steps whose parts are known not to be what their manifest says.
        """
        complete: dict[int, Manifest] = {}
        for step in self.steps():
            if step in unusable:
                continue
            try:
                complete[step] = self.manifest(step)
            except Unusable:
                continue
        kept = set(sorted(complete, reverse=True)[:keep])
        if best:
            kept |= set(_best(complete.values()))
        for step in self.steps():
            if complete and step not in kept and step < max(complete):
                self.discard(step)


def _best(manifests: Iterable[Manifest]) -> list[int]:
    judged = [(one.eval_loss, one.step) for one in manifests if one.eval_loss is not None]
    return [min(judged)[1]] if judged else []


def _consistent(values: Mapping[str, Any], content: bytes) -> bool:
    """Whether a manifest of any format holds its own SHA-256."""
    body = {name: value for name, value in values.items() if name != "sha256"}
    return values.get("sha256") == _sha256(json.dumps(body).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
