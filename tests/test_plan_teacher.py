"""How a plan comes by a parent's outputs: one stage for all that ask for the same."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.errors import ConfigError
from pipelines.config import parse
from pipelines.plan import Stage, plan
from tests.test_plan import PINS, tree

CUT = [{"select": {"method": "fixed", "blocks": [1]}}, "prune"]


def stages(*healers: Any, first: list[Any] | None = None, **changes: Any) -> list[Stage]:
    wanted = [*(CUT if first is None else first), *({"heal": h} for h in healers)]
    return plan(parse(tree(stages=wanted, **changes), "test"), PINS | {"parent": "sha256:p"})


def one(found: list[Stage], label: str) -> Stage:
    (stage,) = (each for each in found if each.label == label)
    return stage


def distill(**own: Any) -> dict[str, Any]:
    return {"method": "distill", **own}


def test_the_stage_is_put_before_the_first_that_needs_it() -> None:
    labels = [s.label for s in stages({"method": "lora"}, distill())]
    assert labels[-5:] == ["heal", "evaluate heal", "teacher", "heal 2", "evaluate heal 2"]
    assert "teacher" not in [s.label for s in stages({"method": "lora"})]


def test_the_parent_is_what_the_first_prune_cut() -> None:
    found = stages(distill())
    assert one(found, "teacher").inputs["parent"] is one(found, "model")
    assert sorted(one(found, "heal").inputs) == ["checkpoint", "healing", "teacher"]
    corrected = stages(distill(), first=[{"heal": {"method": "lora"}}, *CUT, *CUT])
    assert one(corrected, "teacher").inputs["parent"] is one(corrected, "heal")


def test_its_key_is_that_of_parent_text_and_its_own_parameters() -> None:
    key = one(stages(distill()), "teacher").key
    other = [{"select": {"method": "fixed", "blocks": [2]}}, "prune"]
    assert one(stages(distill(tau=2.0, rank=3), first=other), "teacher").key == key
    either = [one(stages(distill(hidden=blocks)), "teacher").key for blocks in ([1, 2], [2, 1, 1])]
    assert either[0] == either[1]
    for own in ({"top_k": 8}, {"teacher_dtype": "bfloat16"}, {"hidden": [1]}):
        assert one(stages(distill(**own)), "teacher").key != key
    assert one(stages(distill(), seed=1), "teacher").key != key


def test_healers_share_what_is_the_same() -> None:
    found = stages(distill(), distill(rank=3), distill(top_k=8))
    assert [s.label for s in found if s.verb == "teacher"] == ["teacher", "teacher 2"]
    assert one(found, "heal 2").inputs["teacher"] is one(found, "teacher")
    assert one(found, "heal 3").inputs["teacher"] is one(found, "teacher 2")


def test_the_student_is_looked_at_without_counting() -> None:
    found = stages(distill())
    assert one(found, "teacher").beside == {"student": one(found, "prune")}
    assert sorted(one(found, "teacher").parents) == ["healing", "parent"]


def test_a_parent_of_ones_own() -> None:
    found = stages(distill(), first=[], parent={"path": "original"})
    parent = one(found, "parent")
    assert parent.params["fingerprint"] == "sha256:p"
    assert one(found, "teacher").inputs["parent"] is parent
    assert one(found, "text healing").inputs["tokenizer"] is parent
    assert one(found, "evaluate original").inputs["checkpoint"] is one(found, "model")
    repruned = plan(
        parse(tree(stages=[{"heal": distill()}], parent={"path": "p"}), "test"),
        PINS | {"parent": "sha256:p", "model": "sha256:another"},
    )
    assert one(repruned, "teacher").key == one(found, "teacher").key


def test_the_cut_is_looked_for_beside_the_model_before_it() -> None:
    around = {"method": "last_blocks", "around_cut": True}
    inputs = one(found := stages(around), "heal").inputs
    assert sorted(inputs) == ["checkpoint", "healing", "unpruned"]
    assert inputs["unpruned"] is one(found, "model")
    found = stages(around, first=[], parent={"path": "original"})
    assert one(found, "heal").inputs["unpruned"] is one(found, "parent")
    with pytest.raises(ConfigError, match=r"'heal' needs unpruned, .* or give --parent"):
        stages(around, first=[])
    assert "unpruned" not in one(stages({"method": "last_blocks"}), "heal").inputs


def test_what_is_missing_or_idle_is_told() -> None:
    with pytest.raises(ConfigError, match=r"'heal' needs teacher, .*a prune stage .*--parent"):
        stages(distill(), first=[])
    with pytest.raises(ConfigError, match="parent: no stage reads it"):
        stages({"method": "lora"}, parent={"path": "original"})
