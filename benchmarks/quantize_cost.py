"""What quantizing costs: CPU seconds by phase, peak memory, and the multiple of the floor.

Runs the driver as `compress quantize` does, reading a checkpoint and writing one, and nothing
beside it, so that the peak is its own. The floor is the arithmetic that cannot be left out (two
forwards, the moments of the inputs, one factorisation and solve for the correction and one for
GPTQ, the sweep) at the speed of a large float32 product on the same thread.
Usage: python benchmarks/quantize_cost.py MODEL CALIBRATION.txt [--bits 4] [--group-size 64]
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compressor.blocks import weight_of
from compressor.checkpoint import CheckpointWriter
from compressor.decoder import Decoder
from compressor.model import load_tokenizer
from compressor.quantize import GptqParams, driver, gptq, turns
from compressor.quantize.grid import Grid

PHASES: dict[str, list[tuple[Any, str]]] = {
    "forwards": [(Decoder, "run"), (Decoder, "embed")],
    "moments": [(turns, "moments_of")],
    "correction": [(driver, "propagate_error"), (driver, "propagate_difference")],
    "factors": [(gptq, "inverse_factor")],
    "scale search": [(Grid, "fit")],
    "sweep": [(gptq, "sweep")],
    "polish": [(gptq, "polished")],
    "errors for the report": [(driver, "_sizes")],
    "reading": [(Decoder, "weight"), (Decoder, "_load_shell")],
    "writing": [(CheckpointWriter, "add"), (CheckpointWriter, "finish")],
}
"""Functions whose own time, without that of others here that they call, is one phase."""


class Clock:
    """CPU seconds by phase; what runs inside a phase is not counted to the one around it."""

    def __init__(self) -> None:
        """Start now, in no phase."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack, self._since = ["everything else"], time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted to `phase`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._stack.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._stack.pop()

        return run

    def watch(self) -> None:
        """Time the functions of `PHASES` from now on."""
        for phase, places in PHASES.items():
            for owner, name in places:
                setattr(owner, name, self.timed(phase, getattr(owner, name)))


def floor_gflop(folder: Path, windows: int, length: int) -> dict[str, float]:
    """GFLOP of what cannot be left out, for both streams of all blocks."""
    decoder = Decoder(folder)
    blocks, tokens, width = decoder.blocks, windows * length, decoder.model.config.hidden_size
    total: dict[str, float] = defaultdict(float)
    with torch.no_grad(), decoder.resident(0):
        groups = driver.input_groups(decoder, decoder.embed(torch.zeros(1, 8, dtype=torch.long)), 0)
        for group in groups:
            inputs = weight_of(group[group.leader]).shape[1]
            outputs = sum(weight_of(linear).shape[0] for linear in group.values())
            total["forwards"] += 2 * 2 * tokens * inputs * outputs
            total["moments"] += (1 + 2) * tokens * inputs**2
            total["solves"] += inputs**3 + 5 * inputs**2 * outputs
        total["forwards"] += 2 * 2 * 2 * tokens * length / 2 * width
    return {name: len(blocks) * flop / 1e9 for name, flop in total.items()}


def speed() -> float:
    """GFLOP per CPU second of a large float32 product, the best of five."""
    a, best = torch.randn(2048, 2048), 0.0
    for _ in range(5):
        began = time.process_time()
        a @ a
        best = max(best, 2 * 2048**3 / 1e9 / (time.process_time() - began))
    return best


def peak_mb() -> int:
    """Most resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Quantize once and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    for name, default in (("bits", 4), ("group-size", 64), ("windows", 8), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--asymmetric", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = load_tokenizer(args.model)(args.calibration.read_text(encoding="utf-8"))["input_ids"]
    tokens = torch.tensor(text[: args.windows * args.length]).view(args.windows, args.length)
    params = GptqParams(bits=args.bits, group_size=args.group_size, symmetric=not args.asymmetric)
    imported, clock = peak_mb(), Clock()
    clock.watch()
    with tempfile.TemporaryDirectory() as out:
        clock.timed("everything else", driver.quantize)(
            args.model, Path(out), tokens, "gptq", params
        )
    spent, peak = sum(clock.seconds.values()), peak_mb()
    gflop, rate = floor_gflop(args.model, args.windows, args.length), speed()
    found = {
        "cpu_seconds": round(spent, 1),
        "phases": {k: round(v, 1) for k, v in sorted(clock.seconds.items(), key=lambda x: -x[1])},
        "peak_mb": peak,
        "imports_and_tokenizer_mb": imported,
        "floor_gflop": {name: round(value) for name, value in gflop.items()},
        "gflop_per_second": round(rate, 1),
        "times_floor": round(spent / (sum(gflop.values()) / rate), 2),
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
