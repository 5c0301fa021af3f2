"""A decoder graph in onnxruntime: batches, padding, caches as arrays."""

from __future__ import annotations

import ctypes
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import InferenceError, MissingDependency

log = logging.getLogger(__name__)
MODEL = "model.onnx"
CUDA = "CUDAExecutionProvider"
APPENDING = "compress.cache_appends"
"""Metadata of graphs whose cache keeps padding too: their mask may have holes."""

Cache = dict[str, np.ndarray]
BFLOAT16 = 16
"""The type's number in ONNX."""
_HELD = {"tensor(float16)": np.float16, "tensor(bfloat16)": np.uint16}
"""What arrays hold a type of ONNX in; numpy lacks bfloat16, so its bits stand in uint16."""


class Session:
    """A graph with inputs `past_key_values.*`, on CUDA where it is there, else on the CPU.

    Attributes:
        inference: onnxruntime's own session.
        providers: what onnxruntime really uses; it falls back without an error.
        past: (heads, channels) of every cache input; `dtype` is that of the arrays which hold it.
        inputs: names of all inputs.
        appends: whether the cache keeps padding too, so that the mask may have holes.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "auto",
        model: str = MODEL,
        threads: int | None = None,
        prepack: bool = True,
    ) -> None:
        """Load the graph `model` from `folder`; `threads` None is onnxruntime's own choice.

        Without `prepack` the CPU multiplies with the mapped file, not with a copy in the order
        its kernels like: no time to load, half the memory, and a token takes half as long again.
        """
        onnxruntime = load_onnxruntime()
        wanted = [CUDA] if device in ("auto", "cuda") else []
        offered = onnxruntime.get_available_providers()
        if device == "cuda" and not set(wanted) <= set(offered):
            raise InferenceError(
                "device cuda, but this onnxruntime offers no CUDAExecutionProvider; "
                "see: compress doctor"
            )
        chosen = [p for p in wanted if p in offered] + ["CPUExecutionProvider"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
        errors = onnxruntime.capi.onnxruntime_pybind11_state
        try:
            self.inference: Any = onnxruntime.InferenceSession(
                str(folder / model), options, providers=chosen
            )
        except (errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NoSuchFile,
                errors.NotImplemented, errors.InvalidArgument) as error:  # fmt: skip
            reason = str(error).strip().partition("\n")[0]
            raise InferenceError(
                f"{folder / model}: onnxruntime {onnxruntime.__version__} cannot load it ({reason})"
            ) from error
        self.providers: list[str] = self.inference.get_providers()
        if self.providers[0] != chosen[0]:
            log.warning("onnxruntime fell back to %s; see: compress doctor", self.providers[0])
        self.appends = APPENDING in self.inference.get_modelmeta().custom_metadata_map
        self.inputs = {i.name for i in self.inference.get_inputs()}
        past = [i for i in self.inference.get_inputs() if i.name.startswith("past_key_values")]
        self._outputs = [o.name for o in self.inference.get_outputs()]
        if not {"input_ids", "attention_mask"} <= self.inputs or not past:
            raise InferenceError(
                f"{folder / model}: not a decoder with a KV cache (inputs input_ids, "
                f"attention_mask, past_key_values.*); it has {', '.join(sorted(self.inputs)[:6])}"
            )
        self.dtype: Any = _HELD.get(past[0].type, np.float32)
        self.past = _sizes(folder, {i.name: i.shape for i in past})

    def empty_cache(self, batch: int = 1, length: int = 0) -> Cache:
        """A KV cache without entries, with room for `length` of them, side by side in memory."""
        sizes = [batch * heads * length * channels for heads, channels in self.past.values()]
        parts = np.split(np.zeros(sum(sizes), self.dtype), np.cumsum(sizes)[:-1])
        return {
            name: part.reshape(batch, heads, length, channels)
            for part, (name, (heads, channels)) in zip(parts, self.past.items(), strict=True)
        }

    def run(
        self, ids: np.ndarray, cache: Cache | None = None, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Float32 logits (B, S, V) of ids (B, S) after the cached tokens, and the grown cache.

        `mask` (B, P + S) marks real tokens; padding stands on the right.
        Raises `InferenceError` for padding on the left, which the graph cannot express.
        """
        values = self.values(ids, cache, mask)
        grown = {k: v for k, v in values.items() if k.startswith("present.")}
        return floats(values["logits"]), {
            k.replace("present.", "past_key_values."): v for k, v in grown.items()
        }

    def values(
        self, ids: np.ndarray, cache: Cache | None = None, mask: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Every output by name, of ids (B, S) after the cached tokens."""
        cache = cache or self.empty_cache(len(ids))
        past = next(iter(cache.values())).shape[2]
        if mask is None:
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        if not self.appends and (np.diff(mask, axis=1) > 0).any():
            raise InferenceError("the batch is padded on the left; pad on the right for this graph")
        feeds = {"input_ids": ids, "attention_mask": mask, **cache}
        if "position_ids" in self.inputs:
            positions = mask.cumsum(axis=1)[:, past:] - 1
            feeds["position_ids"] = np.maximum(positions, 0)
        if self.dtype != np.uint16:
            return dict(zip(self._outputs, self.inference.run(None, feeds), strict=True))
        given = {name: _value(array) for name, array in feeds.items()}
        found = self.inference.run_with_ort_values(self._outputs, given)
        return dict(zip(self._outputs, map(to_array, found), strict=True))

    def generate(self, ids: np.ndarray, count: int, cache: Cache | None = None) -> list[int]:
        """`count` greedy tokens after ids (1, S), with the KV cache."""
        tokens: list[int] = []
        for _ in range(count):
            logits, cache = self.run(ids, cache)
            tokens.append(int(logits[0, -1].argmax()))
            ids = np.array([[tokens[-1]]], np.int64)
        return tokens


def _sizes(folder: Path, shapes: dict[str, list[Any]]) -> dict[str, tuple[int, int]]:
    """Heads and channels of cache inputs, those that their graph leaves open as GenAI is told."""
    sizes = {name: (shape[1], shape[3]) for name, shape in shapes.items()}
    if all(isinstance(own, int) for size in sizes.values() for own in size):
        return sizes
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    decoder = config.get("model", {}).get("decoder", {})
    told = decoder.get("num_key_value_heads"), decoder.get("head_size")
    for name, size in sizes.items():
        heads, channels = (
            own if isinstance(own, int) else known for own, known in zip(size, told, strict=True)
        )
        if heads is None or channels is None:
            raise InferenceError(
                f"{folder}: the graph's cache is {shapes[name]}, and no genai_config.json tells "
                "its heads and their channels; export it with fixed sizes"
            )
        sizes[name] = heads, channels
    return sizes


def _value(array: np.ndarray) -> Any:
    """An array as onnxruntime's own value of the same memory."""
    value = load_onnxruntime().OrtValue
    if array.dtype == np.uint16:
        return value.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return value.ortvalue_from_numpy(array)


def to_array(value: Any) -> np.ndarray:
    """Onnxruntime's value, in its own memory where numpy has the type; bfloat16 as its bits.

    A value in bfloat16 must be on the CPU.
    """
    if value.element_type() != BFLOAT16:
        array: np.ndarray = value.numpy()
        return array
    memory = (ctypes.c_uint16 * math.prod(value.shape())).from_address(value.data_ptr())
    return np.frombuffer(memory, np.uint16).reshape(value.shape()).copy()


def floats(array: np.ndarray) -> np.ndarray:
    """Float32 of logits or activations in any dtype; uint16 holds the bits of bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def load_onnxruntime() -> Any:
    """The package; raises `MissingDependency` where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency("onnxruntime", "cpu", "running an ONNX export") from None
    return onnxruntime
