"""The emitted graph is the model: every family, cached and uncached, padded and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.dense import DenseReader
from compressor.errors import ExportError
from compressor.export import ExportParams
from compressor.export import onnx as onnx_export
from compressor.export.decoder_graph import SUPPORTED, build
from compressor.export.graph import DATA
from compressor.export.session import Session
from tests.tiny import save_tiny, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("phi3", {}),
    ("olmo2", {}),
]


def exported(tmp_path: Path, family: str, **overrides: Any) -> tuple[Any, Session, Path]:
    settings = {"hidden_size": 64, "head_dim": 16} if family == "qwen3" else {"hidden_size": 64}
    model = save_tiny(tmp_path / "model", family, **(settings | overrides))
    folder = tmp_path / "onnx"
    folder.mkdir()
    build(tmp_path / "model", DenseReader(tmp_path / "model"), folder, torch.float32)
    return model, Session(folder, "cpu"), folder


def test_every_supported_family_is_tested() -> None:
    assert {family for family, _ in CASES} == set(SUPPORTED)


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_graph_equals_model(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model, session, _ = exported(tmp_path, family, **overrides)
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    whole, _ = session.run(ids.numpy())
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)
    cache = None
    for position in range(ids.shape[1]):
        step, cache = session.run(ids[:, position : position + 1].numpy(), cache)
        np.testing.assert_allclose(step[:, 0], expected[:, position], rtol=1e-4, atol=1e-4)


def test_right_padding_changes_nothing(tmp_path: Path) -> None:
    model, session, _ = exported(tmp_path, "llama")
    ids = tokens(2, 12)
    mask = np.ones((2, 12), np.int64)
    mask[1, 7:] = 0
    padded, _ = session.run(ids.numpy(), mask=mask)
    with torch.no_grad():
        short = model(ids[1:, :7]).logits.numpy()
    np.testing.assert_allclose(padded[1:, :7], short, rtol=1e-4, atol=1e-4)


def test_left_padding_is_refused(tmp_path: Path) -> None:
    _, session, _ = exported(tmp_path, "llama")
    mask = np.ones((1, 6), np.int64)
    mask[0, 0] = 0
    with pytest.raises(ExportError, match="pad on the right"):
        session.run(tokens(1, 6).numpy(), mask=mask)


def test_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    tied, _, folder = exported(tmp_path, "llama", tie_word_embeddings=True)
    weights = sum(p.numel() * 4 for p in tied.parameters())
    tables = 2 * 128 * 8 * 4
    padding = 4096 * (len(list(tied.parameters())) + 2)
    assert weights + tables <= (folder / DATA).stat().st_size <= weights + tables + padding


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("gpt2", {}, "no ONNX graph"),
        ("llama", {"hidden_size": 32}, "multiples of 16"),
        ("llama", {"hidden_act": "relu"}, "relu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "depends on the length",
        ),
    ],
)
def test_what_cannot_be_emitted_is_refused(
    family: str, overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said):
        exported(tmp_path, family, **overrides)


def test_export_notices_a_wrong_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    good = DenseReader.read

    def wrong(self: DenseReader, name: str) -> torch.Tensor:
        return good(self, name) * (1.01 if name.endswith("layers.2.mlp.up_proj.weight") else 1)

    monkeypatch.setattr(DenseReader, "read", wrong)
    with pytest.raises(ExportError, match="disagree on prefill"):
        onnx_export.export(tmp_path / "model", tmp_path, ExportParams())


def test_float16_graph(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    params = ExportParams(formats=("onnx",), onnx_dtype="float16")
    metrics = onnx_export.export(tmp_path / "model", tmp_path, params)
    assert metrics["onnx"]["parity"]["logit_difference"]["prefill"] < 0.25
