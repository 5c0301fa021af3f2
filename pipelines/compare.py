"""Compare ways to choose what goes: every score with every selection, at one budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from compressor.artifact import Store
from compressor.errors import ConfigError, NotApplicable, SelectionError, did_you_mean
from compressor.records import Scores, Selection
from pipelines.config import RunConfig, StageConfig, methods
from pipelines.leaderboard import describe
from pipelines.plan import VERSIONS, Stage, plan_choices
from pipelines.run import OnEvent, ensure, pin

FORMAT = 1
PARTS = ("block", "attention", "ffn", "sublayers")
_OF_SUBLAYERS = ("joint", "skrr")
_TRIED = {
    "drop_blocks", "drop_attention", "drop_ffn", "reuse_attention", "reuse_ffn", "num_blocks",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One way to choose: a selection, the score it goes by (if it goes by one), its settings."""

    selection: str
    score: str | None
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Its name in the leaderboard."""
        return f"{self.selection} / {self.score}" if self.score else self.selection

    @property
    def stage(self) -> StageConfig:
        """The select stage that makes it."""
        params = methods("select")[self.selection].params
        return StageConfig("select", {self.selection: params.model_validate(self.settings)})


def choices(
    selections: Iterable[str], scores: Iterable[str], budget: int, part: str
) -> list[Choice]:
    """Every selection with every score it can go by; `budget` counts what `part` names.

    `selection/score` stands for that pair alone. Raises `ConfigError` for a selection that is
    unknown or cannot remove such parts.
    """
    table, found = methods("select"), []
    for word in selections:
        name, _, only = (piece.strip() for piece in word.partition("/"))
        if name not in table:
            raise ConfigError(f"no selection {name!r}{did_you_mean(name, table)}")
        fields = table[name].params.model_fields
        if "n" not in fields or part not in _parts(name, fields):
            raise ConfigError(f"selection {name!r} cannot be asked for {budget} x {part}")
        settings = {"n": budget} | ({"part": part} if "part" in fields else {})
        if "score" not in fields:
            found.append(Choice(name, None, settings))
            continue
        for score in [only] if only else scores:
            found.append(Choice(name, score, settings | {"score": score}))
    return found


def _parts(name: str, fields: Mapping[str, FieldInfo]) -> tuple[str, ...]:
    """What a selection can remove."""
    if "part" in fields:
        return get_args(fields["part"].annotation)
    return ("sublayers",) if name in _OF_SUBLAYERS else ("block",)


def compare(
    config: RunConfig, store: Store, asked: list[Choice], on_event: OnEvent
) -> dict[str, Any]:
    """Make every choice and try it on held-out text; what is stored is not done again.

    Choices that come to the same parts are tried once. A choice that cannot be made is listed
    with its reason, and the others go on. Returns the leaderboard, the least loss first.
    Raises `SelectionError` when not one could be made.
    """
    shared, selects = plan_choices(config, pin(config), {c.label: c.stage for c in asked})
    inputs = {stage.label: stage for stage in shared}
    unavailable, score_seconds = _shared(shared, config, store, on_event)

    def tried(selection: Selection) -> dict[str, Any]:
        stage = _trial(selection, inputs)
        ensure(stage, config, store, on_event)
        return store.manifest(stage.verb, stage.key).metrics

    made: list[tuple[Choice, Selection]] = []
    failed: list[dict[str, str]] = []
    for choice in asked:
        select = selects[choice.label]
        try:
            if choice.score in unavailable:
                raise NotApplicable(unavailable[choice.score])
            ensure(select, config, store, on_event)
        except (SelectionError, NotApplicable) as error:
            failed.append({"choice": choice.label, "reason": str(error)})
            continue
        folder = store.folder(select.verb, select.key)
        made.append((choice, Selection.load(folder / "selection.json")))
    if not made:
        raise SelectionError(f"no choice could be made ({_by_reason(failed)})")
    num_blocks = made[0][1].num_blocks
    original = tried(Selection(num_blocks=num_blocks))
    rows = []
    for choice, selection in made:
        select, quality = selects[choice.label], tried(selection)
        rows.append(
            {
                "choice": choice.label,
                "selection": choice.selection,
                "score": choice.score,
                **quality,
                "added": quality["loss"] - original["loss"],
                "evaluations": selection.evaluations,
                "seconds": store.manifest(select.verb, select.key).seconds,
                "parts": selection.model_dump(mode="json", include=_TRIED),
            }
        )
    return {
        "format": FORMAT,
        "name": config.head.name,
        "num_blocks": num_blocks,
        "original": original,
        "rows": sorted(rows, key=lambda row: row["loss"]),
        "failed": failed,
        "score_seconds": score_seconds,
    }


def _by_reason(failed: Iterable[Mapping[str, str]]) -> str:
    """Every reason once, behind the choices that it stops."""
    stopped: dict[str, list[str]] = {}
    for row in failed:
        stopped.setdefault(row["reason"], []).append(row["choice"])
    return "; ".join(f"{', '.join(choices)}: {why}" for why, choices in stopped.items())


def _shared(
    stages: Iterable[Stage], config: RunConfig, store: Store, on_event: OnEvent
) -> tuple[dict[str, str], float]:
    """Build what all choices read: why which score cannot be given, and what scores took."""
    unavailable, seconds = {}, 0.0
    for stage in stages:
        try:
            ensure(stage, config, store, on_event)
        except NotApplicable as error:
            if stage.verb != "score":
                raise
            unavailable = dict.fromkeys(stage.methods, str(error))  # none of them
            continue
        if stage.verb == "score":
            scores = Scores.load(store.folder(stage.verb, stage.key) / "scores.json")
            unavailable = scores.unavailable
            seconds = store.manifest(stage.verb, stage.key).seconds
    return unavailable, seconds


def _trial(selection: Selection, inputs: Mapping[str, Stage]) -> Stage:
    """The stage that tries a selection: keyed by its parts alone, however they were chosen."""
    return Stage(
        "trial",
        f"try {describe(selection)}",
        "quality",
        selection.model_dump(mode="json", include=_TRIED),
        {"checkpoint": inputs["model"], "evaluation": inputs["text evaluation"]},
        version=VERSIONS["trial"],
    )
