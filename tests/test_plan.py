"""Plans are pure: order, inputs and keys follow from the configuration and the fingerprints."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.errors import ConfigError
from pipelines.config import parse
from pipelines.plan import Stage, plan

PINS = {
    "model": "sha256:m",
    "evaluation": "sha256:t",
    "calibration": "sha256:t",
    "healing": "sha256:t",
}
ROLE = {"windows": 4, "length": 32}


def tree(**changes: Any) -> dict[str, Any]:
    source = {"path": "corpus.jsonl", "field": "text"}
    roles = dict.fromkeys(("evaluation", "calibration", "healing"), ROLE)
    return {
        "name": "p",
        "model": {"path": "model"},
        "text": {"source": source, **roles},
        "stages": [
            {"score": ["angular_distance"]},
            {"select": {"n": 2}},
            "prune",
            {"heal": {"method": "lora"}},
            "quantize",
            "export",
        ],
    } | changes


def stages(**changes: Any) -> list[Stage]:
    return plan(parse(tree(**changes), "test"), PINS)


def changed(before: list[Stage], after: list[Stage]) -> list[str]:
    """Labels whose key differs."""
    keys = {stage.label: stage.key for stage in before}
    return [stage.label for stage in after if keys.get(stage.label) != stage.key]


def test_order_and_labels() -> None:
    assert [stage.label for stage in stages()] == [
        "model", "text evaluation", "text calibration", "text healing", "evaluate original",
        "score", "select", "prune", "evaluate prune", "heal", "evaluate heal",
        "quantize", "evaluate quantize", "export",
    ]  # fmt: skip


def test_inputs() -> None:
    by_label = {stage.label: stage for stage in stages()}
    names = {label: sorted(stage.inputs) for label, stage in by_label.items()}
    assert names["evaluate original"] == ["checkpoint", "evaluation"]
    assert names["evaluate heal"] == ["checkpoint", "evaluation", "original", "reference"]
    assert by_label["evaluate heal"].inputs["checkpoint"] is by_label["heal"]
    assert by_label["quantize"].inputs["checkpoint"] is by_label["heal"]
    assert by_label["export"].inputs["checkpoint"] is by_label["quantize"]
    assert names["text healing"] == ["calibration", "evaluation", "tokenizer"]


def test_keys_are_stable_and_pinned() -> None:
    """A golden key: it moves when the format of keys does, and caches with it."""
    assert [s.key for s in stages()] == [s.key for s in stages()]
    assert stages()[0].key.startswith("461f280024108fed")


def test_only_the_content_of_sources_counts() -> None:
    assert changed(stages(), stages(model={"path": "elsewhere"})) == []
    assert changed(stages(), stages(name="q", device="cpu", batch_size=2)) == []
    other = plan(parse(tree(), "test"), PINS | {"model": "sha256:other"})
    assert len(changed(stages(), other)) == 14


def test_a_parameter_reaches_only_what_depends_on_it() -> None:
    last = [*tree()["stages"][:4], {"quantize": {"bits": 8}}, "export"]
    assert changed(stages(), stages(stages=last)) == ["quantize", "evaluate quantize", "export"]
    text = tree()["text"] | {"healing": {"windows": 5, "length": 32}}
    assert changed(stages(), stages(text=text)) == [
        "text healing", "heal", "evaluate heal", "quantize", "evaluate quantize", "export",
    ]  # fmt: skip
    assert changed(stages(), stages(evaluate={"speed": False})) == [
        "evaluate original", "evaluate prune", "evaluate heal", "evaluate quantize", "export",
    ]  # fmt: skip


def test_stages_repeat() -> None:
    twice = [{"select": {"method": "fixed", "blocks": [1]}}, "prune"] * 2
    labels = [stage.label for stage in stages(stages=twice)]
    assert labels[5:] == [
        "select", "prune", "evaluate prune", "select 2", "prune 2", "evaluate prune 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": ["prune"]}, "'prune' needs selection"),
        ({"text": {}}, "needs calibration, which nothing before it makes; add text.calibration"),
        ({"text": {"evaluation": ROLE}}, r"text\.evaluation: no source here"),
    ],
)
def test_missing_inputs_are_explained(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stages(**changes)
