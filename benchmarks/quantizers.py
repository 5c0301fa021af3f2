"""Our quantizers and other tools' on one model and text: perplexity, bytes, seconds, memory.

    python benchmarks/quantizers.py MODEL CALIBRATION.txt EVALUATION.txt [--rows NAME ...]
        [--results FILE.jsonl] [--environments FOLDER] [--again]

One process per row, so that peak memory is the row's own; each peer in an environment of its
own, made from peers/NAME.txt. A row that is in the results already is not run again. Prints the
results as a Markdown table. The protocol: the first 8 windows of 512 tokens of each text, group
64, one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peers.environment import NotInstalled, environment
from peers.protocol import GROUP, Spent, perplexity
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.allocate import METHODS as ALLOCATE
from compressor.allocate import AllocateParams
from compressor.decoder import Decoder
from compressor.model import load_tokenizer
from compressor.quantize import METHODS
from compressor.quantize.driver import Recipe, quantize_blocks
from compressor.records import BitPlan
from compressor.score import METHODS as SCORES
from compressor.score.collect import score
from pipelines.allocation import choose_widths, measure_costs

HERE = Path(__file__).resolve().parent
TEXTBOOK = {"search": False, "damp": 0.01, "polish": 0}
METHOD_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {"search": False}),
    "rtn-qep": ("qep_rtn", {"search": False}),
    "gptq": ("gptq", TEXTBOOK | {"propagation": "none"}),
    "gptq-qep": ("gptq", TEXTBOOK | {"propagation": "official"}),
    "gptq-tuned": ("gptq", {"propagation": "none"}),
    "gptq-tuned-qep": ("gptq", {}),
}
"""As in the papers (grids between minimum and maximum), and as we do it by default."""

GRIDS = {"w4": (4, True), "w4a": (4, False), "w3": (3, True), "w3a": (3, False), "w2a": (2, False)}
ROWS = {
    f"{name}-{grid}": (method, {"bits": bits, "symmetric": symmetric, "group_size": GROUP} | params)
    for grid, (bits, symmetric) in GRIDS.items()
    for name, (method, params) in METHOD_ROWS.items()
}
MIXED = {
    f"mixed-{by}-{average}": (by, average)
    for average in (3.5, 3.0, 2.5)
    for by in ("fisher", "importance")
}
"""Our default at widths that `allocate` chose: (method, average bits); importance is by LIM."""

PEERS = {
    f"{name}-{grid}": (name, GRIDS[grid])
    for name, able in {
        "llmcompressor": ("w4", "w3a", "w2a"),
        "gptqmodel": ("w4", "w3a", "w2a"),
        "torchao": ("w4", "w3a", "w2a"),
        "hqq": ("w4a", "w3a", "w2a"),
    }.items()
    for grid in able
}
"""Rows of other tools: (module of peers/, grid)."""

PEER_SETTINGS = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1"}
"""Else it does not start on two cores, and compiles C++ for minutes that would be timed."""

COLUMNS = ("linear MB", "perplexity", "added loss", "CPU s", "wall s", "peak MB")


def windows(model: Path, text: Path, count: int = 8, length: int = 512) -> Tensor:
    """The first `count` windows of `length` tokens, (count, length)."""
    ids = load_tokenizer(model)(text.read_text(encoding="utf-8"), add_special_tokens=False)
    return torch.tensor(ids["input_ids"][: count * length]).view(count, length)


def ours(name: str, model: Path, text: dict[str, Tensor]) -> dict[str, Any]:
    """One row: quantize in memory, then evaluate; "original" quantizes nothing."""
    loaded, found = None, {}
    if name != "original":
        weights, found = quantized(model, name, text["calibration"])
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        unexpected = loaded.load_state_dict(weights, strict=False).unexpected_keys
        assert not unexpected, unexpected
    loaded = loaded or AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return found | {"perplexity": perplexity(loaded, text["evaluation"])}


def widths(model: Path, by: str, average: float, tokens: Tensor) -> BitPlan:
    """The widths of `compress quantize --average-bits AVERAGE`."""
    row, given = ALLOCATE[by], {"average_bits": average, "group_size": GROUP}
    params = row.params.model_validate(given)
    assert isinstance(params, AllocateParams)
    scores = (
        score(model, tokens, {"lim": SCORES["lim"].params()}) if "scores" in row.needs else None
    )
    decoder = Decoder(model)
    measured = measure_costs(decoder, tokens, by, params, scores=scores, batch_size=4)
    return choose_widths(decoder, tokens, measured, params, batch_size=4)[0]


def quantized(model: Path, name: str, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every quantized weight in floats, and what it took, choosing the widths included."""
    spent = Spent()
    method, given = ROWS["gptq-tuned-qep-w4" if name in MIXED else name]
    if name in MIXED:
        given = given | {"scheme": widths(model, *MIXED[name], tokens)}
    params, decoder = METHODS[method].params(**given), Decoder(model)
    recipe = Recipe.of(decoder, method, params)  # type: ignore[arg-type]
    weights: dict[str, Tensor] = {}
    bits, drift = 0.0, None
    for block in quantize_blocks(decoder, tokens if METHODS[method].needs else None, recipe):
        drift = block.drift
        weights |= block.dense
        for linear, found in block.weights.items():
            weights[f"{linear}.weight"] = found.dequantize()
            zeros = 0 if found.zero_point is None else found.zero_point.numel()
            bits += found.grid.bits * (found.integers.numel() + zeros) + 8 * found.scale.nbytes
    return weights, spent.figures() | {"linear_mb": round(bits / 8e6, 1), "drift": drift}


