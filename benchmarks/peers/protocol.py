"""What every row of the table shares: the windows, the measure and the figures of a process.

Runs in each peer's own environment too, so it needs no more than torch and safetensors.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

GROUP = 64


def perplexity(model: Any, tokens: Tensor) -> float:
    """exp of the mean next-token loss of `model` on windows (N, T), one at a time."""
    losses: list[float] = []
    with torch.no_grad():
        for window in tokens:
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(float(cross_entropy(logits, window[1:])))
    return math.exp(sum(losses) / len(losses))


class Spent:
    """CPU and wall seconds since it was made, and the process's peak memory."""

    def __init__(self) -> None:
        """Start counting."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def figures(self) -> dict[str, float]:
        """The figures so far; `VmHWM` starts at exec, unlike what `getrusage` inherits."""
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return {
            "cpu_seconds": round(time.process_time() - self._cpu, 1),
            "wall_seconds": round(time.perf_counter() - self._wall, 1),
            "peak_mb": int(peak.split()[1]) // 1024,
        }


def peer(quantize: Callable[[str, Tensor, int, bool], Any]) -> None:
    """Run `quantize(model, calibration, bits, symmetric)` as the arguments say, print figures.

    Arguments: MODEL WINDOWS.safetensors BITS sym|asym. What is returned is called as a
    transformers model; loading, quantizing and whatever the tool does besides is timed.
    """
    model, windows, bits, kind = sys.argv[1:]
    tokens = load_file(windows)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spent = Spent()
    quantized = quantize(model, tokens["calibration"], int(bits), kind == "sym")
    figures: dict[str, Any] = spent.figures()
    figures["perplexity"] = perplexity(quantized, tokens["evaluation"])
    sys.stdout.write(json.dumps(figures) + "\n")
