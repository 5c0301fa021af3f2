"""Bypassed streams: scores equal removing blocks one by one, at the cost that is promised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compressor import walk as walk_module
from compressor.blocks import Blocks
from compressor.decoder import Decoder
from compressor.score import LayerContributionParams, PerplexityParams
from compressor.score import leave_one_out as module
from compressor.score.collect import score
from tests.tiny import save_tiny, tokens

WINDOWS = tokens(5, 12)
L = 4
CHOSEN = {"last": [11], "alternate": [0, 2, 4, 6, 8, 10], "all": list(range(12))}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return save_tiny(folder, "llama"), folder


def bypassed(model: Any, windows: Tensor) -> list[Tensor]:
    """Logits of the whole model, then of the models without block 0, 1, ..., in float64."""
    model.double()
    blocks = Blocks(model)
    with torch.no_grad():
        found = [model(windows, use_cache=False).logits]
        for block in blocks:
            block.forward = lambda x, *_, **__: (x,) if blocks.returns_tuple else x
            found.append(model(windows, use_cache=False).logits)
            del block.forward
    return [logits.log_softmax(-1) for logits in found]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text", "gpt_neox"])
def test_both_scores_are_bypassing_one_by_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different windows, positions and batches together, few logits, streams in a file."""
    monkeypatch.setattr(walk_module, "SPILL_BYTES", 16)
    monkeypatch.setattr(module, "HEAD_TOKENS", 5)
    model = save_tiny(tmp_path, family)
    methods = {
        "layer_contribution": LayerContributionParams(max_windows=2),
        "perplexity": PerplexityParams(max_windows=3, positions="all"),
    }
    found = score(tmp_path, WINDOWS, methods, batch_size=4).block
    full, *skips = bypassed(model, WINDOWS)
    for i, skip in enumerate(skips):
        p, q = full[:2, CHOSEN["alternate"]], skip[:2, CHOSEN["alternate"]]
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert found["layer_contribution"][i] == pytest.approx(kl, rel=1e-4)
        losses = [
            float(cross_entropy(x[:3, :-1].flatten(0, 1), WINDOWS[:3, 1:].flatten()))
            for x in (skip, full)
        ]
        assert found["perplexity"][i] == pytest.approx(losses[0] - losses[1], rel=1e-4)


@pytest.mark.parametrize("positions", ["last", "alternate", "all"])
@pytest.mark.parametrize("direction", ["full_skip", "skip_full"])
def test_positions_and_directions(positions: str, direction: str, llama: tuple[Any, Path]) -> None:
    model, folder = llama
    params = LayerContributionParams(max_windows=9, positions=positions, direction=direction)
    windows, length, last = WINDOWS[:, :11], 11, 10
    found = score(folder, windows, {"layer_contribution": params}, batch_size=2)
    chosen = {"last": [last], "all": range(length), "alternate": range(last - 1, -1, -2)}
    full, *skips = (x[:, list(chosen[positions])] for x in bypassed(model, windows))
    for i, skip in enumerate(skips):
        p, q = (full, skip) if direction == "full_skip" else (skip, full)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert found.block["layer_contribution"][i] == pytest.approx(kl, rel=1e-4)


def test_alternate_perplexity_predicts_every_second_token(llama: tuple[Any, Path]) -> None:
    model, folder = llama
    found = score(folder, WINDOWS, {"perplexity": PerplexityParams(max_windows=5)})
    full, *skips = bypassed(model, WINDOWS)
    for i, skip in enumerate(skips):
        rises = [
            float(full[w, t, WINDOWS[w, t + 1]] - skip[w, t, WINDOWS[w, t + 1]])
            for w in range(5)
            for t in CHOSEN["alternate"]
        ]
        assert found.block["perplexity"][i] == pytest.approx(math.fsum(rises) / 30, abs=1e-6)


def test_a_block_that_does_nothing_scores_zero(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    methods = {"layer_contribution": LayerContributionParams(), "perplexity": PerplexityParams()}
    found = score(tmp_path, WINDOWS, methods)
    for values in found.block.values():
        assert values[2] == pytest.approx(0, abs=1e-6)
        assert all(abs(value) > 1e-3 for i, value in enumerate(values) if i != 2)


@pytest.mark.parametrize(("windows", "batch"), [(1, 4), (3, 2), (4, 4), (5, 4)])
def test_both_scores_cost_one(
    windows: int, batch: int, llama: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """L(L-1)/2 block forwards beside the walk's L, weights read once, half the head's tokens."""
    rows: list[int] = []
    loaded: list[int] = []
    headed: list[int] = []
    run, resident, head = Decoder.run, Decoder.resident, Decoder.head

    def counted(self: Decoder, index: int, x: Tensor, block: Any = None) -> Tensor:
        rows.append(len(x))
        return run(self, index, x, block)

    def opened(self: Decoder, index: int) -> Any:
        loaded.append(index)
        return resident(self, index)

    def applied(self: Decoder, x: Tensor) -> Tensor:
        headed.append(x.shape[0] * x.shape[1])
        return head(self, x)

    monkeypatch.setattr(Decoder, "run", counted)
    monkeypatch.setattr(Decoder, "resident", opened)
    monkeypatch.setattr(Decoder, "head", applied)
    methods = {
        "layer_contribution": LayerContributionParams(max_windows=windows),
        "perplexity": PerplexityParams(max_windows=windows),
    }
    score(llama[1], WINDOWS, methods, batch_size=batch)
    assert sum(rows) == L * 5 + L * (L - 1) // 2 * windows
    assert loaded == list(range(L))
    assert sum(headed) == (L + 1) * windows * 6
