"""transformers on a folder of safetensors: the runtime that every checkpoint must load in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from compressor.decoder import skeleton
from compressor.dense import DenseReader
from compressor.errors import InferenceError
from compressor.runtimes.base import Facts, Runtime
from compressor.shallow import register

register()


def load_model(folder: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """The checkpoint in transformers, on the CPU; integers are expanded by our own reader.

    So that every width, zero point and file format gives exactly (q - z) s, whatever the
    installed quantization packages make of it.
    """
    reader = DenseReader(folder)
    if not reader.checkpoint.quantized:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    dtype = reader.checkpoint.dtype if isinstance(dtype, str) else dtype
    model: Any = skeleton(folder)
    names = [n for n in model.state_dict() if n not in model.all_tied_weights_keys]
    state = {name: reader.read(name).to(dtype) for name in names}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model


class TorchRuntime(Runtime):
    """Plain transformers: float32 on the CPU, the checkpoint's own dtype on a GPU."""

    name = "torch"

    def __init__(self, folder: Path, device: str = "auto", threads: int | None = None) -> None:
        """Load the model; `threads` is set for the whole process."""
        super().__init__(Facts.of(folder))
        there = torch.cuda.is_available()
        if device == "cuda" and not there:
            raise InferenceError("device cuda, but torch sees no CUDA device; see: compress doctor")
        self.device = "cuda" if there and device != "cpu" else "cpu"
        if threads:
            torch.set_num_threads(threads)
        dtype = torch.float32 if self.device == "cpu" else "auto"
        self.model = load_model(folder, dtype).to(self.device)
        self._cache: Any = DynamicCache(config=self.model.config)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that a step reads; a sliding window keeps its own length."""
        kept = [t for l in self._cache.layers if l.is_initialized for t in (l.keys, l.values)]
        return sum(t.numel() * t.element_size() for t in kept)

    @torch.inference_mode()
    def _forward(self, tokens: list[int]) -> np.ndarray:
        ids = torch.tensor([tokens], device=self.device)
        out = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().cpu().numpy()

    def _cut(self, length: int) -> bool:
        try:
            self._cache.crop(length - len(self.tokens))
        except RuntimeError:  # a sliding window that has moved on
            length = 0
        if not length:
            self._cache = DynamicCache(config=self.model.config)
        return length > 0
