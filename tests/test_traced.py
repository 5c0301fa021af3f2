"""Graphs traced by torch: the fallback for families without emitted nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from torch import nn

from compressor.errors import ExportError
from compressor.export import ExportParams
from compressor.export import onnx as onnx_export
from compressor.export.graph import DATA
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.records import BitPlan
from compressor.runtimes.session import MODEL
from tests.test_genai import genai_tokens, torch_tokens
from tests.tiny import save_tiny, save_tokenizer

pytest.importorskip("onnxscript")


def traced(tmp_path: Path, source: Path, **settings: Any) -> dict[str, Any]:
    params = ExportParams(formats=("onnx",), check_tokens=6, **settings)
    out = tmp_path / "out"
    out.mkdir()
    return onnx_export.export(source, out, params)["onnx"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_family_without_emitted_nodes_passes_the_gate(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family, num_hidden_layers=2, n_layer=2)
    save_tokenizer(tmp_path / "model")
    found = traced(tmp_path, tmp_path / "model")
    assert found["graph"] == "traced"
    assert max(found["parity"]["accuracy_level_0"].values()) < 1e-4
    assert found["parity"]["greedy_equal"] == found["parity"]["greedy_tokens"] == 18
    weights = sum(p.numel() * 4 for p in model.parameters())
    folder, prompt = tmp_path / "out/onnx", [5, 9, 33, 4]
    assert (folder / DATA).stat().st_size < 1.3 * weights
    search = json.loads((folder / "genai_config.json").read_text())["search"]
    assert search["past_present_share_buffer"] is False
    tokens = genai_tokens(folder, prompt, 12)
    assert tokens == torch_tokens(tmp_path / "model", prompt, 12)[: len(tokens)] and tokens


def test_packed_linears_keep_their_integers(tmp_path: Path) -> None:
    source, packed = tmp_path / "model", tmp_path / "packed"
    save_tiny(source, "opt", num_hidden_layers=2, ffn_dim=64)
    save_tokenizer(source)
    widths = BitPlan.model_validate({"linears": {"*.fc1": 8, "*.out_proj": 2}})
    quantize(source, packed, None, "rtn", RtnParams(bits=4, group_size=16, scheme=widths))
    found = traced(tmp_path, packed)
    assert max(found["parity"]["accuracy_level_0"].values()) < 1e-4
    graph = ir.load(tmp_path / "out/onnx" / MODEL).graph
    nodes = [node for node in graph if node.op_type == "MatMulNBits"]
    assert sorted(n.attributes["bits"].as_int() for n in nodes) == [2] * 2 + [4] * 8 + [8] * 2
    assert 0 < found["nominal_bytes"] == found["container_bytes"]


def test_the_gate_names_a_module_of_a_traced_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "gpt2", n_layer=2)
    trace = onnx_export.trace

    def wrong(model: Any, *rest: Any) -> Any:
        block = model.transformer.h[1].mlp.c_proj
        block.weight = nn.Parameter(block.weight * 1.5)
        return trace(model, *rest)

    monkeypatch.setattr(onnx_export, "trace", wrong)
    with pytest.raises(ExportError, match=r"first at transformer\.h\.1\.mlp"):
        traced(tmp_path, tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"graph": "emitted"}, "no ONNX nodes"), ({"head_bits": 4}, "only in an emitted graph")],
)
def test_what_only_emitted_graphs_have(settings: Any, said: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "gpt2", n_layer=2)
    with pytest.raises(ExportError, match=said):
        traced(tmp_path, tmp_path / "model", **settings)
