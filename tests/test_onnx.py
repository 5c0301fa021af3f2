"""The emitted graph is the model: every family, cached and uncached, padded and not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.dense import DenseReader
from compressor.errors import ExportError, InferenceError
from compressor.export import ExportParams, decoder_graph
from compressor.export import onnx as onnx_export
from compressor.export.decoder_graph import build
from compressor.export.graph import DATA
from compressor.export.traits import TRAITS
from compressor.prune.driver import prune
from compressor.records import Selection
from compressor.runtimes.session import MODEL, Session
from tests.tiny import save_tiny, save_tokenizer, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("phi3", {}),
    ("phi3", {"num_attention_heads": 2, "rope_parameters": PARTIAL}),
    ("olmo2", {}),
    ("gemma2", {"head_dim": 16}),
    ("gemma3_text", {"head_dim": 16}),
]


def exported(tmp_path: Path, family: str, **overrides: Any) -> tuple[Any, Session, Path]:
    settings = {"hidden_size": 64, "head_dim": 16} if family == "qwen3" else {"hidden_size": 64}
    model = save_tiny(tmp_path / "model", family, **(settings | overrides))
    folder = tmp_path / "onnx"
    folder.mkdir()
    build(tmp_path / "model", folder)
    return model, Session(folder, "cpu"), folder


def test_every_supported_family_is_tested() -> None:
    assert {family for family, _ in CASES} == set(TRAITS)


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


@pytest.mark.parametrize(("family", "overrides"), [("llama", {}), ("gemma2", {"head_dim": 16})])
def test_no_node_makes_what_nobody_reads(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    _, _, folder = exported(tmp_path, family, **overrides)
    graph = ir.load(folder / MODEL).graph
    made = [value for node in graph for value in node.outputs if value.name]
    assert len(made) > len(graph.outputs)
    assert not [v.name for v in made if not v.uses() and v not in graph.outputs]


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
    with pytest.raises(InferenceError, match="pad on the right"):
        session.run(tokens(1, 6).numpy(), mask=mask)


def test_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    tied, _, folder = exported(tmp_path, "llama", tie_word_embeddings=True)
    weights = sum(p.numel() * 4 for p in tied.parameters())
    tables = 2 * 128 * 8 * 4
    padding = 4096 * (len(list(tied.parameters())) + 2)
    assert weights + tables <= (folder / DATA).stat().st_size <= weights + tables + padding


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_removed_sublayers_are_absent(family: str, tmp_path: Path) -> None:
    """The graph of a checkpoint without some sublayers: its nodes are gone, caches are dense."""
    heads = {"head_dim": 16} if family != "llama" else {}
    save_tiny(tmp_path / "whole", family, hidden_size=64, **heads)
    selection = Selection(num_blocks=4, drop_attention=[1], drop_ffn=[2])
    prune(tmp_path / "whole", selection, tmp_path / "model", flavour="auto")
    (tmp_path / "onnx").mkdir()
    assert build(tmp_path / "model", tmp_path / "onnx").caches == 3
    session = Session(tmp_path / "onnx", "cpu")
    assert sorted(session.empty_cache()) == sorted(
        f"past_key_values.{i}.{kind}" for i in range(3) for kind in ("key", "value")
    )
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits.numpy()
    np.testing.assert_allclose(session.run(ids.numpy())[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("gpt2", {}, "no ONNX nodes"),
        ("llama", {"hidden_size": 32}, "multiples of 16"),
        ("llama", {"hidden_act": "relu"}, "relu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "depends on the length",
        ),
        ("gemma3_text", {"head_dim": 16, "use_bidirectional_attention": True}, "later tokens"),
    ],
)
def test_what_cannot_be_emitted_is_refused(
    family: str, overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said):
        exported(tmp_path, family, **overrides)


# The gate


def passes(tmp_path: Path, family: str = "llama", **overrides: Any) -> dict[str, Any]:
    save_tiny(tmp_path / "model", family, **({"hidden_size": 64} | overrides))
    save_tokenizer(tmp_path / "model")
    metrics = onnx_export.export(tmp_path / "model", tmp_path, ExportParams(), tokens(4, 40))
    return metrics["onnx"]["parity"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_gate_lets_a_true_export_pass(family: str, tmp_path: Path) -> None:
    parity = passes(tmp_path, family, **({} if family == "llama" else {"head_dim": 16}))
    found = parity["accuracy_level_0"]
    assert set(found) == {"prefill", "chunked", "padded", "decode", "greedy", "nll"}
    assert max(found.values()) < 1e-4
    assert parity["greedy_equal"] == parity["greedy_tokens"] == 3 * 32
    assert parity["safetensors"] == 0.0


def test_the_gate_names_a_damaged_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = DenseReader.read

    def wrong(self: DenseReader, name: str) -> torch.Tensor:
        return good(self, name) * (1.03 if name.endswith("layers.2.mlp.down_proj.weight") else 1)

    monkeypatch.setattr(DenseReader, "read", wrong)
    with pytest.raises(ExportError, match=r"on prefill .* first at model\.layers\.2\.mlp "):
        passes(tmp_path)


def test_the_gate_names_swapped_gate_and_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = DenseReader.read
    swap = {
        f"model.layers.1.mlp.{a}_proj.weight": f"model.layers.1.mlp.{b}_proj.weight"
        for a, b in (("gate", "up"), ("up", "gate"))
    }
    monkeypatch.setattr(DenseReader, "read", lambda self, name: good(self, swap.get(name, name)))
    with pytest.raises(ExportError, match=r"first at model\.layers\.1\.mlp "):
        passes(tmp_path)


def test_the_gate_names_a_wrong_rope_theta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = decoder_graph.skeleton

    def wrong(folder: Path) -> Any:
        model: Any = good(folder)
        own = model.model.rotary_emb
        own.inv_freq = own.inv_freq**1.2
        return model

    monkeypatch.setattr(decoder_graph, "skeleton", wrong)
    with pytest.raises(ExportError, match=r"first at model\.layers\.0\.self_attn "):
        passes(tmp_path)


def test_the_gate_notices_a_wrong_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = decoder_graph._Decoder._window
    monkeypatch.setattr(decoder_graph._Decoder, "_window", lambda *a: max(good(*a) + 1, 0) or -1)
    with pytest.raises(ExportError, match=r"first at model\.layers\.0\.self_attn "):
        passes(tmp_path, "mistral")


def test_float16_graph(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    params = ExportParams(formats=("onnx",), onnx_dtype="float16")
    metrics = onnx_export.export(tmp_path / "model", tmp_path, params)
    assert 1e-6 < metrics["onnx"]["parity"]["accuracy_level_0"]["prefill"] < 0.1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_exported_configs_give_the_rope_by_its_old_names_too(family: str, tmp_path: Path) -> None:
    heads = {"head_dim": 16} if family == "gemma3_text" else {}
    model: Any = save_tiny(tmp_path / "model", family, hidden_size=64, **heads)
    save_tokenizer(tmp_path / "model")
    onnx_export.export(tmp_path / "model", tmp_path, ExportParams())
    rope = model.config.rope_parameters
    for folder in ("safetensors", "onnx"):
        raw = json.loads((tmp_path / folder / "config.json").read_text())
        assert raw["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
        assert raw["rope_scaling"] is None
        sliding = rope.get("sliding_attention", {})
        assert raw.get("rope_local_base_freq") == sliding.get("rope_theta")
        assert AutoConfig.from_pretrained(tmp_path / folder).rope_parameters == rope
