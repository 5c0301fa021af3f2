"""What is published: the files of an export, once its gate and its hashes are checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.artifact import Manifest, read_manifest, verify
from compressor.errors import PublishError
from compressor.publish import Item

EXPORT = "compress export MODEL -o FOLDER"


@dataclass(frozen=True)
class Bundle:
    """An export that may be published.

    Attributes:
        manifest: what made it.
        items: its files as they will be laid out: the checkpoint on top, the graph in `onnx/`.
        parity: the gate's report.
    """

    folder: Path
    manifest: Manifest
    items: list[Item]
    parity: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json, or the graph's where there is no checkpoint."""
        path = self.local("config.json") or self.local("onnx/config.json")
        found: dict[str, Any] = json.loads(path.read_text()) if path else {}
        return found

    def local(self, path: str) -> Path | None:
        """The file here that will be `path` there."""
        sources = {item.path: item.source for item in self.items}
        found = sources.get(path)
        return found if isinstance(found, Path) else None


def open_bundle(folder: Path) -> Bundle:
    """Check an export and lay out its files; every file is hashed.

    Raises `PublishError` for what is not an export or did not pass the parity gate, and for
    files that are not what the export wrote.
    """
    manifest = read_manifest(folder)
    if manifest.stage != "export":
        raise PublishError(
            f"{folder}: made by {manifest.stage!r}, and only exports are published, because their "
            f"formats are compared with each other; run: {EXPORT}"
        )
    parity = manifest.metrics.get("onnx", {}).get("parity")
    if not parity:
        raise PublishError(
            f"{folder}: exported as {' and '.join(manifest.metrics['formats'])} only, so the "
            f"parity gate compared nothing; run: {EXPORT} (with both formats)"
        )
    if faults := verify(folder):
        raise PublishError(
            f"{len(faults)} file(s) are not what was exported: {'; '.join(faults)}; delete the "
            "folder and export again"
        )
    items = [
        Item(e.path.removeprefix("safetensors/"), folder / e.path, e.size_bytes, e.sha256)
        for e in manifest.files
    ]
    return Bundle(folder, manifest, items, parity)
