"""`compress select`: from stored scores at once, or from a model by a run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compressor.errors import ConfigError
from compressor.records import Scores, Selection
from pipelines import config as configuration
from pipelines.commands import JSON, QUIET, STORE, execute
from pipelines.run import Options
from pipelines.verbs import TEXT, model_source, parameters, role_source, run_name

_FILE = "scores.json"


@click.command()
@click.argument("source")
@click.option("--scores", help="Of a model: compute these first; names joined by commas.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write; else printed.")
def select(source: str, scores: str | None, out: Path | None, **given: Any) -> None:
    """Choose the parts to remove, from scores or by a search.

    SOURCE is scores (a file, or the folder that holds it) or, for the searches, a model.

    \b
    compress select scores --method contiguous -n 6 -o selection.json
    compress select MODEL --method sleb -n 6 --text corpus.txt -o selection.json
    compress select MODEL --method swap -n 6 --scores block_influence --text corpus.txt
    """
    run = {name: given.pop(name) for name in ("store", "as_json", "quiet")}
    text = {name: given.pop(name) for name in ("text", "field", "windows", "length")}
    stage = {"select": {name: value for name, value in given.items() if value is not None}}
    stored = Path(source) / _FILE if (Path(source) / _FILE).is_file() else Path(source)
    if stored.suffix == ".json":
        chosen = _from_scores(stored, stage, scores)
    else:
        stages = [{"score": scores.split(",")}] if scores else []
        tree = {
            "name": run_name("select", source),
            "model": model_source(source),
            "text": {"calibration": role_source(**text)} if text["text"] else {},
            "stages": [*stages, stage],
        }
        checked = configuration.parse(tree, "compress select")
        record = execute(checked, run.pop("store"), Options(), **run)
        chosen = Selection.load(Path(record["stages"][-1]["folder"]) / "selection.json")
        if not out:
            return
    if out:
        chosen.save(out)
    click.echo(str(out) if out else chosen.model_dump_json(indent=1))


for _option in (*parameters("select", own=()), *TEXT, STORE, JSON, QUIET):
    select = _option(select)


def _from_scores(file: Path, stage: dict[str, Any], asked: str | None) -> Selection:
    tree = {"name": "select", "model": {"path": "."}, "stages": [stage]}
    ((name, params),) = configuration.parse(tree, "compress select").stages[0].methods.items()
    row = configuration.methods("select")[name]
    if row.needs or asked:
        what = f"method {name!r}" if row.needs else "--scores"
        raise ConfigError(f"compress select: {what} needs a model and --text, not stored scores")
    chosen: Selection = row.load()(Scores.load(file), **dict(params))
    return chosen
