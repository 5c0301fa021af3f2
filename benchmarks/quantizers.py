"""Perplexity, bytes, CPU seconds and peak memory of our quantizers on one model and text.

One process per row, so that peak memory is the row's own. Rows are JSON lines on stdout.
Usage: python benchmarks/quantizers.py MODEL CALIBRATION.txt EVALUATION.txt [--rows NAME ...]
The protocol: the first 8 windows of 512 tokens of each text, group 64, one thread.
--scheme bits.json, from `compress allocate`, gives the linears of the rows its widths.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from compressor.decoder import Decoder
from compressor.model import load_tokenizer
from compressor.quantize import METHODS
from compressor.quantize.driver import Recipe, quantize_blocks
from compressor.records import BitPlan

PLAIN = {"propagation": "none", "damp": 0.01, "polish": 0}
METHOD_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "qep-rtn": ("qep_rtn", {}),
    "gptq": ("gptq", PLAIN),
    "gptq-tuned": ("gptq", {"propagation": "none"}),
    "gptq-official": ("gptq", {"propagation": "official"}),
    "gptq-tuned-qep": ("gptq", {}),
}
ROWS = {
    f"{name}-w{bits}{'' if symmetric else 'a'}": (
        method,
        params | {"bits": bits, "symmetric": symmetric, "group_size": 64},
    )
    for name, (method, params) in METHOD_ROWS.items()
    for bits in (4, 3, 2)
    for symmetric in (True, False)
}
PEERS: dict[str, list[str]] = {}
"""Commands of other tools, each run in its own environment; each prints one JSON row."""


def windows(model: Path, text: Path, count: int = 8, length: int = 512) -> Tensor:
    """The first `count` windows of `length` tokens, (count, length)."""
    ids = load_tokenizer(model)(text.read_text(encoding="utf-8"), add_special_tokens=False)
    return torch.tensor(ids["input_ids"][: count * length]).view(count, length)


def perplexity(model: Path, weights: dict[str, Tensor], tokens: Tensor) -> float:
    """exp of the mean next-token loss with `weights` in the place of the model's own."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    missing = loaded.load_state_dict(weights, strict=False).unexpected_keys
    assert not missing, missing
    losses: list[float] = []
    with torch.no_grad():
        for window in tokens:
            logits = loaded(window[None]).logits[0, :-1].float()
            losses.append(float(cross_entropy(logits, window[1:])))
    return math.exp(sum(losses) / len(losses))


def measure(
    name: str, model: Path, calibration: Path, evaluation: Path, scheme: Path | None
) -> dict[str, Any]:
    """One row: quantize in memory, then evaluate."""
    method, given = ROWS[name]
    plan = BitPlan.load(scheme) if scheme else None
    params = METHODS[method].params(**given, scheme=plan)
    tokens = windows(model, calibration) if METHODS[method].needs else None
    started, decoder = time.process_time(), Decoder(model)
    recipe = Recipe.of(decoder, method, params)  # type: ignore[arg-type]
    weights: dict[str, Tensor] = {}
    bits, drift = 0.0, None
    for block in quantize_blocks(decoder, tokens, recipe):
        drift = block.drift
        for linear, found in block.weights.items():
            weights[f"{linear}.weight"] = found.dequantize()
            zeros = 0 if found.zero_point is None else found.zero_point.numel()
            bits += found.grid.bits * (found.integers.numel() + zeros) + 8 * found.scale.nbytes
    return {
        "row": f"{name} {plan.reason}" if plan else name,
        "cpu_seconds": round(time.process_time() - started, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "linear_bytes": int(bits / 8),
        "drift": drift,
        "perplexity": perplexity(model, weights, windows(model, evaluation)),
    }


def commands(rows: list[str], paths: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, command) of every row asked for, ours and the peers'."""
    for name in rows or [*ROWS, *PEERS]:
        yield name, PEERS.get(name) or [sys.executable, __file__, *paths, "--one", name]


def main() -> None:
    """Run each row in a process of its own, or one row in this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    for path in ("model", "calibration", "evaluation"):
        parser.add_argument(path, type=Path)
    parser.add_argument("--rows", nargs="*", default=[], choices=[*ROWS, *PEERS])
    parser.add_argument("--scheme", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    paths = [args.model, args.calibration, args.evaluation]
    if args.one:
        torch.set_num_threads(1)
        sys.stdout.write(json.dumps(measure(args.one, *paths, args.scheme)) + "\n")
        return
    extra = ["--scheme", str(args.scheme)] if args.scheme else []
    for _, command in commands(args.rows, [str(path) for path in paths] + extra):
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
