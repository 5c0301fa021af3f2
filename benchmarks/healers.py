"""Held-out perplexity of every healer after the same seconds, on its own domain and another.

Blocks are removed from a model, and each healer gets `--seconds` of wall-clock for training on
one text. Rows run one after another in processes of their own and are kept in DIR: a row that
is there is not run again, one that was interrupted goes on. The last run draws the curves.
Usage: python benchmarks/healers.py MODEL TEXT OTHER_TEXT -o DIR [--seconds 600] [--rows NAME ...]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.heal import METHODS, TEACHER, TrainingParams
from compressor.heal.healer import Healing
from compressor.model import load_tokenizer
from compressor.prune.blocks import prune
from compressor.records import Selection
from compressor.sources import TextRole, TextSource
from compressor.text import windows

LENGTH, HELD_OUT, TRAINING = 256, 16, 400
SHARED = {"steps": 100_000, "batch_size": 4, "warmup_steps": 4, "save_every": 10,
          "validation": 0.02, "evaluate_every": 5, "divergence_window": 0}  # fmt: skip
ADAPTER = {"rank": 16, "targets": "all", "learning_rate": 1e-3}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("", {}),
    "qlora": ("qlora", ADAPTER),
    "lora": ("lora", ADAPTER),
    "lisa": ("lisa", {"learning_rate": 3e-4, "blocks": 2, "every": 5}),
    "distill": ("distill", ADAPTER),
    "distill-top-k": ("distill", ADAPTER | {"top_k": 64}),
    "last_blocks": ("last_blocks", {"learning_rate": 3e-4, "blocks": 3}),
}
"""Row: method and its parameters beside `SHARED` and the seconds."""
TAUGHT = 100
"""Windows that the parent is asked about; its seconds count, and the student has the rest."""


def texts(model: Path, text: Path, other: Path) -> dict[str, Tensor]:
    """Windows of `LENGTH` tokens: to train on, held out of the same text, of the other text."""
    tokenizer = load_tokenizer(model)
    role = TextRole(windows=HELD_OUT, length=LENGTH)
    own = windows(TextSource(path=str(text)), tokenizer, role, seed=0)
    far = windows(TextSource(path=str(other)), tokenizer, role, seed=0)
    training = windows(
        TextSource(path=str(text)), tokenizer, TextRole(windows=TRAINING, length=LENGTH),
        seed=0, used=own.used, hashes=own.hashes,
    )  # fmt: skip
    return {"training": training.tokens, "own": own.tokens, "other": far.tokens}


@torch.no_grad()
def perplexity(folder: Path, tokens: Tensor) -> float:
    """exp of the mean next-token loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [float(model(row[None], labels=row[None]).loss) for row in tokens]
    return math.exp(sum(losses) / len(losses))


def taught(model: Path, folder: Path, tokens: Tensor, given: dict[str, Any]) -> float:
    """Store what the model before pruning says, and return the seconds that it took."""
    own = {name: value for name, value in given.items() if name in TEACHER.params.model_fields}
    began, params = time.monotonic(), TEACHER.params(**own)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    TEACHER.load()(model, folder, folder.with_name("teacher-work"), tokens, **dict(params))
    return time.monotonic() - began


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: heal DIR/pruned into DIR/<row>/healed and evaluate it."""
    method, given = ROWS[name]
    folder, text = args.out / name, texts(args.model, args.text, args.other)
    healed, report, seconds = args.out / "pruned", {}, 0.0
    if method:
        row = METHODS[method]
        healed, began = folder / "healed", time.monotonic()
        training, teacher, left = text["training"], None, args.seconds
        if "teacher" in row.needs:
            training, teacher = training[:TAUGHT], folder / "teacher"
            left -= taught(args.model, teacher, training, given)
        params = row.params(**SHARED | given, max_seconds=max(1.0, left))
        assert isinstance(params, TrainingParams)
        shutil.rmtree(healed, ignore_errors=True)
        report = row.load()(
            Healing(
                args.out / "pruned", healed, folder / "work", training, params, 0, "cpu", teacher
            )
        )
        seconds = time.monotonic() - began
    return {
        "row": name,
        "own": perplexity(healed, text["own"]),
        "other": perplexity(healed, text["other"]),
        "steps": report.get("steps", 0),
        "tokens": report.get("tokens", 0),
        "seconds": round(seconds, 1),
        "held_out": report.get("held_out"),
        "forecast_bytes": report.get("forecast", {}).get("total"),
        "threads": torch.get_num_threads(),
    }


def draw(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Held-out loss over seconds, each row at its mean speed, into DIR/healers.png."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for row in rows:
        log = args.out / row["row"] / "healed/metrics.jsonl"
        if not log.exists() or row["row"].startswith("distill"):  # losses in other units
            continue
        points = [each for each in map(json.loads, log.open()) if "held_out_loss" in each]
        pace = args.seconds / max(1, points[-1]["step"])
        axes.plot(
            [each["step"] * pace for each in points],
            [each["held_out_loss"] for each in points],
            marker=".", label=row["row"],
        )  # fmt: skip
    axes.set(xlabel="seconds of training", ylabel="held-out loss, nats per token")
    axes.legend()
    figure.savefig(args.out / "healers.png", dpi=120, bbox_inches="tight")


def main() -> None:
    """Prune once, run each missing row in a process of its own, print all as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    for path in ("model", "text", "other"):
        parser.add_argument(path, type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=int, default=13, help="first block to remove")
    parser.add_argument("--count", type=int, default=6, help="how many blocks to remove")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        draft = args.out / args.one / ".row.json"
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(measure(args.one, args)))
        draft.rename(draft.with_name("row.json"))
        return
    if not (args.out / "pruned/config.json").exists():
        depth = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
        gone = list(range(args.first, args.first + args.count))
        prune(args.model, Selection(num_blocks=depth, drop_blocks=gone), args.out / "pruned")
    rows = []
    for name in args.rows:
        found = args.out / name / "row.json"
        if not found.exists():
            subprocess.run([sys.executable, *sys.argv, "--one", name], check=True)
        rows.append(json.loads(found.read_text()))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    draw(args, rows)


if __name__ == "__main__":
    main()
