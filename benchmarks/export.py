"""Exports side by side: our graphs, torch, and what onnxruntime-genai's own builder makes.

    python benchmarks/export.py MODEL [QUANTIZED] [--genai] [--runtimes onnxruntime,genai]
        [--threads 1] [--repeats 5] [--json]

MODEL is a dense folder, QUANTIZED the same in integers. Ours are whole exports, the gate included;
the builder checks nothing. Speeds are those of `compress bench`: every measurement in a process of
its own, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from compressor.runtimes import Target, find
from compressor.runtimes.base import Runtime
from compressor.runtimes.bench import Case, Settings, bench, weight_file_bytes

PROMPT, NEW, CHECKED = 64, 16, (24, 17, 9)
EXPORT = (
    "import sys, json, torch\nfrom pathlib import Path\n"
    "from compressor.export import ExportParams\nfrom compressor.export.onnx import export\n"
    "torch.set_num_threads(int(sys.argv[4]))\n"
    "params = ExportParams(formats=('onnx',), **json.loads(sys.argv[3]))\n"
    "export(Path(sys.argv[1]), Path(sys.argv[2]), params)\n"
)


def child(*args: str) -> dict[str, float]:
    """Run a process; its CPU seconds and peak memory in MB."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(args, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(log.read().decode()[-2000:])
    cpu = usage.ru_utime + usage.ru_stime
    return {"cpu_seconds": cpu, "peak_mb": usage.ru_maxrss / 1024}


def builds(args: argparse.Namespace, out: Path) -> dict[str, dict[str, Any]]:
    """Every export that was asked for: its folder, what it took and its bytes."""
    asked: list[tuple[str, Path, dict[str, int]]] = [("ours fp32", args.model, {})]
    if args.quantized:
        for name, settings in {
            "ours int, level 0": {},
            "ours int, level 4": {"accuracy_level": 4},
            "ours int, level 4, head 4": {"accuracy_level": 4, "head_bits": 4},
        }.items():
            asked.append((name, args.quantized, settings))
    rows: dict[str, dict[str, Any]] = {}
    for name, source, settings in asked:
        folder = out / name.replace(" ", "-")
        folder.mkdir()
        given = [str(source), str(folder), json.dumps(settings), str(args.threads)]
        took = child(sys.executable, "-c", EXPORT, *given)
        rows[name] = {"folder": folder / "onnx", **took}
    for precision in ("fp32", "int4") if args.genai else ():
        folder = out / f"genai-{precision}"
        command = ["-m", "onnxruntime_genai.models.builder", "-i", str(args.model), "-e", "cpu"]
        command += ["-o", str(folder), "-p", precision, "-c", str(out / "cache")]
        rows[f"genai {precision}"] = {"folder": folder, **child(sys.executable, *command)}
    for row in rows.values():
        row["mb"] = weight_file_bytes(row["folder"]) / 1e6
    return rows


def said(runtime: Runtime, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, V) behind each prompt, and the greedy tokens (N, NEW) that follow."""
    first, tokens = [], []
    for prompt in prompts:
        runtime.rewind(0)
        logits = runtime.prefill(prompt)
        first.append(logits)
        chosen = [int(logits.argmax())]
        while len(chosen) < NEW:
            chosen.append(int(runtime.step(chosen[-1]).argmax()))
        tokens.append(chosen)
    return np.stack(first), np.array(tokens)


def main() -> None:
    """Build, compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("quantized", type=Path, nargs="?")
    parser.add_argument("--genai", action="store_true")
    parser.add_argument("--runtimes", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        exports = builds(args, Path(out))
        cases = [Case("torch fp32", find(args.model, "torch"))]
        for runtime in args.runtimes.split(","):
            places = {f"{name} in {runtime}": row["folder"] for name, row in exports.items()}
            cases += [Case(name, Target(folder, runtime)) for name, folder in places.items()]
        rows: dict[str, dict[str, Any]] = {}
        for case in cases:
            runtime = case.target.open("cpu", args.threads)
            random = np.random.default_rng(0)
            vocabulary = runtime.facts.vocabulary
            prompts = [random.integers(vocabulary, size=n).tolist() for n in CHECKED]
            logits, tokens = said(runtime, prompts)
            if not rows:
                torch_logits, torch_tokens = logits, tokens
            same = np.cumprod(tokens == torch_tokens, 1)
            difference = float(np.abs(logits - torch_logits).max())
            greedy = f"{int(same.sum())}/{same.size}"
            rows[case.label] = {"logit_difference": difference, "greedy": greedy}
            del runtime
        settings = Settings(PROMPT, NEW, args.repeats, (args.threads,), "cpu")
        for measured in bench(cases, settings)["rows"]:
            rows[measured["label"]] |= measured
    show(rows, exports, as_json=args.json)


def show(rows: dict[str, Any], exports: dict[str, Any], *, as_json: bool) -> None:
    """Two tables, or the same as JSON."""
    if as_json:
        everything = {"exports": exports, "rows": rows}
        sys.stdout.write(json.dumps(everything, indent=1, default=str) + "\n")
        return
    sys.stdout.write("| export | CPU s | peak MB | MB |\n|---|---|---|---|\n")
    for name, row in exports.items():
        sys.stdout.write(
            "| {} | {cpu_seconds:.1f} | {peak_mb:.0f} | {mb:.1f} |\n".format(name, **row)
        )
    sys.stdout.write(
        "\n| route | logit difference | greedy | prefill tokens/s | decode tokens/s "
        "| roofline / decode |\n|---|---|---|---|---|---|\n"
    )
    for name, row in rows.items():
        rates = [
            "{median:.0f} ({min:.0f}-{max:.0f})".format(**row[k]) for k in ("prefill", "decode")
        ]
        sys.stdout.write(
            f"| {name} | {row['logit_difference']:.1e} | {row['greedy']} | {rates[0]} | {rates[1]} "
            f"| {row['roofline_multiple']:.1f} |\n"
        )


if __name__ == "__main__":
    main()
