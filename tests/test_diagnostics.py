"""How added loss spreads over windows, and how the error of the stream grows with depth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from compressor.errors import NotApplicable
from compressor.evaluate.accumulation import accumulation
from compressor.evaluate.quality import Reference, evaluate
from compressor.evaluate.windows import describe, spearman
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from pipelines.table import added_loss
from tests.command_line import compress
from tests.tiny import save_corpus, save_tiny, save_tokenizer, tiny, tokens

WINDOWS = tokens(5, 16)


def test_spread_of_added_loss() -> None:
    """Ten ordinary windows, one bad one and one that gained; percentiles worked out by hand."""
    found = describe([0.1] * 10 + [4.0, -0.5], [1.0] * 12)
    assert found["mean"] == pytest.approx(4.5 / 12)
    assert found["p50"] == pytest.approx(0.1)
    assert found["p95"] == pytest.approx(0.1 + 0.45 * 3.9)  # at 10.45 of 0..11
    assert found["p99"] == pytest.approx(0.1 + 0.89 * 3.9)
    assert found["worst"] == [10, 0, 1, 2, 3]
    assert found["norm_correlation"] is None
    assert found["flags"] == ["a few windows lose most: p99 is 35.7 times the median"]


def test_spearman_by_hand_and_with_ties() -> None:
    x = torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    y = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert spearman(x, y) == pytest.approx(1 - 6 * (4 + 1 + 1 + 4 + 0) / 120)
    tied = torch.tensor([1.0, 2.0, 2.0, 3.0])  # ranks 1, 2.5, 2.5, 4
    ranks, other = torch.tensor([1, 2.5, 2.5, 4]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    expected = float(torch.corrcoef(torch.stack([ranks, other]))[0, 1])
    assert spearman(tied, other) == pytest.approx(expected)
    assert spearman(torch.ones(5), y) is None
    assert spearman(y[:2], y[:2]) is None


def test_correlation_with_the_norm_is_flagged_only_where_it_means_something() -> None:
    norms = [float(n) for n in range(20)]
    falling, rising = [1 - n / 40 for n in norms], [1 + n / 40 for n in norms]
    assert describe(falling, norms)["norm_correlation"] == pytest.approx(-1)
    assert "correlation -1.00" in describe(falling, norms)["flags"][0]
    assert describe(rising, norms)["flags"] == []
    assert describe(falling[:11], norms[:11])["flags"] == []
    assert len(describe(falling[:12], norms[:12])["flags"]) == 1


def test_evaluation_says_where_the_loss_was_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = save_tiny(tmp_path / "a", "llama"), save_tiny(tmp_path / "b", "llama", seed=1)
    assert evaluate(tmp_path / "a", WINDOWS, tmp_path)["added_loss"] is None
    told: list[list[float]] = []

    def note(added: list[float], norms: list[float]) -> dict[str, str]:
        told.extend((added, norms))
        return {"as": "told"}

    monkeypatch.setattr("compressor.evaluate.quality.describe", note)
    reference = Reference(tmp_path / "a", tmp_path)
    found = evaluate(tmp_path / "b", WINDOWS, tmp_path, reference=reference)
    assert found["added_loss"] == {"as": "told"}
    with torch.no_grad():
        lost = [float(other(w[None], labels=w[None]).loss) for w in WINDOWS]
        had = [float(model(w[None], labels=w[None]).loss) for w in WINDOWS]
    assert told[0] == pytest.approx([a - b for a, b in zip(lost, had, strict=True)], abs=1e-5)
    assert told[1] == pytest.approx(last_stream(model).norm(dim=-1).mean(-1).tolist(), rel=1e-5)


def last_stream(model: torch.nn.Module) -> torch.Tensor:
    """What the final norm reads."""
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    return seen[0]


def test_error_accumulates_as_hidden_states_say(tmp_path: Path) -> None:
    """Against transformers' own hidden states, but the last, which it norms."""
    save_tiny(tmp_path / "a", "llama")
    quantize(tmp_path / "a", tmp_path / "b", None, "rtn", RtnParams(bits=3, group_size=16))
    save_tiny(tmp_path / "c", "llama", seed=1)
    folders = {"itself": tmp_path / "a", "rtn": tmp_path / "b", "other": tmp_path / "c"}
    found = accumulation(tmp_path / "a", folders, WINDOWS, batch_size=2)
    assert found["itself"] == [0.0] * 4
    with torch.no_grad():
        x, y = (
            tiny("llama", seed=seed).model(WINDOWS, output_hidden_states=True).hidden_states
            for seed in (0, 1)
        )
    for depth in range(3):
        expected = (x[depth + 1] - y[depth + 1]).norm() / x[depth + 1].norm()
        assert found["other"][depth] == pytest.approx(float(expected), rel=1e-4)
    assert all(0 < value < math.inf for value in found["rtn"])
    assert torch.is_grad_enabled()


