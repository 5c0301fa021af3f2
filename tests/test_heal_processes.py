"""Healing in processes of its own: two that learn what one does, and one that is killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from pipelines.cli import cli
from tests.command_line import PYTHON, compress, hashes, kill
from tests.tiny import save_project, save_tokenizer, tiny

TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pipelines")
SETTINGS = {
    "lora": ["--rank", "4", "--dropout", "0"],
    "qlora": ["--rank", "4"],
    "lisa": ["--blocks", "1", "--every", "2"],
    "distill": [
        "--rank", "4", "--dropout", "0", "--parent", "parent", "--hidden", "[1]", "--filters",
        "linear", "--kept", "[0, 1, 2, 3]",
    ],
}  # fmt: skip


def command(method: str, *more: str) -> list[str]:
    """`compress heal` of the tiny model."""
    return [
        "heal", "model", "--method", method, *SETTINGS[method], "--steps", "4", "--batch-size", "4",
        "--warmup-steps", "1", "--learning-rate", "1e-2", "--validation", "0.2",
        "--evaluate-every", "2", "--text", "corpus.jsonl", "--field", "text", "--windows", "20",
        "--length", "16", *more,
    ]  # fmt: skip


def heal(
    folder: Path, name: str, method: str, *more: str, python: tuple[str, ...] = PYTHON
) -> tuple[str, list[dict[str, Any]]]:
    """Heal into folder/name; returns standard output and the rows of the log."""
    places = ("--store", f"store-{name}", "-o", name)
    done = compress(folder, *command(method, *places, *more), python=python)
    assert done.returncode == 0, done.stderr
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A tiny model and another to learn from, their tokenizer and text."""
    save_project(tmp_path)
    tiny("llama", seed=1).save_pretrained(tmp_path / "parent")
    save_tokenizer(tmp_path / "parent")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"), [("lora", []), ("lisa", []), ("lisa", ["--fsdp", "full_shard"])]
)
def test_two_processes_learn_what_one_does(method: str, more: list[str], project: Path) -> None:
    """Four windows per step, by one process or two by two: equal up to the order of sums."""
    _, one = heal(project, "one", method)
    told, two = heal(project, "two", method, *more, python=TWO)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert told.count("folder:") == 1
    weights = [load_file(project / name / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora", pytest.param("lisa", marks=pytest.mark.slow)])
def test_killed_healing_ends_in_the_same_bytes(
    method: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind two of 16 steps, it goes on: every file is that of a run without a break."""
    monkeypatch.chdir(project)
    wanted = command(method, "--steps", "16", "--save-every", "2", "--quiet")
    kill(project, "cut/store/.work-heal-*/checkpoint-*/trainer_state.json", *wanted, "--store=cut")
    assert not list(project.glob("cut/store/heal-*"))
    for store in ("whole", "cut"):
        cli.main([*wanted, "--store", store], standalone_mode=False)
    whole, cut = (next(project.glob(f"{store}/store/heal-*")) for store in ("whole", "cut"))
    assert hashes(cut) == hashes(whole)
    assert not list(project.glob("cut/store/.work-*"))


@pytest.mark.slow
def test_divergence_ends_with_one_line_and_exit_code_1(project: Path) -> None:
    settings = ("--learning-rate", "1e30", "--warmup-steps", "0", "-o", "lost")
    done = compress(project, *command("lora", *settings))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the ")
    assert "lower heal.learning_rate (now 1e+30)" in last
    assert not (project / "lost").exists()
