"""Exports side by side: our graphs, torch, and onnxruntime-genai's builder where it is given.

    python benchmarks/export.py MODEL [QUANTIZED] [--genai-python VENV/bin/python]
        [--threads 1] [--repeats 5] [--json]

MODEL is a dense folder, QUANTIZED the same in integers. The builder runs in its own
environment (`pip install onnxruntime-genai`), with this one's packages behind it. Every graph
is timed in plain onnxruntime, in turns within one run, after one turn of warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, DynamicCache

PROMPT, NEW, CHECKED = 64, 16, (24, 17, 9)
BUILD = (
    "import sys, json, torch\nfrom pathlib import Path\n"
    "from compressor.export.decoder_graph import build\n"
    "build(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))\n"
)


def child(*args: str, **env: str) -> dict[str, float]:
    """Run a process; its seconds, CPU seconds and peak memory in MB."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(args, env={**os.environ, **env}, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(log.read().decode()[-2000:])
    seconds = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": usage.ru_maxrss / 1024}


class Onnx:
    """A decoder graph in plain onnxruntime, ours or the builder's: their names are the same."""

    def __init__(self, folder: Path, model: Any, threads: int) -> None:
        """Load it; `model` is the torch model, for the sizes of the cache."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        path = str(folder / "model.onnx")
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        config = model.config
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        shape = (1, config.num_key_value_heads, 0, width)
        inputs = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.empty = {i.name: np.zeros(shape, kinds[i.type]) for i in inputs}
        self.names = [o.name for o in self.session.get_outputs()]

    def __call__(self, ids: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Logits (S, V) and the grown cache."""
        cache = cache or self.empty
        total = next(iter(cache.values())).shape[2] + ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), **cache}
        values = dict(zip(self.names, self.session.run(None, feeds), strict=True))
        logits = values.pop("logits")[0]
        return logits, {k.replace("present.", "past_key_values."): v for k, v in values.items()}


class Torch:
    """The dense model in transformers."""

    def __init__(self, model: Any) -> None:
        """Wrap a model."""
        self.model = model

    @torch.inference_mode()
    def __call__(self, ids: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Logits (S, V) and the grown cache."""
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        out = self.model(torch.from_numpy(ids), past_key_values=cache, use_cache=True)
        return out.logits[0].numpy(), out.past_key_values


def greedy(run: Any, ids: np.ndarray, count: int, cache: Any = None) -> list[int]:
    """Greedy tokens after ids (1, S)."""
    tokens: list[int] = []
    for _ in range(count):
        logits, cache = run(ids, cache)
        tokens.append(int(logits[-1].argmax()))
        ids = np.array([[tokens[-1]]], np.int64)
    return tokens


def builds(args: argparse.Namespace, out: Path) -> dict[str, dict[str, Any]]:
    """Every export that was asked for: its folder, what it took and its bytes."""
    dense, packed = str(args.model), args.quantized and str(args.quantized)
    asked = [("ours fp32", dense, {})]
    if packed:
        asked += [("ours int, level 0", packed, {"accuracy_level": 0})]
        asked += [("ours int, level 4", packed, {"accuracy_level": 4})]
        asked += [("ours int, level 4, head 4", packed, {"accuracy_level": 4, "head_bits": 4})]
    rows: dict[str, dict[str, Any]] = {}
    for name, source, settings in asked:
        folder = out / name.replace(" ", "-")
        folder.mkdir()
        took = child(sys.executable, "-c", BUILD, source, str(folder), json.dumps(settings))
        rows[name] = {"folder": folder, **took}
    for precision in ("fp32", "int4") if args.genai_python else ():
        folder = out / f"genai-{precision}"
        command = [args.genai_python, "-m", "onnxruntime_genai.models.builder", "-i", dense]
        command += ["-o", str(folder), "-p", precision, "-e", "cpu", "-c", str(out / "cache")]
        packages = str(Path(torch.__file__).parents[1])
        rows[f"genai {precision}"] = {"folder": folder, **child(*command, PYTHONPATH=packages)}
    for row in rows.values():
        files = [p for p in row.pop("folder").iterdir() if p.name.startswith("model.onnx")]
        row["path"], row["mb"] = files[0].parent, sum(p.stat().st_size for p in files) / 1e6
    return rows


def main() -> None:
    """Build, compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("quantized", type=Path, nargs="?")
    parser.add_argument("--genai-python")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    prompts = [random.integers(model.config.vocab_size, size=(1, n)) for n in (*CHECKED, PROMPT)]
    with tempfile.TemporaryDirectory() as out:
        rows = {"torch fp32": {}} | builds(args, Path(out))
        runs = {
            name: Onnx(row.pop("path"), model, args.threads) if row else Torch(model)
            for name, row in rows.items()
        }
        own = {name: [run(p)[0] for p in prompts] for name, run in runs.items()}
        said = {n: [greedy(run, p, NEW) for p in prompts[:-1]] for n, run in runs.items()}
        for name, row in rows.items():
            pairs = zip(own[name], own["torch fp32"], strict=True)
            row["logit_difference"] = max(float(np.abs(a - b).max()) for a, b in pairs)
            same = np.array(said[name]) == np.array(said["torch fp32"])
            row["greedy"] = f"{int(np.cumprod(same, 1).sum())}/{same.size}"
        times: dict[str, Any] = {name: {"prefill": [], "decode": []} for name in runs}
        for turn in range(args.repeats + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                _, cache = run(prompts[-1])
                middle = time.perf_counter()
                greedy(run, prompts[-1][:, -1:], NEW, cache)
                if turn:
                    times[name]["prefill"].append(PROMPT / (middle - began))
                    times[name]["decode"].append(NEW / (time.perf_counter() - middle))
    for name, row in rows.items():
        for kind, rates in times[name].items():
            row[kind] = [statistics.median(rates), min(rates), max(rates)]
    show(rows, as_json=args.json)


def show(rows: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    """The table, or the same as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    sys.stdout.write(
        "| route | build s (CPU s) | peak MB | MB | logit difference | greedy "
        "| prefill tokens/s | decode tokens/s |\n|---|---|---|---|---|---|---|---|\n"
    )
    for name, row in rows.items():
        rates = ["{:.0f} ({:.0f}-{:.0f})".format(*row[kind]) for kind in ("prefill", "decode")]
        built = "- | - | -"
        if "mb" in row:
            built = "{seconds:.1f} ({cpu_seconds:.1f}) | {peak_mb:.0f} | {mb:.1f}".format(**row)
        sys.stdout.write(
            f"| {name} | {built} | {row['logit_difference']:.1e} | {row['greedy']} "
            f"| {rates[0]} | {rates[1]} |\n"
        )


if __name__ == "__main__":
    main()
