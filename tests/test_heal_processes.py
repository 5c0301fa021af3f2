"""Healing in two processes on the CPU: the same curve as one, one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.tiny import save_corpus, save_tiny, save_tokenizer, tiny

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "lora": ["--rank", "4", "--dropout", "0"],
    "lisa": ["--blocks", "1", "--every", "2"],
    "distill": [
        "--rank", "4", "--dropout", "0", "--parent", "parent", "--hidden", "[1]", "--filters",
        "linear", "--kept", "[0, 1, 2, 3]",
    ],
}  # fmt: skip


def heal(folder: Path, name: str, method: str, processes: int) -> tuple[str, list[dict[str, Any]]]:
    """`compress heal` into folder/name; returns standard output and the rows of its log."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    command = [
        sys.executable, "-m", *(launcher if processes > 1 else []), "pipelines",
        "heal", "model", "--method", method, *SETTINGS[method], "--steps", "4", "--batch-size", "4",
        "--warmup-steps", "1", "--learning-rate", "1e-2", "--validation", "0.2",
        "--evaluate-every", "2", "--text", "corpus.jsonl", "--field", "text", "--windows", "20",
        "--length", "16", "--store", f"store-{name}", "-o", name,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_two_processes_learn_what_one_does(method: str, tmp_path: Path) -> None:
    """Four windows per step, by one process or two by two: equal up to the order of sums."""
    save_tiny(tmp_path / "model", "llama")
    tiny("llama", seed=1).save_pretrained(tmp_path / "parent")
    for name in ("model", "parent"):
        save_tokenizer(tmp_path / name)
    save_corpus(tmp_path / "corpus.jsonl")
    _, one = heal(tmp_path, "one", method, 1)
    told, two = heal(tmp_path, "two", method, 2)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert told.count("folder:") == 1
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)
