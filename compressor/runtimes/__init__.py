"""Runtimes: one small interface over transformers, onnxruntime and onnxruntime-genai.

A `Runtime` reads tokens, gives the logits of the next and keeps its cache; generating, chatting
and timing are written once on top of it. Opening one for ONNX imports no torch.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import InferenceError, did_you_mean
from compressor.memory import import_for_good
from compressor.runtimes.base import Runtime

RUNTIMES = {
    "onnxruntime": "compressor.runtimes.onnx_runtime:OnnxRuntime",
    "torch": "compressor.runtimes.torch_runtime:TorchRuntime",
    "genai": "compressor.runtimes.genai_runtime:GenaiRuntime",
}
"""In the order in which `auto` prefers them; genai runs only when it is asked for."""

_HOMES = {
    "onnxruntime": ("model.onnx", ("", "onnx")),
    "torch": ("*.safetensors", ("", "safetensors")),
    "genai": ("genai_config.json", ("", "onnx")),
}
"""The file that tells that a runtime runs a folder, and the folders in which it is looked for."""


@dataclass(frozen=True)
class Target:
    """A folder and what runs it."""

    folder: Path
    runtime: str

    def open(self, device: str = "auto", threads: int | None = None) -> Runtime:
        """Load the model; raises `InferenceError` and `MissingDependency` in one line."""
        module, _, name = RUNTIMES[self.runtime].partition(":")
        runtime: Runtime = getattr(import_for_good(module), name)(self.folder, device, threads)
        return runtime


def find(folder: Path, runtime: str = "auto") -> Target:
    """What `runtime` would run of an export, its `onnx/` or `safetensors/`, or a checkpoint.

    `auto` takes onnxruntime where there is a graph and the package, else torch. Raises
    `InferenceError` for a folder in which that runtime finds nothing.
    """
    if runtime != "auto" and runtime not in RUNTIMES:
        raise InferenceError(f"no runtime {runtime!r}{did_you_mean(runtime, RUNTIMES)}")
    if not folder.is_dir():
        raise InferenceError(f"{folder}: no such folder; give an export or a checkpoint")
    homes = {name: _home(folder, name) for name in RUNTIMES}
    asked = ("onnxruntime", "torch") if runtime == "auto" else (runtime,)
    there = [name for name in asked if homes[name]]
    if runtime == "auto" and len(there) == 2 and not importlib.util.find_spec("onnxruntime"):
        there = ["torch"]
    if not there:
        missing = " and no ".join(_HOMES[name][0] for name in asked)
        others = [name for name, home in homes.items() if home]
        hint = f"; it runs in {' and '.join(others)}" if others else ""
        raise InferenceError(f"{folder}: no {missing} here{hint}")
    home = homes[there[0]]
    assert home
    return Target(home, there[0])


def _home(folder: Path, runtime: str) -> Path | None:
    pattern, places = _HOMES[runtime]
    found = (folder / place for place in places if any((folder / place).glob(pattern)))
    return next(found, None)
