"""The whole pipeline on a model without some sublayers, and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from compressor.checkpoint import Checkpoint
from compressor.export import ExportParams
from compressor.records import Selection
from tests.command_line import compress
from tests.test_prune_sublayers import load
from tests.tiny import save_project, tokens

CONFIG = """\
name: tiny
model: {path: model}
text:
  source: {path: corpus.jsonl, field: text}
  evaluation: {windows: 2, length: 32}
  calibration: {windows: 4, length: 32}
  healing: {windows: 8, length: 32}
evaluate: {prompt_tokens: 4, new_tokens: 2, repeats: 1}
stages:
  - score: [angular_distance, lamp]
  - select: {method: fixed, attention: [1], ffn: [0, 2]}
  - prune
  - score: [block_influence, layer_contribution]
  - heal: {method: lora, rank: 4, steps: 2, batch_size: 2}
  - quantize: {method: gptq, group_size: 16}
  - export: {formats: [safetensors]}
"""
ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()
print(type(model).__name__, sum("mlp" in layer._modules for layer in model.model.layers))
assert not any(name.startswith("compressor") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sublayers")
    save_project(folder, CONFIG, hidden_size=64)
    return folder


def test_every_stage_works_on_it(project: Path) -> None:
    result = compress(project, "run", "tiny.yaml", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    stages = {stage["label"]: stage["metrics"] for stage in record["stages"]}
    assert stages["prune"] == {"drop_blocks": [], "drop_attention": [1], "drop_ffn": [0, 2]}
    assert stages["evaluate prune"]["kl"] > 0
    original, pruned = (stages[f"evaluate {name}"] for name in ("original", "prune"))
    attention, ffn, norm = 4 * 64 * 64 - 2 * 32 * 64, 3 * 64 * 48, 64
    assert original["parameters"] - pruned["parameters"] == attention + 2 * ffn + 3 * norm
    assert pruned["speed"]["decode"]["median"] > 0
    folder = record["exports"]["safetensors"]
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, folder],
        cwd=folder,
        env={"HF_HOME": str(project / "hf"), "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert alone.stdout.split() == ["ShallowForCausalLM", "2"]


def test_the_command_line_removes_sublayers(project: Path) -> None:
    lists = ("--blocks", "3", "--attention", "1", "--ffn", "0-1")
    result = compress(project, "prune", "model", *lists, "-o", "cut", "--quiet")
    assert result.returncode == 0, result.stderr
    config = json.loads((project / "cut/config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["per_layer_config"] == {"0": {"skip": ["mlp"]}}
    search = ("--method", "sleb", "--part", "ffn", "-n", "1", "--protect", "[]")
    text = ("--text", "corpus.jsonl", "--field", "text", "--windows", "2", "--length", "16")
    result = compress(project, "select", "cut", *search, *text)
    assert "n = 1 is more than the 0 feed-forwards" in result.stderr
    again = compress(project, "prune", "cut", "--attention", "1", "-o", "again", "--quiet")
    assert again.returncode == 0, again.stderr
    config = json.loads((project / "again/config.json").read_text())
    assert config["per_layer_config"] == {"0": {"skip": ["mlp"]}, "1": {"skip": ["attention"]}}
    pytest.importorskip("onnx_ir")
    from compressor.export.onnx import export

    (project / "exported").mkdir()
    metrics = export(project / "again", project / "exported", ExportParams(formats=("onnx",)))
    parity = metrics["onnx"]["parity"]
    assert parity["greedy_equal"] == parity["greedy_tokens"] > 0
    config = json.loads((project / "exported/onnx/genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 1


def test_shared_weights_from_a_selection_to_a_healed_checkpoint(project: Path) -> None:
    """What `skrr` may choose: pruned, healed (its adapter serves both blocks) and evaluated."""
    chosen = Selection(num_blocks=4, drop_ffn=[3], reuse_attention={1: 2}, reuse_ffn={0: 1})
    chosen.save(project / "selection.json")
    given = ("--selection", "selection.json", "-o", "shared", "--quiet")
    result = compress(project, "prune", "model", *given)
    assert result.returncode == 0, result.stderr
    config = json.loads((project / "shared/config.json").read_text())
    assert config["per_layer_config"] == {"3": {"skip": ["mlp"]}}
    assert config["reused"] == {"0": {"mlp": 1}, "1": {"attention": 2}}
    text = ("--text", "corpus.jsonl", "--field", "text", "--windows", "4", "--length", "16")
    settings = ("--method", "lora", "--rank", "4", "--steps", "2", "--batch-size", "2")
    settings += ("--validation", "0", "--warmup-steps", "0")  # or the unhealed weights are kept
    healed = compress(project, "heal", "shared", *text, *settings, "-o", "healed", "--quiet")
    assert healed.returncode == 0, healed.stderr
    before, after = (Checkpoint(project / name) for name in ("shared", "healed"))
    assert set(before.names) == set(after.names)
    assert after.config["reused"] == config["reused"]
    given_name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(before.tensor(given_name), after.tensor(given_name))
    model = load(project / "healed").eval()
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
    adapted = PeftModel.from_pretrained(load(project / "shared"), project / "healed/adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
