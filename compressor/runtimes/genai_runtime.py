"""onnxruntime-genai on a folder with `genai_config.json`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import InferenceError
from compressor.memory import use_huge_pages
from compressor.runtimes.base import Facts, Runtime


class GenaiRuntime(Runtime):
    """`og.Generator` fed token by token, so that sampling is ours as in the other runtimes."""

    name = "genai"

    def __init__(self, folder: Path, device: str = "auto", threads: int | None = None) -> None:
        """Load the folder; raises `InferenceError` where it or the package is missing."""
        super().__init__(Facts.of(folder))
        self._config = folder / "genai_config.json"
        try:
            self._genai: Any = importlib.import_module("onnxruntime_genai")
        except ImportError as error:
            raise InferenceError(
                f"the runtime genai needs onnxruntime-genai, which cannot be imported ({error}); "
                "run: pip install onnxruntime-genai"
            ) from None
        there = self._genai.is_cuda_available()
        if device == "cuda" and not there:
            raise InferenceError("device cuda, but this onnxruntime-genai was built without CUDA")
        self.device = "cuda" if there and device != "cpu" else "cpu"
        config = self._genai.Config(str(folder))
        if self.device == "cuda":
            config.clear_providers()
            config.append_provider("cuda")
        if threads:
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        try:
            self._model = self._genai.Model(config)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise InferenceError(f"{folder}: onnxruntime-genai cannot load it ({reason})") from None
        if self.device == "cpu":
            use_huge_pages()
        params = self._genai.GeneratorParams(self._model)
        if self.facts.context:
            params.set_search_options(max_length=self.facts.context)
        self._generator: Any = self._genai.Generator(self._model, params)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that a step reads, out of a buffer for the whole context."""
        decoder = json.loads(self._config.read_text(encoding="utf-8"))["model"]["decoder"]
        first = np.asarray(self._generator.get_input(decoder["inputs"]["past_key_names"] % 0))
        token = decoder["num_key_value_heads"] * decoder["head_size"] * first.itemsize
        return 2 * decoder["num_hidden_layers"] * token * len(self.tokens)

    def _forward(self, tokens: list[int]) -> np.ndarray:
        self._generator.append_tokens(np.array([tokens], np.int32))
        return np.asarray(self._generator.get_logits())[0, -1].astype(np.float32)

    def _cut(self, length: int) -> bool:
        self._generator.rewind_to(length)
        return True
