"""Quality against transformers' own loss and naive formulas; sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import CheckpointError
from compressor.evaluate.quality import STATES, Reference, evaluate, parameters
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from tests.tiny import save_tiny, tokens

WINDOWS = tokens(5, 16)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any, Path]:
    """Two different tiny models, in tmp/a and tmp/b."""
    a = save_tiny(tmp_path / "a", "llama")
    b = save_tiny(tmp_path / "b", "llama", seed=1)
    return a, b, tmp_path


def test_nll_is_transformers_own(pair: tuple[Any, Any, Path]) -> None:
    model, _, folder = pair
    found = evaluate(folder / "a", WINDOWS, folder, batch_size=2)
    with torch.no_grad():
        own = [float(model(row[None], labels=row[None]).loss) for row in WINDOWS]
    assert found["window_nll"] == pytest.approx(own, abs=1e-5)
    assert found["nll"] == pytest.approx(sum(own) / 5, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(own) / 5), rel=1e-5)
    assert found["protocol"] == {
        "windows": 5, "length": 16, "stride": 16, "predicted_tokens": 75,
    }  # fmt: skip
    assert (found["kl"], found["top1_agreement"]) == (None, None)
    assert found["blocks"] == 4
    assert found["bytes"] == (folder / "a/model.safetensors").stat().st_size
    assert (folder / STATES).is_file()


def test_a_model_agrees_with_itself(pair: tuple[Any, Any, Path]) -> None:
    folder = pair[2]
    evaluate(folder / "a", WINDOWS, folder)
    again = evaluate(folder / "a", WINDOWS, folder, reference=Reference(folder / "a", folder))
    assert again["kl"] == pytest.approx(0, abs=1e-9)
    assert again["top1_agreement"] == 1


def test_kl_is_of_the_reference_against_the_model(pair: tuple[Any, Any, Path]) -> None:
    a, b, folder = pair
    evaluate(folder / "a", WINDOWS, folder)
    found = evaluate(folder / "b", WINDOWS, folder, reference=Reference(folder / "a", folder))
    with torch.no_grad():
        p, q = (m(WINDOWS).logits[:, :-1].double().log_softmax(-1) for m in (a, b))
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found["top1_agreement"] == pytest.approx(float(same))


@pytest.mark.parametrize("factor", [1e5, 1e38], ids=["overflow", "nan"])
def test_a_loss_that_is_no_number_is_refused(factor: float, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] *= factor
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its loss on the evaluation text is .*float32"):
        evaluate(tmp_path, WINDOWS, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_from_headers(tied: bool, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "dense", "llama", tie_word_embeddings=tied)
    count = sum(p.numel() for p in model.parameters())
    assert parameters(tmp_path / "dense") == count
    quantize(tmp_path / "dense", tmp_path / "packed", None, "rtn", RtnParams(group_size=16))
    assert parameters(tmp_path / "packed") == count


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}),
        ("llama", {"lm_head.weight": torch.ones(96, 32)}),
    ],
    ids=["mask", "scalar", "tied-twice"],
)
def test_what_is_stored_but_no_weight_of_its_own_is_not_counted(
    family: str, extra: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    model = save_tiny(tmp_path, family, **tied)
    stored = load_file(tmp_path / "model.safetensors")
    assert not extra.keys() & stored.keys()
    save_file(stored | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert parameters(tmp_path) == sum(p.numel() for p in model.parameters())
