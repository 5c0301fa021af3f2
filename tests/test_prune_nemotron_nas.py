"""The nemotron-nas flavour: the same model as the canonical one, in the fields servers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaForCausalLM

from compressor.checkpoint import Checkpoint
from compressor.decoder import skeleton
from compressor.errors import NotApplicable, UnsupportedArchitecture
from compressor.prune.driver import prune
from compressor.records import Selection
from compressor.shallow.configuration_decilm import ffn_width
from tests.test_prune_sublayers import load, logits, selection
from tests.tiny import save_tiny, save_tokenizer

DROP = {"drop_blocks": [1], "drop_attention": [2], "drop_ffn": [0]}
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
PLAIN = {"replace_with_linear": False, "sparsify": None}
WINDOW = {
    "window_length": None,
    "num_sink_tokens": None,
    "use_prefill_window_in_sink_attention": False,
    "unshifted_sink": False,
}


def cut(tmp_path: Path, family: str = "llama", drop: Any = DROP, **overrides: Any) -> Path:
    save_tiny(tmp_path / "source", family, **({"intermediate_size": 256} | overrides))
    prune(tmp_path / "source", selection(**drop), tmp_path / "nas", flavour="nemotron-nas")
    return tmp_path / "nas"


def test_its_graph_is_traced_and_passes_the_gate(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from compressor.export import ExportParams
    from compressor.export.onnx import export

    source = cut(tmp_path, drop={"drop_blocks": [1], "drop_ffn": [0]}, hidden_size=64)
    save_tokenizer(source)
    (tmp_path / "out").mkdir()
    params = ExportParams(formats=("onnx",), check_tokens=6)
    found = export(source, tmp_path / "out", params)["onnx"]
    assert found["graph"] == "traced"
    assert max(found["parity"]["accuracy_level_0"].values()) < 1e-4
    assert found["parity"]["greedy_equal"] == found["parity"]["greedy_tokens"] > 0


@pytest.mark.parametrize("width", [256, 1536, 14336, 18944])
@pytest.mark.parametrize("hidden", [32, 576, 3584, 4096])
def test_the_multiplier_gives_back_the_width(width: int, hidden: int) -> None:
    assert ffn_width(3 * width / (2 * hidden), hidden) == width
    assert ffn_width(3 * (width - 1) / (2 * hidden), hidden) == width
    assert ffn_width(3 * (width + 1) / (2 * hidden), hidden) == width + 256


def test_fields_are_those_that_servers_read(tmp_path: Path) -> None:
    config = json.loads((cut(tmp_path, rope_parameters=ROPE) / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas"
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 3
    assert config["intermediate_size"] is config["num_key_value_heads"] is None
    attention = {"no_op": False, "n_heads_in_group": 2, **PLAIN, **WINDOW}
    ffn = {"no_op": False, "ffn_mult": 12.0, **PLAIN}
    no_attention = attention | {"no_op": True, "n_heads_in_group": None}
    no_ffn = ffn | {"no_op": True, "ffn_mult": None}
    assert config["block_configs"] == [
        {"attention": attention, "ffn": no_ffn},
        {"attention": no_attention, "ffn": ffn},
        {"attention": attention, "ffn": ffn},
    ]
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    blocks = skeleton(tmp_path / "nas").config.block_configs
    assert (blocks[1].attention.no_op, blocks[0].ffn.no_op) == (True, True)


@pytest.mark.parametrize("overrides", [{}, {"rope_parameters": ROPE}], ids=["", "rope"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_equals_the_canonical_one(family: str, overrides: Any, tmp_path: Path) -> None:
    if family == "mistral":
        overrides = overrides | {"sliding_window": None}
    nas = cut(tmp_path, family, **overrides)
    prune(tmp_path / "source", selection(**DROP), tmp_path / "canonical", flavour="auto")
    assert sorted(Checkpoint(nas).names) == sorted(Checkpoint(tmp_path / "canonical").names)
    model = load(nas)
    assert torch.equal(logits(model), logits(load(tmp_path / "canonical")))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    with pytest.raises(StrictDataclassError, match="intermediate_size"):
        LlamaForCausalLM.from_pretrained(nas)


@pytest.mark.parametrize(
    ("family", "drop", "overrides", "said"),
    [
        ("llama", {"drop_attention": [0]}, {}, "layer 0 must keep its attention"),
        ("llama", {"drop_blocks": [0], "drop_attention": [1]}, {}, "layer 0 must keep"),
        ("qwen3", DROP, {}, r"also hold self_attn\.k_norm\.weight, self_attn\.q_norm\.weight"),
        ("qwen2", DROP, {}, r"also hold self_attn\.k_proj\.bias"),
        ("llama", DROP, {"mlp_bias": True}, r"also hold mlp\.down_proj\.bias"),
        ("mistral", DROP, {}, "limited to a window of 8 tokens"),
        ("llama", DROP, {"intermediate_size": 300}, "its 300 would be read as 512"),
        ("llama", DROP, {"head_dim": 4}, "4 heads of 4 do not make up hidden_size 32"),
        ("gpt2", DROP, {}, "also hold"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    family: str, drop: Any, overrides: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(NotApplicable, match=said) as refusal:
        cut(tmp_path, family, drop, **overrides)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "nas").exists()


def test_it_is_not_cut_again(tmp_path: Path) -> None:
    out = cut(tmp_path)
    last = Selection(num_blocks=3, drop_blocks=[2])
    with pytest.raises(NotApplicable, match="cut the one it was made from"):
        prune(out, last, tmp_path / "again", flavour="auto")


def test_blocks_of_different_sizes_are_not_read(tmp_path: Path) -> None:
    path = cut(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    config["block_configs"][2]["ffn"]["ffn_mult"] = 24.0
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedArchitecture, match="different sizes"):
        skeleton(path.parent)
