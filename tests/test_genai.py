"""The folder is one that onnxruntime-genai runs as it is."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from compressor.export import ExportParams
from compressor.export import onnx as onnx_export
from compressor.export.genai import GENAI
from compressor.runtimes.session import Session
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


@pytest.mark.slow
def test_its_generator_gives_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    genai = importlib.import_module("onnxruntime_genai")
    path, prompt = folder(tmp_path), np.array([5, 9, 33, 4], np.int32)
    params = genai.GeneratorParams(genai.Model(str(path)))
    params.set_search_options(max_length=20, do_sample=False)
    generator = genai.Generator(genai.Model(str(path)), params)
    generator.append_tokens(prompt[None])
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(t) for t in generator.get_sequence(0)][4:]
    expected = Session(path, "cpu").generate(prompt[None].astype(np.int64), 16)
    assert found == expected[: len(found)]
