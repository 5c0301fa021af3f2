"""onnxruntime on a folder with `model.onnx`, ours or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compressor.memory import use_huge_pages
from compressor.runtimes.base import Facts, Runtime
from compressor.runtimes.session import BFLOAT16, Session, floats, to_array

_ROOM = 256  # tokens in the first buffer; a full one is doubled


class OnnxRuntime(Runtime):
    """A decoder graph with its KV cache.

    Where `genai_config.json` says `past_present_share_buffer`, past and present are one buffer
    with room to spare, bound once: a step copies no keys and values. Other graphs return a grown
    cache each time, which costs a copy of it.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path, device: str = "auto", threads: int | None = None) -> None:
        """Load the graph; raises `InferenceError` and `MissingDependency`."""
        super().__init__(Facts.of(folder))
        self._session = Session(folder, device, threads=threads)
        self.device = "cuda" if self._session.providers[0].startswith("CUDA") else "cpu"
        if self.device == "cpu":
            use_huge_pages()
        self._cache = self._session.empty_cache()
        self._room = 0
        self._buffers: dict[str, Any] = {}
        self._logits: Any = None  # what a step's logits are written into, made by the first
        self._binding: Any = self._session.inference.io_binding()

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that a step reads."""
        token = sum(heads * channels for heads, channels in self._session.past.values())
        return token * self._session.dtype().itemsize * len(self.tokens)

    def _forward(self, tokens: list[int]) -> np.ndarray:
        ids = np.array([tokens], np.int64)
        if self.facts.shared_cache:
            logits = self._in_place(ids)
        else:
            logits, self._cache = self._session.run(ids, self._cache)
        return floats(logits[0, -1])

    def _cut(self, length: int) -> bool:
        if not self.facts.shared_cache:  # what a buffer holds behind the length is never read
            self._cache = {
                n: np.ascontiguousarray(v[:, :, :length]) for n, v in self._cache.items()
            }
        return True

    def _in_place(self, ids: np.ndarray) -> np.ndarray:
        total = len(self.tokens) + ids.shape[1]
        if total > self._room:
            self._grow(max(total, 2 * self._room, _ROOM))
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        if "position_ids" in self._session.inputs:
            places = np.arange(len(self.tokens), total)[None]
            self._binding.bind_cpu_input("position_ids", places)
        if ids.shape[1] > 1 or self._logits is None:
            self._binding.bind_output("logits", "cpu")
        else:
            self._binding.bind_ortvalue_output("logits", self._logits)
        self._session.inference.run_with_iobinding(self._binding)
        if ids.shape[1] > 1:
            return to_array(self._binding.get_outputs()[-1])
        if self._logits is None:  # asking a binding for its outputs gives the whole cache too
            self._logits = self._binding.get_outputs()[-1]
        return to_array(self._logits).copy()

    def _grow(self, room: int) -> None:
        """Move the cache into buffers for `room` tokens, each bound as past and as present."""
        from onnxruntime import OrtValue

        self._room = min(room, self.facts.context or room)
        self._binding.clear_binding_outputs()
        used, dtype = len(self.tokens), self._session.dtype
        for name, array in self._session.empty_cache(length=self._room).items():
            if used:
                array[:, :, :used] = self._buffers[name].numpy()[:, :, :used]
            self._cache[name] = array  # on the CPU the buffer is this very memory
            self._buffers[name] = buffer = OrtValue.ortvalue_from_numpy(array, self.device)
            kind = BFLOAT16 if dtype == np.uint16 else dtype
            place = self.device, 0, kind, array.shape, buffer.data_ptr()
            self._binding.bind_input(name, *place)
            self._binding.bind_output(name.replace("past_key_values", "present"), *place)
