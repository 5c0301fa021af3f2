"""Artifacts: folders named by what made them, committed whole or not at all.

A key is the sha256 of (format, stage, method, version, parameters, parent keys), so it
is known before anything runs. Files are written into `.tmp-<key>-<pid>`, synced, the
manifest last, and the folder is renamed into place: no manifest, no artifact.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.errors import ArtifactError
from compressor.sources import file_digest, remembered_digest

FORMAT = 1
MANIFEST = "manifest.json"
Status = Literal["missing", "cached", "damaged"]


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, what made it and what it holds.

    Attributes:
        params: resolved parameters, defaults included.
        parents: role -> key of the artifacts it was made from.
        metrics: results worth a table; measured speeds live only here.
        seconds, peak_bytes: wall time and peak resident memory of the stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = FORMAT
    stage: str
    method: str
    version: int
    key: str
    params: dict[str, Any]
    parents: dict[str, str]
    files: list[FileEntry] = []
    libraries: dict[str, str] = {}
    device: str = "cpu"
    threads: int = 0
    metrics: dict[str, Any] = {}
    seconds: float = 0.0
    peak_bytes: int = 0


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(
    stage: str, method: str, version: int, params: dict[str, Any], parents: dict[str, str]
) -> str:
    """Sha256 over everything that decides a stage's output, as 64 hex digits."""
    identity = [FORMAT, stage, method, version, params, parents]
    return hashlib.sha256(canonical(identity).encode()).hexdigest()


class Store:
    """The folder of all artifacts, `<stage>-<first 16 digits of the key>` each."""

    def __init__(self, root: str | Path) -> None:
        """Use `root`; it is created when something is written."""
        self.root = Path(root)

    def folder(self, stage: str, key: str) -> Path:
        """Where the artifact of this key is, or will be."""
        return self.root / f"{stage}-{key[:16]}"

    def manifest(self, stage: str, key: str) -> Manifest:
        """Read the manifest of an artifact that is there."""
        return read_manifest(self.folder(stage, key))

    def status(self, stage: str, key: str) -> Status:
        """Whether an artifact is there with all its files in their full length."""
        folder = self.folder(stage, key)
        if not folder.exists():
            return "missing"
        try:
            manifest = read_manifest(folder)
        except ArtifactError:
            return "damaged"
        whole = all(_size(folder / f.path) == f.size_bytes for f in manifest.files)
        return "cached" if whole and manifest.key == key else "damaged"

    def set_aside(self, stage: str, key: str) -> Path:
        """Rename a damaged artifact out of the way and return its new path."""
        folder = self.folder(stage, key)
        aside = folder.with_name(f"{folder.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(folder, aside)
        return aside

    def work(self, stage: str, key: str) -> Path:
        """The stage's own folder for resuming; it survives a crash, not a commit."""
        return self.root / f".work-{stage}-{key[:16]}"

    @contextmanager
    def draft(self, stage: str, key: str) -> Iterator[Path]:
        """Yield an empty folder to write into; it is removed unless committed.

        Raises `ArtifactError` when another process is making the same artifact.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".lock-{key[:16]}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArtifactError(
                    f"{self.folder(stage, key)}: another process is making this artifact; "
                    "wait for it, or stop it"
                ) from None
            for stale in self.root.glob(f".tmp-{key[:16]}-*"):
                shutil.rmtree(stale)
            self._settle(self.folder(stage, key), key)
            draft = self.root / f".tmp-{key[:16]}-{os.getpid()}"
            draft.mkdir()
            try:
                yield draft
            finally:
                shutil.rmtree(draft, ignore_errors=True)
                Path(lock.name).unlink(missing_ok=True)

    def commit(self, draft: Path, manifest: Manifest) -> Path:
        """Hash and sync every file, write the manifest last and move the draft into place."""
        # An imported artifact's own manifest is a link here, and must not be written through.
        (draft / MANIFEST).unlink(missing_ok=True)
        paths = sorted(p for p in draft.rglob("*") if p.is_file())
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_sealed, paths)
            files = [
                FileEntry(
                    path=str(p.relative_to(draft)), size_bytes=p.stat().st_size, sha256=digest
                )
                for p, digest in zip(paths, digests, strict=True)
            ]
        text = manifest.model_copy(update={"files": files}).model_dump_json(indent=1)
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")
        sync(draft / MANIFEST)
        target = self.folder(manifest.stage, manifest.key)
        if target.exists():
            os.replace(target, self._replaced(manifest.key))
        os.replace(draft, target)
        sync(self.root)
        self._settle(target, manifest.key)
        shutil.rmtree(self.work(manifest.stage, manifest.key), ignore_errors=True)
        return target

    def _replaced(self, key: str) -> Path:
        """Where an artifact is while another takes its place."""
        return self.root / f".old-{key[:16]}"

    def _settle(self, target: Path, key: str) -> None:
        """Remove what was replaced, or put it back where a crash kept the new one from coming."""
        old = self._replaced(key)
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`; raises `ArtifactError` when there is none or it is damaged."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no {MANIFEST}, so this is not an artifact") from None
    except ValidationError as error:
        raise ArtifactError(f"{folder / MANIFEST}: damaged ({error.errors()[0]['msg']})") from error


def verify(folder: Path) -> list[str]:
    """Re-hash an artifact and return what is wrong, a line each; empty when all is well."""
    faults = []
    for entry in read_manifest(folder).files:
        path = folder / entry.path
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif file_digest(path) != entry.sha256:
            faults.append(f"{path}: its sha256 is not the one in the manifest")
    return faults


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _sealed(path: Path) -> str:
    """The sha256 of a file that is then on the disk; a link's is that which pinned its source."""
    if path.is_symlink():
        return remembered_digest(path)
    digest = file_digest(path)
    sync(path)
    return digest


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
