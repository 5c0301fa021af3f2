"""Distillation as a healing: what a student learns, and which block it pairs with which."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint
from compressor.errors import (
    HealingError,
)
from compressor.heal import DistillParams
from compressor.heal.distill import student
from compressor.heal.distillation import (
    divergence,
)
from compressor.prune.blocks import prune
from compressor.prune.driver import prune as remove
from compressor.records import Selection
from tests.healing import WINDOWS, digest, interrupted, run, task
from tests.test_teacher import cached
from tests.tiny import save_tiny

PARAMS = DistillParams(
    rank=4, steps=8, warmup_steps=2, batch_size=2, save_every=3, learning_rate=1e-2,
    teacher_dtype="float32", validation=0,
)  # fmt: skip


def pruned(folder: Path, family: str = "llama", drop: tuple[int, ...] = (1, 2)) -> Any:
    """A parent and a student without some of its blocks."""
    model = save_tiny(folder / "parent", family)
    prune(folder / "parent", Selection(num_blocks=4, drop_blocks=list(drop)), folder / "source")
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_student_learns_what_its_parent_says(tmp_path: Path) -> None:
    parent = pruned(tmp_path)
    cached(tmp_path)
    params = PARAMS.model_copy(update={"steps": 30, "targets": "all", "save_every": 100})
    report, out = run(tmp_path, params)

    def apart(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            return divergence(model(WINDOWS).logits, parent(WINDOWS).logits).mean().item()

    before, after = apart(tmp_path / "source"), apart(out)
    assert after < 0.7 * before
    assert report["last_loss"] < report["first_loss"]


@pytest.mark.parametrize(
    ("train", "hidden", "filters"),
    [("lora", (), "identity"), ("lora", (1, 3), "linear"), ("all", (1,), "identity")],
)
def test_nothing_pruned_is_nothing_changed(
    train: str, hidden: tuple[int, ...], filters: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "parent", "llama")
    save_tiny(tmp_path / "source", "llama")
    cached(tmp_path, hidden=hidden)
    update = {"train": train, "hidden": hidden, "filters": filters, "hidden_weight": 1.0}
    report, out = run(tmp_path, PARAMS.model_copy(update=update))
    assert report["first_loss"] == report["last_loss"] == 0
    assert same(weights(out), weights(tmp_path / "source"))


def test_the_first_loss_is_the_divergence(tmp_path: Path) -> None:
    """The trainer's row of the parent's outputs is that of the window, in any order."""
    parent = pruned(tmp_path)
    cached(tmp_path)
    params = PARAMS.model_copy(update={"batch_size": 6, "steps": 1, "warmup_steps": 0})
    report, _ = run(tmp_path, params)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with torch.no_grad():
        expected = divergence(model(WINDOWS).logits, parent(WINDOWS).logits).mean().item()
    assert report["first_loss"] == pytest.approx(expected, rel=1e-4)


def test_hidden_states_weigh_as_much_as_the_logits(tmp_path: Path) -> None:
    pruned(tmp_path)
    cached(tmp_path, hidden=(0, 3))
    batch = {"input_ids": WINDOWS[:2], "index": torch.tensor([0, 1])}
    losses = {}
    for weight in (None, 0.5, 1.5):
        params = PARAMS.model_copy(update={"hidden": (0, 3), "hidden_weight": weight})
        made = student(task(tmp_path, params))
        assert made.loss
        losses[weight] = made.loss(made.model.eval(), batch).item()
    gap = losses[1.5] - losses[0.5]
    assert gap > 0
    logits = losses[0.5] - 0.5 * gap
    assert losses[None] == pytest.approx(2 * logits, rel=1e-5)
    assert not any(block._forward_hooks for block in made.model.modules())


def test_filters_train_and_are_dropped(tmp_path: Path) -> None:
    pruned(tmp_path)
    cached(tmp_path, hidden=(0,))
    params = PARAMS.model_copy(update={"hidden": (0,), "filters": "linear"})
    report, out = run(tmp_path, params)
    plain, other = run(tmp_path, PARAMS.model_copy(update={"hidden": (0,)}), "plain")
    assert report["trainable"] == plain["trainable"] + 32 * 32
    assert weights(out).keys() == weights(tmp_path / "source").keys()
    assert not same(weights(out), weights(other))
    assert sorted(p.name for p in (out / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_distillation_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(tmp_path)
    cached(tmp_path, hidden=(0, 3))
    params = PARAMS.model_copy(update={"hidden": (0, 3), "filters": "linear"})
    _, whole = run(tmp_path, params)
    interrupted(tmp_path, monkeypatch, 7, params)
    _, again = run(tmp_path, params, "cut")
    assert digest(again) == digest(whole)
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("train", "untouched"),
    [("all", {"embed_tokens"}), ("last_blocks", {"embed_tokens", "layers.0"})],
)
def test_weights_train_without_adapters(train: str, untouched: set[str], tmp_path: Path) -> None:
    pruned(tmp_path)
    cached(tmp_path)
    params = PARAMS.model_copy(update={"train": train, "blocks": 1, "learning_rate": 1e-3})
    report, out = run(tmp_path, params)
    before, after = weights(tmp_path / "source"), weights(out)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {n for n in before if n.removeprefix("model.").startswith(tuple(untouched))}
    assert report["last_loss"] < report["first_loss"]


def test_outputs_over_another_text_are_refused(tmp_path: Path) -> None:
    pruned(tmp_path)
    cached(tmp_path)
    made = task(tmp_path, PARAMS)
    with pytest.raises(HealingError, match="outputs over another text"):
        student(dataclasses.replace(made, tokens=WINDOWS.flip(0)))


# Which block is which


def test_blocks_are_matched_by_their_original_index(tmp_path: Path) -> None:
    pruned(tmp_path, drop=(1,))
    cached(tmp_path, hidden=(2,))
    made = student(task(tmp_path, PARAMS.model_copy(update={"hidden": (2,)})))
    loss: Any = made.loss
    layers = made.model.get_decoder().layers  # type: ignore[operator]
    assert loss._matched == {2: layers[1]}
    told = student(task(tmp_path, PARAMS.model_copy(update={"hidden": (2,), "kept": (0, 1, 2)})))
    other: Any = told.loss
    assert other._matched[2] is told.model.get_decoder().layers[2]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kept", "message"),
    [((0, 2), "lists 2 blocks, but .* has 3"), ((0, 1, 3), r"blocks \[2\] of the parent are not")],
)
def test_impossible_pairs_are_refused(kept: tuple[int, ...], message: str, tmp_path: Path) -> None:
    pruned(tmp_path, drop=(1,))
    cached(tmp_path, hidden=(2,))
    with pytest.raises(HealingError, match=message):
        student(task(tmp_path, PARAMS.model_copy(update={"hidden": (2,), "kept": kept})))


def test_states_of_another_width_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "parent", "llama")
    save_tiny(tmp_path / "source", "llama", hidden_size=64)
    cached(tmp_path, hidden=(2,))
    with pytest.raises(HealingError, match="64 channels, its parent 32"):
        student(task(tmp_path, PARAMS.model_copy(update={"hidden": (2,), "kept": (0, 1, 2, 3)})))


def test_a_student_without_some_sublayers(tmp_path: Path) -> None:
    """Its model type is ours; what is left of a block is known again."""
    save_tiny(tmp_path / "parent", "llama")
    gone = Selection(num_blocks=4, drop_blocks=[2], drop_attention=[1], drop_ffn=[3])
    remove(tmp_path / "parent", gone, tmp_path / "source", flavour="auto")
    cached(tmp_path, hidden=(1, 3), student=tmp_path / "source")
    made = student(task(tmp_path, PARAMS.model_copy(update={"hidden": (1, 3)})))
    layers = Blocks(made.model).layers
    loss: Any = made.loss
    assert loss._matched == {1: layers[1], 3: layers[2]}
    assert loss(made.model, {"input_ids": WINDOWS[:2], "index": torch.tensor([0, 1])}) > 0
