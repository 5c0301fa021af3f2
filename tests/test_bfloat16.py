"""bfloat16: the float32 graph with every float rounded, which only CUDA computes.

There is no CUDA here and onnxruntime's CPU has no kernels for the type, so graphs are compared with
those in float32 node by node, and computed with their types widened to float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from compressor.errors import ExportError, InferenceError
from compressor.export import ExportParams, parity
from compressor.export import onnx as onnx_export
from compressor.export import traced as traced_graph
from compressor.export.decoder_graph import build
from compressor.export.parity import answer, ask, differences, questions, reference
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.runtimes import find
from compressor.runtimes.session import CUDA, MODEL, Session, floats
from tests.tiny import save_tiny, save_tokenizer, tiny, tokens

BF16, FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def graphs(tmp_path: Path, **settings: Any) -> tuple[ir.Graph, ir.Graph]:
    """The graph of tmp_path/model in float32 and in bfloat16."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        build(tmp_path / "model", folder, dtype, **settings)
        found.append(ir.load(folder / MODEL).graph)
    return found[0], found[1]


def widen(folder: Path) -> None:
    """Rewrite a graph in bfloat16 so that float32 computes it, with the same numbers."""
    model = ir.load(folder / MODEL)
    for value in model.graph.initializers.values():
        if value.dtype == BF16:
            assert value.const_value is not None
            array = value.const_value.numpy().astype(np.float32)
            value.const_value, value.dtype = ir.tensor(array, name=value.name), FP32
    outputs = [v for node in model.graph for v in node.outputs]
    for value in (*model.graph.inputs, *outputs):
        if value.dtype == BF16:
            value.dtype = FP32
    ir.save(model, folder / MODEL)


