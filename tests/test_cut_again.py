"""Scores and searches on a model that has lost an attention and a feed-forward already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.decoder import Decoder
from compressor.errors import NotApplicable, SelectionError
from compressor.prune import sublayers
from compressor.records import Scores, Selection
from compressor.score import METHODS as SCORES
from compressor.score.collect import score
from compressor.select import METHODS as SELECTIONS
from compressor.select.protect import Part, all_units, free_units
from compressor.trial import Trial
from tests.tiny import save_tiny, tokens

L = 4
GONE = {"attention": [1], "ffn": [2]}
WINDOWS = tokens(4, 12)
CALIBRATED = {"ffn_saturation": {"threshold": -0.5, "warm_up": 2}}
BUDGETS: dict[str, list[dict[str, Any]]] = {
    "contiguous": [{"n": 2, "protect": ()}],
    "simple": [{"n": 1}],
    "even": [{"n": 1}],
    "lowest": [
        {"n": 2, "part": part, "score": by}
        for part in ("attention", "ffn")
        for by in ("sublayer_cosine", "taylor", "relevance")
    ],
    "joint": [{"n": 3}, {"n": 3, "score": "taylor"}],
    "fixed": [{"attention": (2,), "ffn": (1,)}],
    "clasp": [{"n": 1}],
    "sleb": [
        {"n": 2, "part": p, "protect": ()} for p in ("block", "attention", "ffn", "sublayers")
    ],
    "swap": [{"n": 2, "part": "sublayers", "score": "taylor", "max_masks": 20}],
    "evolution": [{"n": 2, "part": "sublayers", "score": "taylor", "max_masks": 20}],
    "skrr": [{"n": 3, "beam": 2, "reuse": reuse} for reuse in (False, True)],
}


def cut(folder: Path, family: str, **parts: Any) -> Path:
    save_tiny(folder / "whole", family)
    chosen = Selection(num_blocks=L, **parts)
    sublayers.prune(folder / "whole", chosen, folder / "cut", native=True)
    return folder / "cut"


def all_scores(folder: Path) -> Scores:
    asked = {name: row.params(**CALIBRATED.get(name, {})) for name, row in SCORES.items()}
    return score(folder, WINDOWS, asked, batch_size=2)


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "opt", "olmo2"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scores]:
    """A cut model and all its scores; branches in sequence, in parallel, of two modules, post."""
    folder = tmp_path_factory.mktemp(request.param)
    folder = cut(folder, request.param, drop_attention=[1], drop_ffn=[2])
    return folder, all_scores(folder)


def test_every_score_scores_what_is_left(model: tuple[Path, Scores]) -> None:
    found = model[1]
    assert not found.unavailable
    assert found.absent == GONE
    for kind, table in (("attention", found.attention), ("ffn", found.ffn)):
        assert table
        for name, values in table.items():
            assert [i for i in range(L) if values[i] == 0] == GONE[kind], name
    influence = found.block["block_influence"]  # of the branch that is left, where one is
    assert found.ffn["sublayer_cosine"][1] == pytest.approx(influence[1], rel=1e-6)
    assert found.attention["sublayer_cosine"][2] == pytest.approx(influence[2], rel=1e-6)
    relevance = found.attention["relevance"] + found.ffn["relevance"]
    assert sum(relevance) == pytest.approx(1)


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_takes_what_is_there(
    name: str, model: tuple[Path, Scores], tmp_path: Path
) -> None:
    folder, scores = model
    row = SELECTIONS[name]
    for number, asked in enumerate(BUDGETS[name]):
        given = (scores, Trial(Decoder(folder), WINDOWS)) if row.needs else (scores,)
        chosen = row.load()(*given, **dict(row.params(**asked)))
        assert not {*chosen.drop_attention, *chosen.reuse_attention} & {*GONE["attention"]}
        assert not {*chosen.drop_ffn, *chosen.reuse_ffn} & {*GONE["ffn"]}
        assert not {*chosen.reuse_attention.values()} & {*GONE["attention"]}
        sublayers.prune(folder, chosen, tmp_path / str(number), native=True)


def test_the_budget_counts_what_is_there() -> None:
    scores = Scores.model_validate({"num_blocks": L, "absent": GONE})
    parts: tuple[Part, ...] = ("block", "attention", "ffn", "sublayers")
    for part in parts:
        there = [(kind, i) for kind, i in all_units(L, part) if i not in GONE.get(kind, ())]
        assert free_units(scores, 2, part, ()) == there
    with pytest.raises(SelectionError, match="n = 3 is more than the 2 attentions"):
        free_units(scores, 3, "attention", ())


def test_cold_ends_are_found_without_what_is_gone(tmp_path: Path) -> None:
    """The feed-forward that is gone turns nothing, and would make the last block warm."""
    folder = cut(tmp_path, "llama", drop_ffn=[3])
    asked = SCORES["ffn_saturation"].params(threshold=0.99999, warm_up=0)
    with pytest.raises(NotApplicable, match="no feed-forward reaches"):
        score(folder, WINDOWS, {"ffn_saturation": asked})


def test_borrowed_weights_are_the_reason_given(tmp_path: Path) -> None:
    folder = cut(tmp_path, "llama", reuse_attention={1: 2})
    found = all_scores(folder)
    names = {"sublayer_cosine", "ffn_saturation", "attention_rank", "relevance"}
    assert set(found.unavailable) == names
    for why in found.unavailable.values():
        assert "layers.1 runs with the attention weights of block 2" in why
    assert torch.tensor(found.block["block_influence"]).isfinite().all()
