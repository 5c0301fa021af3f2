"""Settings of the correction and of scaling, judged on text that calibrated none of them.

    python benchmarks/propagation.py MODEL TEXT [--blocks 6] [--json]

Quantizes the first blocks, calibrated on windows 0 to 7 of 512 tokens of TEXT, and prints the
residual stream's error behind them on windows 8, 12, 16 and 20: ||h - h'|| / ||h|| in percent,
averaged by root mean square over tokens, the first of each window (whose norm dwarfs all) left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.decoder import Decoder
from compressor.model import load_tokenizer
from compressor.quantize import GptqParams
from compressor.quantize.driver import Recipe, quantize_blocks
from compressor.walk import Stream, walk

FLAT = {"fade": 0}
OLD = {"alpha": 0.75, "ridge": 0.2, "catch_up": 0, "damp": 0.1, **FLAT}
SETTINGS: list[dict[str, Any]] = [
    {"bits": 4, **OLD},
    {"bits": 4, **OLD, "catch_up": 1},
    {"bits": 4, **OLD, "alpha": 1, "ridge": 1, "catch_up": 1},
    {"bits": 4, **FLAT},
    {"bits": 4, **FLAT, "damp": 0.6},
    {"bits": 4, **FLAT, "polish": 1},
    {"bits": 4, **FLAT, "polish": 4},
    {"bits": 4, **FLAT, "forwards": "float32"},
    {"bits": 4, **FLAT, "scaling": "awq"},
    {"bits": 4},
    {"bits": 3, **OLD},
    {"bits": 3, **FLAT},
    {"bits": 3},
    {"bits": 3, "polish": 1},
    {"bits": 2, "symmetric": False, **OLD},
    {"bits": 2, "symmetric": False, **FLAT},
    {"bits": 2, "symmetric": False},
    {"bits": 8, **FLAT, "forwards": "float32"},
    {"bits": 8, **FLAT, "forwards": "bfloat16"},
]


def states(decoder: Decoder, tokens: Tensor, blocks: int, weights: dict[str, Tensor]) -> Tensor:
    """The stream (N, T, D) behind the first blocks with `weights` in the place of their own."""
    stream = Stream(decoder, tokens)
    for step in itertools.islice(walk(stream), blocks):
        for name, own in step.block.state_dict().items():
            own.copy_(weights.get(f"{decoder.blocks.prefix}.{step.index}.{name}", own))
        for _ in step.advance():
            pass
    return stream.x.double()


def quantized(
    model: Path, tokens: Tensor, blocks: int, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """What quantizing changes in the first blocks, as it will be read back, by full name."""
    params, decoder = GptqParams(group_size=64, **settings), Decoder(model)
    recipe = Recipe.of(decoder, "gptq", params)
    changed: dict[str, Tensor] = {}
    for block in itertools.islice(quantize_blocks(decoder, tokens, recipe), blocks):
        changed |= {f"{name}.weight": each.dequantize() for name, each in block.weights.items()}
        changed |= block.dense
    return changed


def error(h: Tensor, off: Tensor) -> float:
    """Percent that a stream (N, T, D) is off, first tokens left out."""
    ratios = (h - off).norm(dim=-1) / h.norm(dim=-1)
    return 100 * float(ratios[:, 1:].square().mean().sqrt())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = args.text.read_text(encoding="utf-8")
    ids = load_tokenizer(args.model)(text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 21 * 512]).view(21, 512)
    held, rows = windows[8:21:4], []
    h = states(Decoder(args.model), held, args.blocks, {})
    for given in SETTINGS:
        weights = quantized(args.model, windows[:8], args.blocks, given)
        off = states(Decoder(args.model), held, args.blocks, weights)
        rows.append((given, error(h, off)))
    if args.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    sys.stdout.write("| settings, else the defaults | error |\n|---|---|\n")
    for given, found in rows:
        told = ", ".join(f"{name} {value}" for name, value in given.items())
        sys.stdout.write(f"| {told} | {found:.2f} |\n")


if __name__ == "__main__":
    main()