@pytest.mark.parametrize(
    ("family", "bits", "settings"),
    [
        ("llama", 0, {}),
        ("qwen2", 0, {}),
        ("gemma3_text", 0, {}),
        ("llama", 4, {"head_bits": 4}),
    ],
)
def test_it_is_the_float32_graph_rounded(
    family: str, bits: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    heads = {"head_dim": 16} if family == "gemma3_text" else {}
    tied = {"tie_word_embeddings": bool(bits)}
    save_tiny(tmp_path / ("dense" if bits else "model"), family, hidden_size=64, **heads, **tied)
    if bits:
        params = RtnParams(bits=bits, group_size=16, symmetric=False)
        quantize(tmp_path / "dense", tmp_path / "model", None, "rtn", params)
    wide, narrow = graphs(tmp_path, **settings)
    *nodes, cast = narrow
    assert cast.op_type == "Cast" and cast.outputs[0].dtype == FP32
    for a, b in zip(wide, nodes, strict=True):
        assert (a.op_type, a.attributes) == (b.op_type, b.attributes)
        assert [v and v.name for v in a.inputs] == [v and v.name for v in b.inputs]
    assert wide.initializers.keys() == narrow.initializers.keys()
    for name, value in wide.initializers.items():
        own, other = value.const_value, narrow.initializers[name].const_value
        assert own is not None and other is not None
        assert other.dtype == (BF16 if own.dtype == FP32 else own.dtype)
        rounded = own.numpy().astype(ml_dtypes.bfloat16) if own.dtype == FP32 else own.numpy()
        np.testing.assert_array_equal(other.numpy(), rounded)
    floats = [v for v in (*narrow.inputs, *narrow.outputs) if v.dtype in (BF16, FP32)]
    assert {v.name for v in floats if v.dtype == FP32} == {"logits"}


@pytest.mark.parametrize("bits", [0, 4])
def test_its_types_are_what_the_operators_take(bits: int, tmp_path: Path) -> None:
    """onnxruntime checks types before it looks for kernels, which it then does not find."""
    source = tmp_path / ("dense" if bits else "model")
    save_tiny(source, "gemma3_text", hidden_size=64, head_dim=16)
    if bits:
        quantize(source, tmp_path / "model", None, "rtn", RtnParams(bits=bits, group_size=16))
    (tmp_path / "onnx").mkdir()
    build(tmp_path / "model", tmp_path / "onnx", torch.bfloat16)
    with pytest.raises(InferenceError, match=r"NOT_IMPLEMENTED.* Could not find"):
        Session(tmp_path / "onnx", "cpu")


def test_its_numbers_are_those_of_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    (tmp_path / "onnx").mkdir()
    build(tmp_path / "model", tmp_path / "onnx", torch.bfloat16)
    widen(tmp_path / "onnx")
    model = reference(tmp_path / "model").bfloat16().float()
    model.model.rotary_emb.register_forward_hook(
        lambda _, __, tables: tuple(table.bfloat16().float() for table in tables)
    )
    model.model.rotary_emb.inv_freq = reference(tmp_path / "model").model.rotary_emb.inv_freq
    monkeypatch.setattr(parity, "reference", lambda *_: model)
    asked = questions(model.config, tokens(4, 40), 4)
    said = ask(Session(tmp_path / "onnx", "cpu"), asked)
    found, equal = differences(said, answer(tmp_path / "model", None, asked, said.tokens))
    assert max(found.values()) < 1e-4 and equal == said.tokens.size


def test_without_cuda_it_is_refused_before_any_work(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    params = ExportParams(onnx_dtype="bfloat16")
    with pytest.raises(ExportError, match=r"CUDA alone.*float16"):
        onnx_export.export(tmp_path / "model", tmp_path / "out", params)
    assert not (tmp_path / "out").exists()


def test_the_gate_takes_it_where_there_is_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    save_tokenizer(tmp_path / "model")
    cuda = SimpleNamespace(get_available_providers=lambda: [CUDA])
    monkeypatch.setattr(onnx_export, "load_onnxruntime", lambda: cuda)

    def widened(folder: Path, *, prepack: bool) -> Session:
        widen(folder)
        return Session(folder, "cpu")

    monkeypatch.setattr(onnx_export, "Session", widened)
    params = ExportParams(onnx_dtype="bfloat16", check_tokens=4)
    metrics = onnx_export.export(tmp_path / "model", tmp_path, params)
    assert 1e-4 < metrics["onnx"]["parity"]["accuracy_level_0"]["prefill"] < 0.2
    decoder = json.loads((tmp_path / "onnx/genai_config.json").read_text())["model"]["decoder"]
    assert decoder["session_options"]["provider_options"] == [{"cuda": {}}]


def test_what_is_traced_gives_float32_logits_and_caches_in_bfloat16() -> None:
    traced = traced_graph._WithCache(tiny("gpt2", n_layer=1, num_hidden_layers=1).bfloat16())
    past = [torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)] * 2
    logits, key, value = traced(tokens(1, 2), torch.ones(1, 4, dtype=torch.long), *past)
    assert (logits.dtype, key.dtype, value.dtype) == (torch.float32, *[torch.bfloat16] * 2)


def with_bfloat16_cache(folder: Path) -> None:
    """Rewrite a graph in float32 so that its cache comes and goes in bfloat16."""
    model = ir.load(folder / MODEL)
    graph = model.graph
    for value in graph.inputs[2:]:
        uses = list(value.uses())
        node = ir.node("Cast", [value], {"to": FP32})
        for user, index in uses:
            user.replace_input_with(index, node.outputs[0])
        value.dtype = BF16
        graph.insert_before(graph[0], node)
    for index, value in enumerate(graph.outputs):
        if value.name == "logits":
            continue
        node = ir.node("Cast", [value], {"to": BF16})
        new, node.outputs[0].name, value.name = node.outputs[0], value.name, f"{value.name}.wide"
        new.dtype, new.shape = BF16, value.shape
        graph.append(node)
        graph.outputs[index] = new
    ir.save(model, folder / MODEL)


def test_a_cache_in_bfloat16_runs_as_arrays_and_in_one_buffer(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama", hidden_size=64)
    save_tokenizer(tmp_path / "model")
    onnx_export.export(tmp_path / "model", tmp_path, ExportParams(check_tokens=1))
    with_bfloat16_cache(tmp_path / "onnx")
    row = tokens(1, 24)
    with torch.no_grad():
        expected = model(row).logits[0].numpy()
    session = Session(tmp_path / "onnx", "cpu")
    runtime = find(tmp_path / "onnx").open("cpu")
    assert runtime.facts.shared_cache and session.dtype().itemsize == 2
    logits, cache = session.run(row[:, :20].numpy())
    first = runtime.prefill(row[0, :20].tolist())
    np.testing.assert_allclose(first, logits[0, -1], atol=1e-5)
    for position in range(20, 24):
        logits, cache = session.run(row[:, position : position + 1].numpy(), cache)
        step = runtime.step(int(row[0, position]))
        np.testing.assert_allclose(step, logits[0, -1], atol=1e-5)
        np.testing.assert_allclose(step, expected[position], atol=0.1)
        assert np.abs(step - expected[position]).max() > 1e-4  # it really is rounded


def test_bits_of_bfloat16_are_widened() -> None:
    x = torch.tensor([1.0, -2.5, 3e-39, 1e38, float("inf")]).bfloat16()
    assert floats(x.view(torch.uint16).numpy()).tolist() == x.float().tolist()