def test_streams_of_other_shapes_cannot_be_compared(tmp_path: Path) -> None:
    save_tiny(tmp_path / "a", "llama")
    save_tiny(tmp_path / "short", "llama", num_hidden_layers=3)
    save_tiny(tmp_path / "wide", "llama", hidden_size=64)
    for name, words in (("short", "3 blocks, 32 wide"), ("wide", "4 blocks, 64 wide")):
        with pytest.raises(NotApplicable, match=f"{words}, against 4, 32"):
            accumulation(tmp_path / "a", {name: tmp_path / name}, WINDOWS)


def test_a_run_tells_of_quantized_checkpoints_and_of_flags() -> None:
    calm, loud = (describe([0.1] * 10 + [worst, 0.1], [1.0] * 12) for worst in (0.2, 4.0))
    stages = [("original", None), ("prune", calm), ("heal", loud), ("quantize", calm)]
    record = {
        "stages": [
            {"verb": "evaluate", "label": f"evaluate {name}", "metrics": {"added_loss": found}}
            for name, found in stages
        ]
    }
    lines = added_loss(record)
    assert [line.partition(":")[0] for line in lines] == ["heal", "heal", "quantize"]
    assert "p99 is 35" in lines[1] and "most in windows 10, 0, 1, 2, 3" in lines[2]


def test_two_folders_are_compared_by_one_command(tmp_path: Path) -> None:
    """The record of `compress evaluate quantized --reference original`."""
    save_tiny(tmp_path / "a", "llama")
    save_tokenizer(tmp_path / "a")
    save_corpus(tmp_path / "corpus.jsonl")
    quantize(tmp_path / "a", tmp_path / "b", None, "rtn", RtnParams(bits=2, group_size=16))
    asked = ("--reference", "a", "--text", "corpus.jsonl", "--field", "text", "--speed", "false")
    sizes = ("--windows", "4", "--length", "16")
    done = compress(tmp_path, "evaluate", "b", *asked, *sizes, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    stages = record["stages"]
    assert [stage["label"] for stage in stages] == [
        "model", "reference", "text evaluation", "evaluate reference", "evaluate model",
    ]  # fmt: skip
    known, found = stages[-2]["metrics"], stages[-1]["metrics"]
    assert known["kl"] is None and found["kl"] > 0
    added = sum(found["window_nll"]) / 4 - sum(known["window_nll"]) / 4
    assert found["added_loss"]["mean"] == pytest.approx(added, abs=1e-5)
    assert found["bytes"] < known["bytes"]
    assert [line[:27] for line in added_loss(record)] == ["model: added loss by window"]


def test_a_reference_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "a", "llama")
    save_tiny(tmp_path / "b", "llama", vocab_size=100)
    evaluate(tmp_path / "a", WINDOWS, tmp_path)
    with pytest.raises(NotApplicable, match="knows 100 tokens, its reference 96"):
        evaluate(tmp_path / "b", WINDOWS, tmp_path, reference=Reference(tmp_path / "a", tmp_path))
