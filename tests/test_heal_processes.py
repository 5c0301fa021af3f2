"""Healing in two processes on the CPU: the same curve as one, one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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


def command(name: str, method: str, *more: str, processes: int = 1) -> list[str]:
    """`compress heal` into the folder `name`."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    return [
        sys.executable, "-m", *(launcher if processes > 1 else []), "pipelines",
        "heal", "model", "--method", method, *SETTINGS[method], "--steps", "4", "--batch-size", "4",
        "--warmup-steps", "1", "--learning-rate", "1e-2", "--validation", "0.2",
        "--evaluate-every", "2", "--text", "corpus.jsonl", "--field", "text", "--windows", "20",
        "--length", "16", "--store", f"store-{name}", "-o", name, *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def heal(folder: Path, *words: str, processes: int = 1) -> tuple[str, list[dict[str, Any]]]:
    """Heal into folder/name; returns standard output and the rows of the log."""
    done = subprocess.run(
        command(*words, processes=processes),
        cwd=folder, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (folder / words[0] / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A tiny model and another to learn from, their tokenizer and text."""
    save_tiny(tmp_path / "model", "llama")
    tiny("llama", seed=1).save_pretrained(tmp_path / "parent")
    for name in ("model", "parent"):
        save_tokenizer(tmp_path / name)
    save_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"), [("lora", []), ("lisa", []), ("lisa", ["--fsdp", "full_shard"])]
)
def test_two_processes_learn_what_one_does(method: str, more: list[str], project: Path) -> None:
    """Four windows per step, by one process or two by two: equal up to the order of sums."""
    _, one = heal(project, "one", method)
    told, two = heal(project, "two", method, *more, processes=2)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert told.count("folder:") == 1
    weights = [load_file(project / name / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_killed_lisa_ends_in_the_same_bytes(project: Path) -> None:
    more = ("--steps", "40", "--save-every", "1")
    heal(project, "whole", "lisa", *more)
    child = subprocess.Popen(
        command("cut", "lisa", *more),
        cwd=project, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    store = project / "store-cut/store"
    deadline = time.monotonic() + 120
    while not list(store.glob(".work-heal-*/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline
        assert child.poll() is None, "healing ended before it could be killed"
        time.sleep(0.002)
    child.kill()
    child.wait()
    assert not (project / "cut").exists()
    heal(project, "cut", "lisa", *more)
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (project / "cut" / file).read_bytes() == (project / "whole" / file).read_bytes()


@pytest.mark.slow
def test_divergence_ends_with_one_line_and_exit_code_1(project: Path) -> None:
    done = subprocess.run(
        command("lost", "lora", "--learning-rate", "1e30", "--warmup-steps", "0"),
        cwd=project, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the ")
    assert "lower heal.learning_rate (now 1e+30)" in last
    assert not (project / "lost").exists()
