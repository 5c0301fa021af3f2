"""The records of finished runs, `runs/<name>.json` (docs/formats.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.errors import ArtifactError, did_you_mean


def read_run(name: str, store: Path) -> dict[str, Any]:
    """The record of a run; raises `ArtifactError` with a name like it when there is none."""
    runs = store / "runs"
    path = runs / f"{name}.json"
    if not path.is_file():
        known = [each.stem for each in runs.glob("*.json")]
        raise ArtifactError(
            f"{name}: neither a folder nor a run in {runs}{did_you_mean(name, known)}"
        )
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
