"""Find a source and pin it by content, without torch: what `plan` needs to know every key."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypeVar

from compressor.errors import SourceError
from compressor.sources import ModelSource, TextSource, package_file, remembered_digest

S = TypeVar("S", ModelSource, TextSource)

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""What is taken from a model folder: no pickles, no code."""
NOT_WANTED = "manifest.json"
"""What made the folder is not what it is; linked, it would be overwritten by the copy's own."""


def locate_model(source: ModelSource) -> Path:
    """The folder or .gguf file of a model; a hub id is downloaded into the hub's own cache."""
    if source.hub:
        return _download(source.hub, source.revision)
    return _local(source.path, source.package, source.file, "a hub id goes under model.hub")


def locate_text(source: TextSource) -> Path:
    """The file of a text that is not a hub data set."""
    return _local(source.path, source.package, source.file, "a hub data set goes under dataset")


def fingerprint_model(source: ModelSource) -> str:
    """What pins a model: the hub commit, or the hash of its files."""
    if source.hub:
        return f"hub:{_commit('model', source.hub, source.revision)}"
    path = locate_model(source)
    if path.is_file():
        return f"sha256:{remembered_digest(path)}"
    listing = "".join(f"{p.name} {remembered_digest(p)}\n" for p in model_files(path))
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def fingerprint_folder(folder: Path) -> str:
    """What pins a model folder here: the hash of its files."""
    return fingerprint_model(ModelSource(path=str(folder)))


def fingerprint_text(source: TextSource) -> str:
    """What pins a text: the hub commit, or the hash of its file."""
    if source.dataset:
        return f"hub:{_commit('dataset', source.dataset, source.revision)}"
    return f"sha256:{remembered_digest(locate_text(source))}"


def pinned(source: S, fingerprint: str) -> S:
    """The source at the hub commit that its fingerprint names, wherever the branch is by now."""
    kind, _, commit = fingerprint.partition(":")
    return source.model_copy(update={"revision": commit}) if kind == "hub" else source


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that count, sorted."""
    found = {p for pattern in WANTED for p in folder.glob(pattern)}
    return sorted(p for p in found if p.name != NOT_WANTED)


def _local(path: str | None, package: str | None, file: str | None, hint: str) -> Path:
    if package and file:
        return package_file(package, file)
    found = Path(path or "").expanduser().resolve()
    if not found.exists():
        raise SourceError(f"{path}: no such file or folder ({hint})")
    return found


def _download(hub: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _unreachable(hub, error) from error


def _commit(kind: str, hub: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if kind == "model" and os.environ.get("HF_HUB_OFFLINE") == "1":
        return _download(hub, revision).name
    try:
        return str(HfApi().repo_info(hub, revision=revision, repo_type=kind).sha)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _unreachable(hub, error) from error


def _unreachable(hub: str, error: Exception) -> SourceError:
    reason = str(error).splitlines()[0]
    return SourceError(
        f"hub repository {hub!r} cannot be fetched ({reason}); check the name, the network and "
        "the token (hf auth login), or give a local path"
    )
