"""`compress compare`: the leaderboard of ways to choose, on the user's own model and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from compressor import progress
from compressor.artifact import Store
from compressor.errors import ConfigError, MissingDependency
from pipelines import compare as contest
from pipelines import config as configuration
from pipelines import display, leaderboard
from pipelines.commands import JSON, QUIET, SET, STORE
from pipelines.run import Event
from pipelines.verbs import MODEL, TEXT, model_source, refuse_existing, role_source, run_name

DEFAULTS = {
    "block": ("angular_distance,block_influence,lamp", "contiguous,lowest,simple"),
    "attention": ("sublayer_cosine,attention_rank,taylor", "lowest"),
    "ffn": ("sublayer_cosine,ffn_saturation,taylor", "lowest"),
    "sublayers": ("sublayer_cosine,taylor", "joint"),
}
"""Scores and selections that a comparison of such parts takes where none are named."""

_BLOCK = DEFAULTS["block"]

_YAML = (".yaml", ".yml")
_SETTINGS = {
    "held_out": "text.evaluation.windows",
    "windows": "text.calibration.windows",
    "length": "text.calibration.length",
    "text": "text.source.path",
    "field": "text.source.field",
}


@click.command()
@MODEL
@click.option("--budget", type=click.IntRange(min=1), required=True, help="How many parts go.")
@click.option(
    "--part", type=click.Choice(contest.PARTS), default="block", show_default=True,
    help="What a part is: a block, an attention, a feed-forward, or either of the two (sublayers).",
)  # fmt: skip
@click.option("--scores", help=f"Names, joined by commas [default of blocks: {_BLOCK[0]}].")
@click.option("--selections", help=f"Names, likewise [default of blocks: {_BLOCK[1]}].")
@click.option("--held-out", type=int, default=16, show_default=True, help="Windows to judge by.")
@TEXT[0]
@TEXT[1]
@TEXT[2]
@TEXT[3]
@SET
@click.option(
    "-o", "--out", type=click.Path(path_type=Path),
    help="Folder for leaderboard.json, leaderboard.md and leaderboard.png (must be new).",
)  # fmt: skip
@STORE
@JSON
@QUIET
def compare(
    model: str,
    budget: int,
    part: str,
    scores: str | None,
    selections: str | None,
    out: Path | None,
    store: Path,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Compare scores x selections at one budget: what each removes and what that costs.

    MODEL may also be a configuration (.yaml), whose model and text are used. Nothing is
    removed for it: the parts are bypassed, on held-out text that no choice has seen. What is
    stored is not done again, so an interrupted comparison goes on where it stopped.

    \b
    compress compare MODEL --budget 6 --text corpus.txt
    compress compare configs/demo.yaml --budget 6 --scores angular_distance,lamp \\
        --selections contiguous,lowest,sleb -o comparison
    """
    names, ways = (
        [name.strip() for name in (words or default).split(",")]
        for words, default in zip((scores, selections), DEFAULTS[part], strict=True)
    )
    asked = contest.choices(ways, names, budget, part)
    read = list(dict.fromkeys(choice.score for choice in asked if choice.score))
    if model.endswith(_YAML):
        _refuse_text_options(model)
    checked = configuration.parse(_tree(model, read, given), f"compress compare {model}")
    if out:
        refuse_existing(out)
    if not quiet:
        progress.install(display.Bars())

    def on_event(event: Event, stage: Any) -> None:
        if not quiet and event != "cached":
            display.announce(event, stage)

    board = contest.compare(checked, Store(store / "store"), asked, on_event)
    if out:
        _save(board, out)
    if as_json:
        click.echo(json.dumps(board, indent=1))
    elif quiet:
        click.echo(board["rows"][0]["choice"])
    else:
        leaderboard.show(board, display.stdout())


def _refuse_text_options(model: str) -> None:
    context = click.get_current_context()
    for name, setting in _SETTINGS.items():
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise ConfigError(
                f"{model} says what text is used, so --{name.replace('_', '-')} would do nothing; "
                f"write --set {setting}=..."
            )


def _tree(model: str, scores: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the shared stages: model, held-out and calibration text, scores."""
    tree: dict[str, Any] = {}
    if model.endswith(_YAML):
        tree = configuration.read(Path(model))
        if isinstance(tree.get("text"), dict):
            tree["text"].pop("healing", None)
    else:
        tree = {"model": model_source(model)}
        if not given["text"]:
            raise ConfigError("give --text: choices are made on one part of it, judged on another")
        calibration = role_source(given["text"], given["field"], given["windows"], given["length"])
        tree["text"] = {
            "calibration": calibration,
            "evaluation": calibration | {"windows": given["held_out"]},
        }
    tree["name"] = run_name("compare", model)
    tree["stages"] = [{"score": {name: {} for name in scores}}] if scores else []
    configuration.override(tree, given["overrides"])
    roles = tree.get("text")
    if not isinstance(roles, dict) or not roles.get("evaluation"):
        raise ConfigError(
            f"{model}: no text.evaluation, by which choices are judged; add it, such as "
            "evaluation: {windows: 16, length: 512} under text"
        )
    return tree


def _save(board: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True)
    text = json.dumps(board, indent=1) + "\n"
    (out / "leaderboard.json").write_text(text, encoding="utf-8")
    (out / "leaderboard.md").write_text(leaderboard.markdown(board), encoding="utf-8")
    try:
        leaderboard.plot(board, out / "leaderboard.png")
    except MissingDependency as error:
        click.echo(f"no picture: {error}", err=True)
    click.echo(f"written to {out}", err=True)
