"""Products in bfloat16 while a model is quantized: where, and where not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.quantize import GptqParams, precision
from compressor.quantize.driver import Recipe, quantize_blocks
from compressor.quantize.grid import Grid, QuantizedWeight
from compressor.quantize.turns import Catching, Reading, moments_of
from tests.tiny import save_tiny, tokens

CPU = torch.device("cpu")


def run(folder: Path, forwards: str) -> tuple[list[Tensor], list[Tensor], float]:
    """Grams and weights of every group of a tiny model, and the last drift."""
    params = GptqParams.model_validate({"bits": 8, "group_size": 16, "forwards": forwards})
    recipe, grams = Recipe.of(Decoder(folder), "gptq", params), []

    def watched(weight: Tensor, gram: Tensor, grid: Grid) -> QuantizedWeight:
        assert not torch.is_autocast_enabled("cpu") and (weight @ gram).dtype == torch.float32
        grams.append(gram)
        return recipe.quantizer(weight, gram, grid)

    watching = Recipe(recipe.grids, watched, recipe.strengths, recipe.catching, recipe.forwards)
    blocks = []
    for block in quantize_blocks(Decoder(folder), tokens(8), watching):
        assert not torch.is_autocast_enabled("cpu")
        blocks.append(block)
    assert blocks[-1].drift is not None
    weights = [each.dequantize() for block in blocks for each in block.weights.values()]
    return grams, weights, blocks[-1].drift


def test_bfloat16_changes_the_forwards_and_little_else(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    exact, ours, drift = run(tmp_path, "float32")
    half, theirs, other = run(tmp_path, "bfloat16")
    assert all(gram.dtype == torch.float32 and torch.equal(gram, gram.T) for gram in half)
    first = [(a - b).norm() / a.norm() for a, b in zip(exact, half, strict=True)][:4]
    assert first[0] == 0 and all(0 < each < 0.01 for each in first[1:]), first
    off = [(a - b).norm() / a.norm() for a, b in zip(ours, theirs, strict=True)]
    assert max(off) < 0.05 and any(off), off
    assert other == pytest.approx(drift, abs=0.01)
    again = run(tmp_path, "bfloat16")
    assert all(map(torch.equal, again[1], theirs)) and again[2] == other


def test_auto_follows_the_processor_and_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    for quick in (True, False):
        monkeypatch.setattr(precision, "has_bfloat16", lambda quick=quick: quick)
        rows = (
            ("auto", 4, quick),
            ("auto", 5, False),
            ("float32", 4, False),
            ("bfloat16", 8, True),
        )
        for asked, bits, half in rows:
            with precision.products_in(asked, CPU, bits):  # type: ignore[arg-type]
                assert torch.is_autocast_enabled("cpu") is half
                with precision.exactly(CPU):
                    assert not torch.is_autocast_enabled("cpu")


def test_streams_in_half_precision_differ_by_what_they_differ() -> None:
    """As on CUDA, where a model computes in its own dtype: against float64."""
    draw = torch.Generator().manual_seed(0)
    x, near, weight = (torch.randn(n, 8, generator=draw).bfloat16() for n in (64, 64, 6))
    near = (x.float() + 0.3 * near.float()).bfloat16()
    h, other = torch.randn(2, 64, 6, generator=draw).bfloat16()
    off, read = near.double() - x.double(), x.double()
    found = moments_of([(Reading(x, None), Reading(near, None))], weight, Catching(0.5))
    torch.testing.assert_close(found.cross, (off.T @ read / 64).float(), rtol=1e-4, atol=1e-6)
    found = moments_of([(Reading(x, h), Reading(near, other))], weight, Catching(0.5))
    short = off @ weight.double().T + 0.5 * (other.double() - h.double())
    torch.testing.assert_close(found.lack, (short.T @ read / 64).float(), rtol=1e-4, atol=1e-6)


def test_differences_are_formed_before_they_are_rounded() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 8, generator=draw), torch.randn(6, 8, generator=draw)
    near = x + 1e-4 * torch.randn(64, 8, generator=draw)
    h = torch.randn(64, 6, generator=draw)
    for stream in (None, h):
        pairs = [(Reading(x, stream), Reading(near, stream))]
        exact = moments_of(pairs, weight, Catching(1.0))
        with precision.products_in("bfloat16", CPU, 4):
            half = moments_of(pairs, weight, Catching(1.0))
        assert torch.equal(half.gram, exact.gram)
        for a, b in zip(exact[1:], half[1:], strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert 0 < (a - b).norm() / a.norm() < 0.01
