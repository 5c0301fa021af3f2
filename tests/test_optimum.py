"""An exported folder in optimum-onnx, which lives with transformers 4 in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compressor.export import ExportParams
from compressor.export import onnx as onnx_export
from tests.test_genai import torch_tokens
from tests.tiny import save_tiny, save_tokenizer

PYTHON = os.environ.get("OPTIMUM_PYTHON")
READER = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([json.loads(sys.argv[2])])
tokens = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)[0].tolist()
print(json.dumps([getattr(model.config, "rope_theta", None), tokens[ids.shape[1]:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="no environment with optimum-onnx; run: make test-slow")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen3", {"head_dim": 16}),
        ("gemma3_text", {"head_dim": 16}),
    ],
)
def test_it_loads_and_gives_the_same_tokens(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    source, prompt = tmp_path / "model", [5, 9, 33, 4]
    model: Any = save_tiny(source, family, hidden_size=64, **settings)
    save_tokenizer(source)
    onnx_export.export(source, tmp_path, ExportParams(formats=("onnx",)))
    command = [PYTHON or "", "-W", "ignore", "-c", READER, tmp_path / "onnx", json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theta, tokens = json.loads(done.stdout.splitlines()[-1])
    rope = model.config.rope_parameters
    assert theta == rope.get("full_attention", rope)["rope_theta"]
    assert tokens == torch_tokens(source, prompt, 16)