def command(name: str, args: argparse.Namespace, text: Path) -> list[str]:
    """What runs a row; raises `NotInstalled` for a peer whose environment cannot be made."""
    if name not in PEERS:
        return [sys.executable, __file__, *map(str, paths(args)), "--one", name]
    peer, (bits, symmetric) = PEERS[name]
    python = environment(peer, args.environments)
    kind = "sym" if symmetric else "asym"
    return [
        str(python),
        "-m",
        f"peers.{peer}",
        str(args.model.resolve()),
        str(text),
        str(bits),
        kind,
    ]


def measure(name: str, args: argparse.Namespace, text: Path) -> dict[str, Any]:
    """The row's figures, or why there are none."""
    usual = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}", **PEER_SETTINGS}
    try:
        asked = command(name, args, text)
    except NotInstalled as reason:
        return {"failed": str(reason)}
    done = subprocess.run(
        asked, cwd=text.parent, env=os.environ | usual, text=True, capture_output=True, check=False
    )
    figures = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not figures:
        sys.stderr.write(done.stderr[-4000:])
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": said[-1][:300] if said else f"exit code {done.returncode}"}
    result: dict[str, Any] = json.loads(figures[-1])
    return result


def paths(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """What is benchmarked, wherever the row runs."""
    return args.model.resolve(), args.calibration.resolve(), args.evaluation.resolve()


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table, in the order of the rows; the original first."""
    lines = ["| row | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name in ("original", *ROWS, *MIXED, *PEERS):
        row = results.get(name)
        if row is None:
            continue
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} |" + " |" * (len(COLUMNS) - 1))
            continue
        added = ""
        if "original" in results:
            added = f"{math.log(row['perplexity'] / results['original']['perplexity']):.3f}"
        value = row["perplexity"]
        shown = f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
        told = [row.get(key, "") for key in ("cpu_seconds", "wall_seconds", "peak_mb")]
        words = [row.get("linear_mb", ""), shown, added, *told]
        lines.append(f"| {name} | " + " | ".join(map(str, words)) + " |")
    return "\n".join(lines) + "\n"


def stored(path: Path, protocol: str) -> dict[str, dict[str, Any]]:
    """The last result of every row of this protocol."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["row"]: row for row in rows if row["protocol"] == protocol}


def main() -> None:
    """Run the rows that are missing, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for path in ("model", "calibration", "evaluation"):
        parser.add_argument(path, type=Path)
    known = ["original", *ROWS, *MIXED, *PEERS]
    parser.add_argument("--rows", nargs="*", default=known, choices=known)
    results = HERE.parent / "artifacts/benchmarks/quantizers.jsonl"
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--environments", type=Path, default=HERE / ".envs")
    parser.add_argument("--again", action="store_true", help="run rows that are there already")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model, calibration, evaluation = paths(args)
    text = {"calibration": windows(model, calibration), "evaluation": windows(model, evaluation)}
    if args.one:
        torch.set_num_threads(1)
        sys.stdout.write(json.dumps(ours(args.one, model, text)) + "\n")
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    cut = args.results.resolve().with_name("windows.safetensors")
    save_file(text, cut)
    protocol = hashlib.sha256(model.name.encode() + cut.read_bytes()).hexdigest()[:16]
    there = stored(args.results, protocol)
    for name in args.rows:
        if args.again or name not in there:
            there[name] = {"row": name, "protocol": protocol} | measure(name, args, cut)
            with args.results.open("a") as file:
                file.write(json.dumps(there[name]) + "\n")
    sys.stdout.write(markdown(there))


if __name__ == "__main__":
    main()
