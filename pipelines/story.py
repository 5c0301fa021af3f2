"""From the records of runs to what a model card says: who made an export, how, at what price."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from compressor.artifact import MANIFEST, read_manifest
from compressor.errors import ArtifactError, PublishError
from compressor.publish.card import Step, Story
from compressor.publish.origin import Origin, origin
from compressor.sources import ModelSource
from pipelines import table
from pipelines.config import VERBS, methods
from pipelines.runs import read_run

Record = dict[str, Any]


def find_export(name: str, store: Path) -> Path:
    """The export that `name` means: its folder, or the run that made it.

    Raises `ArtifactError` for a name that is neither, `PublishError` for a run without export.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / MANIFEST).is_file():
            return folder
        above = folder.resolve().parent
        hint = f"; give {above}" if (above / MANIFEST).is_file() else ""
        raise ArtifactError(f"{folder}: no {MANIFEST}, so no export{hint}")
    stages = read_run(name, store)["stages"]
    exports = [Path(stage["folder"]) for stage in stages if stage["verb"] == "export"]
    if not exports:
        raise PublishError(f"{name}: this run exported nothing; add an export stage and run again")
    return exports[-1]


def history(folder: Path, store: Path) -> list[Record]:
    """The records of the runs that made `folder`, the first foremost.

    A run may start from the result of another, copied elsewhere; its manifest leads back.
    Raises `PublishError` when no record knows the folder.
    """
    paths = sorted((store / "runs").glob("*.json"), key=lambda path: -path.stat().st_mtime)
    records: list[Record] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found: list[Record] = []
    key = read_manifest(folder).key
    while maker := next((r for r in records if _makes(r, key) and r not in found), None):
        found.insert(0, maker)
        path = maker["config"]["model"]["path"]
        if path is None:
            break
        try:
            key = read_manifest(Path(path).expanduser()).key
        except (ArtifactError, OSError):  # made by something else
            break
    if not found:
        raise PublishError(
            f"{folder}: no record under {store / 'runs'} knows what made it, so there is nothing "
            "to write on its card; give --store, or publish from where it was made"
        )
    return found


def tell(records: Sequence[Record], name: str, revision: str, known: Origin) -> Story:
    """What the card says; what the user knows of the source (`known`) counts first."""
    found = origin(ModelSource.model_validate(records[0]["config"]["model"]))
    said = {key: value for key, value in dataclasses.asdict(known).items() if value}
    last = records[-1]
    healed = table.healing(last)
    return Story(
        name=name,
        revision=revision,
        origin=dataclasses.replace(found, **said),
        steps=[step for record in records for step in _steps(record)],
        table=table.markdown(last) if table.rows(last) else "",
        notes=[table.protocol(last), *([healed] if healed else [])],
        rebuild={f"{record['name']}.yaml": configuration(record) for record in records},
    )


def configuration(record: Record) -> str:
    """The YAML that makes a run again, every default spelt out.

    Paths lose their folders: they would tell of the machine, and mean nothing on another.
    """
    tree = {k: _public(v) for k, v in record["config"].items() if k != "stages"}
    tree["stages"] = [
        {verb: body if verb == "score" else {"method": name, **body[name]}}
        for stage in record["config"]["stages"]
        for verb, body in stage.items()
        for name in list(body)[:1]
    ]
    text = io.StringIO()
    YAML().dump(tree, text)
    return text.getvalue()


def _makes(record: Record, key: str) -> bool:
    return any(stage["key"] == key for stage in record["stages"])


def _steps(record: Record) -> list[Step]:
    """The stages of a run without its inputs and its measurements."""
    return [
        Step(stage["verb"], stage["method"], _sources(stage), _outcome(stage["metrics"]))
        for stage in record["stages"]
        if stage["verb"] in VERBS
    ]


def _sources(stage: Record) -> str:
    rows = methods(stage["verb"])
    names = stage["method"].split("+")
    return "; ".join(dict.fromkeys(rows[name].source for name in names if name in rows))


def _outcome(metrics: dict[str, Any]) -> str:
    """The figures of a stage that fit on a line."""
    said = []
    for name, value in metrics.items():
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if isinstance(value, float):
            value = f"{value:.4g}"
        if isinstance(value, str | int) and value != "":
            said.append(f"{name.replace('_', ' ')} {value}")
    return "; ".join(said)


def _public(value: Any, key: str = "") -> Any:
    """A part of a configuration without its empty keys and without folders in paths."""
    if isinstance(value, dict):
        return {k: _public(v, k) for k, v in value.items() if v is not None}
    return Path(value).name if key == "path" else value
