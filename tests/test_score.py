"""Every score equals a naive transcription; the vectors of the papers hold."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.blocks import Blocks
from compressor.decoder import Decoder
from compressor.errors import CompressError
from compressor.magnitude import ascending_scores
from compressor.methods import Params
from compressor.records import Scores
from compressor.score import (
    METHODS,
    AngularDistanceParams,
    BlockInfluenceParams,
    LampParams,
    LayerContributionParams,
    layer_contribution,
)
from compressor.score.angular_distance import AngularDistance
from compressor.score.block_influence import BlockInfluence
from compressor.score.collect import score
from compressor.score.collector import Collector
from compressor.score.layer_contribution import divergence
from tests.tiny import save_tiny, tokens

WINDOWS = tokens(5, 12)
L = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return save_tiny(folder, "llama"), folder


def states(model: Any, windows: Tensor = WINDOWS) -> list[Tensor]:
    """h_0..h_L in float64; h_L before the final norm, which output_hidden_states has after it."""
    seen: list[Tensor] = []
    last = model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        output = model(windows, output_hidden_states=True)
    last.remove()
    return [h.double() for h in (*output.hidden_states[:-1], seen[0])]


def angle(a: Tensor, b: Tensor) -> float:
    cosine = float(a @ b / (a.norm() * b.norm()))
    return math.acos(max(-1.0, min(1.0, cosine))) / math.pi


def ask(folder: Path, name: str, params: Params, windows: Tensor = WINDOWS) -> Any:
    return score(folder, windows, {name: params}, batch_size=2)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_angular_distance_is_the_papers(model: tuple[Any, Path], positions: str) -> None:
    found = ask(model[1], "angular_distance", AngularDistanceParams(positions=positions))
    h = states(model[0])
    chosen = [11] if positions == "last" else range(12)
    assert [len(row) for row in found.distances] == [4, 3, 2, 1]
    for n in range(1, L + 1):
        for l in range(L - n + 1):
            angles = [angle(h[l][w, t], h[l + n][w, t]) for w in range(5) for t in chosen]
            assert found.distances[n - 1][l] == pytest.approx(np.mean(angles), abs=1e-6)
    assert found.block["angular_distance"] == found.distances[0]


def test_block_influence_is_the_papers(model: tuple[Any, Path]) -> None:
    found = ask(model[1], "block_influence", BlockInfluenceParams()).block["block_influence"]
    h = states(model[0])
    for i in range(L):
        cosines = [
            math.cos(math.pi * angle(h[i][w, t], h[i + 1][w, t]))
            for w in range(5)
            for t in range(12)
        ]
        assert found[i] == pytest.approx(1 - np.mean(cosines), abs=1e-6)


def one_block(kind: type[Collector], x: Tensor, y: Tensor, **params: Any) -> Scores:
    """The score of a model of one block that maps the states x (N, 1, D) to y."""
    decoder: Any = SimpleNamespace(blocks=range(1))
    step: Any = SimpleNamespace(index=0)
    tokens = torch.zeros(x.shape[:2])
    shared = [watcher(decoder, tokens) for watcher in kind.shares]  # type: ignore[call-arg]
    collector = kind(decoder, tokens, *shared, **params)  # type: ignore[call-arg]
    for each in (*shared, collector):
        each.update(step, slice(0, len(x)), x, y)
    return collector.result()


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 0], [1.0, 1], 0.25),
        ([1.0, 2, 3], [2.0, 1, 3], 0.121038),
        ([1.0, 2], [2.0, 4], 0.0),
        ([1.0, 2], [-1.0, -2], 1.0),
    ],
)
def test_t2_angular_distance(x: list[float], y: list[float], expected: float) -> None:
    found = one_block(AngularDistance, torch.tensor([[x]]), torch.tensor([[y]]), positions="last")
    assert found.distances == [[pytest.approx(expected, abs=1e-6)]]


def test_t3_block_influence_and_mean_angle() -> None:
    x, y = torch.tensor([[[1.0, 0]], [[1, 1]]]), torch.tensor([[[1.0, 1]], [[1, 2]]])
    influence = one_block(BlockInfluence, x, y)
    assert influence.block["block_influence"] == [pytest.approx(0.172105, abs=1e-6)]
    distance = one_block(AngularDistance, x, y, positions="all")
    assert distance.distances == [[pytest.approx(0.176208, abs=1e-6)]]


def test_t4_divergence_in_both_directions() -> None:
    full = torch.tensor([[2.0, 1, 0]]).log_softmax(-1)
    skip = torch.tensor([[1.0, 1, 0.5]]).log_softmax(-1)
    assert divergence(full, skip) == pytest.approx(0.170640, abs=1e-6)
    assert divergence(skip, full) == pytest.approx(0.182282, abs=1e-6)


def test_t1_lamp_scores() -> None:
    a = ascending_scores(torch.tensor([0.5, -0.1, 0.3, -0.2]))
    np.testing.assert_allclose(a, [0.025641, 0.105263, 0.264706, 1], atol=1e-6)
    b = ascending_scores(torch.tensor([[3.0], [1], [2]]))
    np.testing.assert_allclose(b, [0.071429, 0.307692, 1], atol=1e-6)
    kept = np.sort(np.concatenate([a, b]))[-3]
    assert kept == pytest.approx(0.307692, abs=1e-6)
    assert ((a < kept).mean(), (b < kept).mean()) == (0.75, pytest.approx(1 / 3))
    ties = ascending_scores(torch.tensor([0.2, 0.2, 0.4]))
    np.testing.assert_allclose(ties, [0.166667, 0.2, 1], atol=1e-6)
    scaled = ascending_scores(torch.tensor([0.5, -0.1, 0.3, -0.2]) * 7)
    np.testing.assert_allclose(scaled, a, rtol=1e-6)
    assert (ascending_scores(torch.zeros(3)) == 0).all()


@pytest.mark.parametrize("sparsity", [0.001, 0.1, 0.5, 0.777, 0.999, 1 - 1e-9])
def test_lamp_density_is_that_of_one_global_sort(model: tuple[Any, Path], sparsity: float) -> None:
    found = score(model[1], None, {"lamp": LampParams(sparsity=sparsity)}).block["lamp"]
    blocks = Blocks(model[0])
    naive: list[list[float]] = []
    for i in range(L):
        scores: list[float] = []
        for linear in blocks.linears(i).values():
            squares = sorted(w * w for w in linear.weight.detach().double().flatten().tolist())
            tails = np.cumsum(squares[::-1])[::-1]
            scores += [w / tail for w, tail in zip(squares, tails, strict=True)]
        naive.append(scores)
    everything = sorted((s for scores in naive for s in scores), reverse=True)
    threshold = everything[max(1, round((1 - sparsity) * len(everything))) - 1]
    expected = [sum(s >= threshold for s in scores) / len(scores) for scores in naive]
    assert found == expected


def test_all_scores_share_one_walk(
    model: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = Decoder.run

    def counted(self: Decoder, index: int, x: Tensor, block: Any = None) -> Tensor:
        calls.append(index)
        return run(self, index, x, block)

    monkeypatch.setattr(Decoder, "run", counted)
    methods = {
        "angular_distance": AngularDistanceParams(),
        "block_influence": BlockInfluenceParams(),
        "lamp": LampParams(),
    }
    found = score(model[1], WINDOWS, methods, batch_size=2)
    assert sorted(calls) == sorted(list(range(L)) * 3)
    assert set(found.block) == set(methods)
    calls.clear()
    score(
        model[1],
        WINDOWS,
        {"layer_contribution": LayerContributionParams(max_windows=2)},
        batch_size=2,
    )
    assert len(calls) == L * 3 + L * (L - 1) // 2


@pytest.mark.parametrize("name", ["block_influence", "dlp", "attention_rank"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_overflow_is_named_by_block(
    name: str, bad: float, model: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Decoder.run

    def overflow(self: Decoder, index: int, x: Tensor, block: Any = None) -> Tensor:
        return run(self, index, x, block) * (bad if index == 2 else 1)

    monkeypatch.setattr(Decoder, "run", overflow)
    with pytest.raises(CompressError, match=r"the output of block 2 is not finite; .*float32"):
        ask(model[1], name, METHODS[name].params())


def test_a_score_that_is_not_finite_is_named_by_part(
    model: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_contribution, "divergence", lambda p, q: torch.nan)
    with pytest.raises(CompressError, match=r"layer_contribution of block 0 is nan; .*float32"):
        ask(model[1], "layer_contribution", LayerContributionParams())
