"""What this machine has, what is missing and the command that brings it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.table import size

REQUIRED = (
    "transformers", "safetensors", "accelerate", "peft", "bitsandbytes", "compressed-tensors",
    "gguf", "sentencepiece", "pyarrow", "numpy", "pydantic", "click", "rich", "ruamel.yaml", "tqdm",
)  # fmt: skip
OPTIONAL = {
    "onnx-ir": ("cpu", "writing ONNX"),
    "onnxscript": ("cpu", "tracing families whose graph is not emitted"),
    "datasets": ("hub", "hub data sets"),
    "matplotlib": ("plot", "pictures"),
    "lm-eval": ("eval", "task evaluation"),
}
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_LOW_DISK_BYTES = 10 * 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report; `fix` is a command, or empty when nothing is to be done."""

    name: str
    state: Literal["ok", "missing", "problem"]
    found: str
    fix: str = ""


def report(store: Path) -> list[Check]:
    """All checks, cheap ones first; imports torch and onnxruntime where they are there."""
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Check("cores", "ok", str(os.cpu_count())),
        Check("memory", "ok", size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
        _disk(store),
        _torch(),
        _four_bits(),
        *(_package(name, "pip install compress-llm", "needed") for name in REQUIRED),
        *(
            _package(name, f"pip install 'compress-llm[{extra}]'", purpose)
            for name, (extra, purpose) in OPTIONAL.items()
        ),
        _runtime(),
        _genai(),
    ]


def _disk(store: Path) -> Check:
    there = next(p for p in (store.resolve(), *store.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < _LOW_DISK_BYTES:
        return Check("disk", "problem", f"{size(free)} free at {there}", "use --store ELSEWHERE")
    return Check("disk", "ok", f"{size(free)} free at {there}")


def _torch() -> Check:
    if not _version("torch"):
        return Check("torch", "missing", "-", "make install")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "problem", f"cannot be imported ({error})", "make clean install")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{d.name} (sm_{d.major}{d.minor}, {size(d.total_memory)})" for d in devices]
        return Check("torch", "ok", f"{found}; driver {_driver()}; {', '.join(names)}")
    if torch.version.cuda:
        return Check("torch", "problem", f"{found}, but no CUDA device", "nvidia-smi")
    if shutil.which("nvidia-smi"):
        return Check("torch", "problem", f"{found} on a machine with a GPU", "make clean install")
    return Check("torch", "ok", found)


def _driver() -> str:
    """Version of the NVIDIA driver, which only its own tool tells."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.strip().partition("\n")[0] or "unknown"


def _four_bits() -> Check:
    """Whether bitsandbytes, which imports even where its library is broken, really computes."""
    name, fix = "4-bit healing", "pip install --force-reinstall bitsandbytes"
    if not _version("torch") or not _version("bitsandbytes"):
        return Check(name, "missing", "needs torch and bitsandbytes", "make install")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # not its advice on more packages
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        exact = torch.tensor([[-1.0, 1.0] * 32], device=device)
        right = dequantize_4bit(*quantize_4bit(exact, quant_type="nf4")).equal(exact)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        return Check(name, "problem", f"bitsandbytes does not run ({reason})", fix)
    if not right:
        return Check(name, "problem", f"bitsandbytes returns wrong values on {device}", fix)
    return Check(name, "ok", f"NF4 runs on {device}")


def _runtime() -> Check:
    there = [name for name in RUNTIMES if _version(name)]
    if not there:
        return Check("onnxruntime", "missing", "-", "pip install 'compress-llm[cpu]' (or [gpu])")
    if len(there) == 2:
        return Check(
            "onnxruntime",
            "problem",
            "both builds are installed and break each other",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'compress-llm[gpu]'",
        )
    try:
        import onnxruntime
    except ImportError as error:
        fix = f"pip install --force-reinstall {there[0]}"
        return Check("onnxruntime", "problem", f"{there[0]} cannot be imported ({error})", fix)
    providers = ", ".join(onnxruntime.get_available_providers())
    return Check("onnxruntime", "ok", f"{there[0]} {_version(there[0])}: {providers}")


def _genai() -> Check:
    """onnxruntime-genai, in the build that fits the onnxruntime that is there."""
    wanted = "onnxruntime-genai-cuda" if _version(RUNTIMES[1]) else "onnxruntime-genai"
    other = "onnxruntime-genai" if wanted.endswith("cuda") else "onnxruntime-genai-cuda"
    if _version(other):
        fix = f"pip uninstall -y {other} && pip install {wanted}"
        found = f"{other}, which does not fit the onnxruntime here"
        return Check("onnxruntime-genai", "problem", found, fix)
    if version := _version(wanted):
        return Check("onnxruntime-genai", "ok", version)
    purpose = "the runtime genai"
    return Check("onnxruntime-genai", "missing", purpose, f"pip install {wanted}")


def _package(name: str, fix: str, purpose: str) -> Check:
    version = _version(name)
    return Check(name, "ok", version) if version else Check(name, "missing", purpose, fix)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
