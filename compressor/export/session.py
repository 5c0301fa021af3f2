"""Running an exported folder in onnxruntime."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import ExportError, MissingDependency
from compressor.export.graph import MODEL
from compressor.timing import speed

log = logging.getLogger(__name__)
APPENDING = "compress.cache_appends"
"""Metadata of graphs whose cache keeps padding too: their mask may have holes."""
SINCE = {2: (1, 24), 4: (1, 23), 8: (1, 23)}
"""First onnxruntime whose CPU kernels multiply integers of each width (measured, 1.20 to 1.32)."""
Cache = dict[str, np.ndarray]


class Session:
    """An exported graph in onnxruntime, on CUDA where it is there, else on the CPU.

    Attributes:
        providers: what onnxruntime really uses; it falls back without an error.
        vocabulary: how many tokens there are.
        appends: whether the cache keeps padding too, so that the mask may have holes.
    """

    def __init__(self, folder: Path, device: str = "auto", model: str = MODEL) -> None:
        """Load the graph `model` from `folder`."""
        onnxruntime = _onnxruntime()
        wanted = ["CUDAExecutionProvider"] if device in ("auto", "cuda") else []
        offered = onnxruntime.get_available_providers()
        chosen = [p for p in wanted if p in offered] + ["CPUExecutionProvider"]
        self._session: Any = onnxruntime.InferenceSession(str(folder / model), providers=chosen)
        self.providers: list[str] = self._session.get_providers()
        if self.providers[0] != chosen[0]:
            log.warning("onnxruntime fell back to %s; see: compress doctor", self.providers[0])
        self.appends = APPENDING in self._session.get_modelmeta().custom_metadata_map
        inputs = {i.name: i for i in self._session.get_inputs()}
        self._past = [i for name, i in inputs.items() if name.startswith("past_key_values.")]
        outputs = self._session.get_outputs()
        self._outputs = [o.name for o in outputs]
        self.vocabulary: int = outputs[0].shape[2]
        self._dtype = np.float16 if "float16" in self._past[0].type else np.float32

    def empty_cache(self, batch: int = 1) -> Cache:
        """A KV cache without entries."""
        return {
            i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), self._dtype) for i in self._past
        }

    def run(
        self, ids: np.ndarray, cache: Cache | None = None, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Logits (B, S, V) of ids (B, S) after the cached tokens, and the grown cache.

        `mask` (B, P + S) marks real tokens; padding stands on the right.
        Raises `ExportError` for padding on the left, which the graph cannot express.
        """
        values = self.values(ids, cache, mask)
        grown = {k: v for k, v in values.items() if k.startswith("present.")}
        return values["logits"], {
            k.replace("present.", "past_key_values."): v for k, v in grown.items()
        }

    def values(
        self, ids: np.ndarray, cache: Cache | None = None, mask: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Every output by name, of ids (B, S) after the cached tokens."""
        cache = cache or self.empty_cache(len(ids))
        if mask is None:
            past = next(iter(cache.values())).shape[2]
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        if not self.appends and (np.diff(mask, axis=1) > 0).any():
            raise ExportError("the batch is padded on the left; pad on the right for this graph")
        feeds = {"input_ids": ids, "attention_mask": mask, **cache}
        return dict(zip(self._outputs, self._session.run(None, feeds), strict=True))

    def generate(self, ids: np.ndarray, count: int, cache: Cache | None = None) -> list[int]:
        """`count` greedy tokens after ids (1, S), with the KV cache."""
        tokens: list[int] = []
        for _ in range(count):
            logits, cache = self.run(ids, cache)
            tokens.append(int(logits[0, -1].argmax()))
            ids = np.array([[tokens[-1]]], np.int64)
        return tokens


def check_widths(containers: set[int]) -> None:
    """Raises `ExportError` where the installed onnxruntime is too old for a width."""
    version: str = _onnxruntime().__version__
    found = tuple(map(int, version.split(".")[:2]))
    for bits in sorted(containers):
        if found < SINCE[bits]:
            needed = ".".join(map(str, SINCE[bits]))
            raise ExportError(
                f"{bits}-bit integers need onnxruntime {needed}, here is {version}; "
                f"run: pip install -U 'onnxruntime>={needed}', or set export.formats to "
                "[safetensors]"
            )


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency("onnxruntime", "cpu", "running an ONNX export") from None
    return onnxruntime


def measure(
    folder: Path, *, device: str, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Prefill and decode tokens/s of an exported graph, batch 1, with its KV cache."""
    session = Session(folder, device)
    prompt = np.random.default_rng(0).integers(session.vocabulary, size=(1, prompt_tokens))
    _, cache = session.run(prompt)
    return speed(
        lambda: session.run(prompt),
        lambda: session.generate(prompt[:, -1:], new_tokens, cache),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
    )
