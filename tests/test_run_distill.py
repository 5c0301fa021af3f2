"""Distillation from the command line: found again, killed, and given a parent by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor import teacher
from compressor.errors import CheckpointError
from compressor.prune.blocks import prune
from compressor.records import Selection
from pipelines.cli import cli
from tests.command_line import CODE, hashes, kill
from tests.tiny import save_project, save_tiny, save_tokenizer, tiny

CONFIG = """\
name: distilled
model: {path: model}
text:
  source: {path: corpus.jsonl, field: text}
  healing: {windows: 24, length: 32}
batch_size: 1
stages:
  - select: {method: fixed, blocks: [1, 2]}
  - prune
  - heal: {method: distill, rank: 4, steps: 40, warmup_steps: 2, batch_size: 2, save_every: 2,
           hidden: [0, 3], filters: linear, validation: 0}
"""

SMALL = (sys.executable, "-c", f"from compressor import teacher; teacher.SHARD_BYTES = 1; {CODE}")
"""The command line with one window per file of the parent's outputs."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a corpus."""
    folder = tmp_path_factory.mktemp("distilled")
    save_project(folder, CONFIG, hidden_size=64)
    return folder


@pytest.fixture(autouse=True)
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the project, with one window per file."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(teacher, "SHARD_BYTES", 1)


def built(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    """Labels of the stages that a command had to build."""
    cli.main([*args, "--json"], standalone_mode=False)
    labels: list[str] = json.loads(capsys.readouterr().out)["built"]
    return labels


def made(project: Path, verb: str, store: str = "artifacts") -> Path:
    """The only artifact of a verb."""
    (folder,) = (project / store / "store").glob(f"{verb}-*")
    return folder


def test_killed_twice_it_ends_in_the_same_bytes(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once while the parent's outputs are written, once while the student trains."""
    assert built(capsys, "run", "tiny.yaml")[-2:] == ["teacher", "heal"]
    first = made(project, "teacher"), made(project, "heal")
    for sign in (".work-teacher-*/windows-000010*", ".work-heal-*/checkpoint-*/trainer_state.json"):
        kill(project, f"killed/store/{sign}", "run", "tiny.yaml", "--store", "killed", python=SMALL)
        if "teacher" in sign:
            assert not list((project / "killed/store").glob("teacher-*"))
    assert built(capsys, "run", "tiny.yaml", "--store", "killed") == ["heal"]
    again = made(project, "teacher", "killed"), made(project, "heal", "killed")
    assert [hashes(folder) for folder in again] == [hashes(folder) for folder in first]
    assert not list((project / "killed/store").glob(".work-*"))


def test_a_parent_by_hand_and_its_outputs_again(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep of students and settings reads the outputs once."""
    model: Any = tiny("llama", hidden_size=64, num_hidden_layers=2)
    options = "--method distill --parent model --text corpus.jsonl --field text --windows 24"
    command = f"{options} --length 32 --steps 2 --warmup-steps 0 --batch-size 2 --rank 2"
    for name, stages in (("one", ["parent", "text healing", "teacher"]), ("two", [])):
        model.save_pretrained(project / name)
        save_tokenizer(project / name)
        args = ("heal", name, *command.split(), "--store", "hand", "--top-k", "8")
        assert built(capsys, *args) == ["model", *stages, "heal"]
        model.lm_head.weight.data *= 1.1
    assert made(project, "teacher", "hand").is_dir()


def test_the_cut_of_an_imported_folder_is_found(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(project / "model", Selection(num_blocks=4, drop_blocks=[1]), project / "cut")
    options = "--method last_blocks --around-cut true --blocks 1 --head false --validation 0"
    text = "--text corpus.jsonl --field text --windows 2 --length 16"
    steps = "--steps 1 --warmup-steps 0 --batch-size 1 --parent model --store cuts -o mended"
    built(capsys, "heal", "cut", *options.split(), *text.split(), *steps.split())
    before, after = (load_file(project / name / "model.safetensors") for name in ("cut", "mended"))
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert {name.split(".")[2] for name in moved} == {"0", "1"}


def test_a_stranger_is_refused_on_one_line(project: Path) -> None:
    save_tiny(project / "other", "llama", vocab_size=100)
    save_tokenizer(project / "other")
    options = "--method distill --parent model --text corpus.jsonl --field text --length 32"
    message = "its vocabulary has 100 tokens, its parent's 96; give the parent"
    with pytest.raises(CheckpointError, match=message):
        cli.main(["heal", "other", *options.split()], standalone_mode=False)
