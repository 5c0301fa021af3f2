"""Plans are pure: order, inputs and keys follow from the configuration and the fingerprints."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import ConfigError
from pipelines.config import methods, parse
from pipelines.plan import VERSIONS, Stage, plan

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


def test_keys_are_the_same_in_every_process() -> None:
    """Sets iterate in another order under another hash seed; keys must not."""
    code = "from tests.test_plan import stages; print(*(s.key for s in stages()), sep='\\n')"
    for seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert told == [s.key for s in stages()]


def test_only_the_content_of_sources_counts() -> None:
    assert changed(stages(), stages(model={"path": "elsewhere"})) == []
    assert changed(stages(), stages(name="q", device="cpu", batch_size=2)) == []
    text = tree()["text"]
    moved = text | {"source": {"path": "elsewhere.jsonl", "field": "text"}}
    assert changed(stages(), stages(text=moved)) == []
    other = text | {"source": {"path": "corpus.jsonl", "field": "body"}}
    assert "text evaluation" in changed(stages(), stages(text=other))
    repinned = plan(parse(tree(), "test"), PINS | {"model": "sha256:other"})
    assert len(changed(stages(), repinned)) == 14
    retold = plan(parse(tree(), "test"), PINS | {"healing": "sha256:other"})
    assert changed(stages(), retold)[:2] == ["text healing", "heal"]


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


def test_the_seed_reaches_texts_and_healing() -> None:
    roles = ["text evaluation", "text calibration", "text healing"]
    assert changed(stages(), stages(seed=1))[:3] == roles
    assert {s.label for s in stages() if "seed" in s.params} == {*roles, "heal"}
    fixed = {"text": {}, "stages": [{"select": {"method": "fixed", "blocks": [1]}}, "prune"]}
    assert changed(stages(**fixed), stages(**fixed, seed=1)) == []


def test_a_version_reaches_only_what_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stages()
    table = methods("quantize")
    name = next(iter(table))
    newer = dataclasses.replace(table[name], version=table[name].version + 1)
    monkeypatch.setitem(table, name, newer)
    assert changed(before, stages()) == ["quantize", "evaluate quantize", "export"]


@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_costs_follow_the_quantizers_they_are_measured_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [{"allocate": {"average_bits": 3}}]
    before, table = stages(stages=asked), methods("quantize")
    newer = dataclasses.replace(table[name], version=table[name].version + 1)
    monkeypatch.setitem(table, name, newer)
    assert changed(before, stages(stages=asked)) == ["costs", "allocate"]


def test_stages_without_a_method_table_have_versions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stages()
    monkeypatch.setitem(VERSIONS, "text", VERSIONS["text"] + 1)
    assert changed(before, stages())[:2] == ["text evaluation", "text calibration"]
    before = stages()
    monkeypatch.setitem(VERSIONS, "model", VERSIONS["model"] + 1)
    assert len(changed(before, stages())) == len(before)


def test_the_order_of_scores_does_not_count() -> None:
    one, two = (
        stages(stages=[{"score": names}])
        for names in (["lamp", "block_influence"], ["block_influence", "lamp"])
    )
    assert changed(one, two) == []


def test_a_selection_reads_scores_only_where_it_goes_by_one() -> None:
    """One more score must not run a search again that looks at none."""
    for asked, moved in (
        ({"method": "sleb", "n": 2}, []),
        ({"method": "even", "n": 2}, []),
        ({"method": "contiguous", "n": 2}, ["select"]),
        ({"method": "swap", "n": 2}, ["select"]),
    ):
        one, two = (
            stages(stages=[{"score": names}, {"select": asked}])
            for names in (["lamp"], ["lamp", "zd"])
        )
        assert changed(one, two) == ["score", *moved]
        assert ("scores" in one[-1].inputs) == bool(moved)


def test_scores_and_selections_are_spent_by_pruning() -> None:
    """Block numbers of the model before do not fit the model after."""
    scored = [{"score": ["lamp"]}, {"select": {"n": 1}}, "prune"]
    with pytest.raises(ConfigError, match="'prune' needs selection"):
        stages(stages=[*scored, "prune"])
    again = {s.label: s for s in stages(stages=[*scored, {"select": {"n": 1}}, "prune"])}
    assert sorted(again["select"].inputs) == ["checkpoint", "scores"]
    assert sorted(again["select 2"].inputs) == ["checkpoint"]


def test_widths_are_spent_by_the_stage_that_takes_them() -> None:
    chosen = [{"score": ["zd"]}, {"allocate": {"method": "importance", "average_bits": 3}}]
    by_label = {s.label: s for s in stages(stages=[*chosen, "quantize"])}
    read = ["calibration", "checkpoint", "scores"]
    assert sorted(by_label["costs"].inputs) == read
    assert sorted(by_label["allocate"].inputs) == sorted([*read, "costs"])
    assert by_label["quantize"].inputs["bits"] is by_label["allocate"]
    pruned = [*chosen, {"prune": {"method": "magnitude"}}, "quantize"]
    assert "bits" not in {s.label: s for s in stages(stages=pruned)}["quantize"].inputs
    with pytest.raises(ConfigError, match=r"'allocate' needs scores, .* put a score stage"):
        stages(stages=chosen[1:])
    own = {"quantize": {"scheme": {"linears": {"*": 4}}}}
    assert "bits" not in {s.label: s for s in stages(stages=[own])}["quantize"].inputs
    with pytest.raises(ConfigError, match="remove one of the two"):
        stages(stages=[*chosen, own])


def test_budgets_share_their_costs() -> None:
    def asked(**given: object) -> list[Stage]:
        return stages(stages=[{"allocate": {"group_size": 64, **given}}])

    def key(verb: str, found: list[Stage]) -> str:
        return next(s.key for s in found if s.verb == verb)

    three = asked(average_bits=3)
    for same in (asked(average_bits=4), asked(max_bytes="90MB"), asked(average_bits=3, refine=9)):
        assert key("costs", same) == key("costs", three)
        assert key("allocate", same) != key("allocate", three)
    for other in (asked(average_bits=3, widths=[2, 4]), asked(average_bits=3, seed=1)):
        assert key("costs", other) != key("costs", three)


def test_stages_repeat() -> None:
    twice = [{"select": {"method": "fixed", "blocks": [1]}}, "prune"] * 2
    labels = [stage.label for stage in stages(stages=twice)]
    assert labels[5:] == [
        "select", "prune", "evaluate prune", "select 2", "prune 2", "evaluate prune 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "inputs"),
    [
        ("magnitude", ["checkpoint"]),
        ("wanda", ["calibration", "checkpoint"]),
        ("slimgpt", ["calibration", "checkpoint"]),
    ],
)
def test_pruning_without_a_selection_needs_none(method: str, inputs: list[str]) -> None:
    by_label = {stage.label: stage for stage in stages(stages=[{"prune": {"method": method}}])}
    assert sorted(by_label["prune"].inputs) == inputs
    assert "evaluate prune" in by_label


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
