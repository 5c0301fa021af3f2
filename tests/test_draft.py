"""A shallow model as its parent's draft: counts from the generation, text equal, the formula."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from compressor.errors import DraftError
from compressor.evaluate import draft as draft_module
from compressor.evaluate.draft import Rounds, load, measure, predicted_speedup, tokens_per_round
from compressor.fetch import fingerprint_model
from compressor.sources import ModelSource
from pipelines.cli import cli
from pipelines.draft_command import checkpoint, in_words, record_path
from tests.tiny import save_corpus, save_tiny, save_tokenizer, tiny, tokens


@pytest.fixture(scope="module")
def parent() -> Any:
    return tiny("llama", eos_token_id=None)


def noisy(parent: Any, scale: float) -> Any:
    """The parent with noise on its weights: a draft that is right now and then."""
    model = copy.deepcopy(parent)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * scale)
    return model


def figures(draft: Any, parent: Any, **how: int) -> dict[str, Any]:
    how = {"draft_tokens": 4, "new_tokens": 20} | how
    return measure(draft, parent, list(tokens(3, 8)), **how)


def test_tokens_of_a_round_by_the_formula() -> None:
    assert tokens_per_round(0.7, 4) == pytest.approx(2.773100, abs=1e-6)
    assert tokens_per_round(0.7, 4) == pytest.approx(sum(0.7**i for i in range(5)))
    assert (tokens_per_round(0.0, 4), tokens_per_round(1.0, 4)) == (1.0, 5.0)
    assert predicted_speedup(0.7, 4, 0.0) == tokens_per_round(0.7, 4)
    assert predicted_speedup(0.7, 4, 0.25) == pytest.approx(2.7731 / 2)


def test_the_chance_is_that_of_the_draws_and_the_acceptance_is_not() -> None:
    order, rounds = random.Random(0), Rounds()
    for _ in range(20_000):
        accepted = 0
        while accepted < 4 and order.random() < 0.7:
            accepted += 1
        rounds.drafted.append(4)
        rounds.accepted.append(accepted)
    assert rounds.chance == pytest.approx(0.7, abs=0.01)
    per_round = sum(rounds.accepted) / 20_000 + 1
    assert per_round == pytest.approx(tokens_per_round(rounds.chance, 4), rel=0.01)
    assert rounds.acceptance == pytest.approx((2.7731 - 1) / 4, abs=0.01)


def test_the_parent_as_its_own_draft_is_always_right(parent: Any) -> None:
    found = figures(copy.deepcopy(parent), parent, new_tokens=20)
    assert (found["acceptance"], found["chance"]) == (1.0, 1.0)
    assert found["rounds"] == 3 * 4  # 20 tokens, 4 drafted and 1 own a round
    assert (found["drafted"], found["accepted"], found["new_tokens"]) == (48, 48, 60)
    assert found["mean_accepted"] == 4.0


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
def test_counts_are_those_of_the_candidate_generator(
    parent: Any, draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted, accepted = [], []
    original = AssistedCandidateGenerator.update_candidate_strategy

    def spy(self: Any, ids: Any, scores: Any, matches: int) -> None:
        drafted.append(scores.shape[1] - 1)
        accepted.append(matches)
        original(self, ids, scores, matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", spy)
    kept: list[Rounds] = []
    monkeypatch.setattr(draft_module, "Rounds", lambda: kept.append(Rounds()) or kept[-1])
    found = figures(noisy(parent, 0.02), parent, draft_tokens=draft_tokens, new_tokens=21)
    warm_up = len(drafted) - len(kept[0].drafted)
    assert kept[0].drafted == drafted[warm_up:]
    assert kept[0].accepted == accepted[warm_up:]
    assert 0 < found["accepted"] < found["drafted"]
    assert found["accepted"] + found["rounds"] == found["new_tokens"] == 63
    assert max(drafted) == draft_tokens


def test_speeds_and_the_prediction_come_from_the_same_clock(
    parent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"parent": 4.0, "draft": 1.0, "assisted": 2.0}
    real = draft_module._generate

    def timed(model: Any, prompt: Any, count: int, **how: Any) -> tuple[list[int], float]:
        out, _ = real(model, prompt, count, **how)
        kind = "assisted" if how else ("parent" if model is parent else "draft")
        return out, seconds[kind]

    monkeypatch.setattr(draft_module, "_generate", timed)
    found = figures(noisy(parent, 0.02), parent)
    assert found["speedup"] == 2.0
    assert found["cost"] == 0.25
    assert found["predicted_speedup"] == pytest.approx(tokens_per_round(found["chance"], 4) / 2)
    assert found["tokens_per_second"]["parent"] == {"all": 5.0, "min": 5.0, "max": 5.0}


def test_a_text_that_is_not_the_parents_fails(parent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = draft_module._generate

    def changed(model: Any, prompt: Any, count: int, **how: Any) -> tuple[list[int], float]:
        out, seconds = real(model, prompt, count, **how)
        return ([*out[:5], 0, *out[6:]] if "streamer" in how else out), seconds

    monkeypatch.setattr(draft_module, "_generate", changed)
    with pytest.raises(DraftError, match=r"prompt 1: .* at new token 6 \(got \[0\], expected"):
        figures(copy.deepcopy(parent), parent)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    for name, overrides in {"parent": {}, "exported/safetensors": {"num_hidden_layers": 2}}.items():
        save_tiny(folder / name, "llama", **overrides)
        save_tokenizer(folder / name)
    save_corpus(folder / "corpus.jsonl")
    (folder / "prompts.txt").write_text("w3 w4 w5\n\nw9 w8\n")
    return folder


def run(project: Path, *args: str) -> None:
    command = ["draft", str(project / "exported"), str(project / "parent"), "--new-tokens", "8"]
    store = ["--store", str(project / "artifacts"), "-q"]
    cli.main([*command, *store, *args], standalone_mode=False)


@pytest.mark.parametrize("source", ["prompts", "text"])
def test_the_command_keeps_its_figures_with_the_checkpoint(
    source: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "prompts": ["--prompts", str(project / "prompts.txt")],
        "text": ["--text", str(project / "corpus.jsonl"), "--field", "text", "--length", "16"],
    }
    run(project, *given[source], "--json")
    said = json.loads(capsys.readouterr().out)
    parent, folder = project / "parent", checkpoint(str(project / "exported"))
    path = record_path(folder, parent, project / "artifacts")
    assert json.loads(path.read_text()) == said
    assert said["prompts"] == {"prompts": 2, "text": 4}[source]
    assert said["format"] == 1
    assert said["parent"] == fingerprint_model(ModelSource(path=str(parent)))
    assert said["text"].startswith("sha256:")
    assert f"{said['accepted']} of {said['drafted']} drafted tokens" in in_words(said)


def test_a_tokenizer_of_another_model_is_refused(project: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", "llama")
    save_tokenizer(tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    path.write_text(path.read_text().replace('"w3"', '"other"'))
    with pytest.raises(DraftError, match="its tokenizer is not that of"):
        load(tmp_path / "other", project / "parent", "cpu")
