"""Blocks are known again by their weights, whatever was done to them; what is not is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressor.errors import HealingError
from compressor.lineage import recognise, sketch
from compressor.prune.blocks import prune
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.records import Selection
from tests.tiny import save_tiny

A, B, C = {"w (2,)": [1.0, 0.0]}, {"w (2,)": [0.0, 1.0]}, {"w (2,)": [-1.0, 0.0]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "olmo2"])
def test_cut_rounded_and_trained_blocks_are_known(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "parent", family)
    gone = Selection(num_blocks=4, drop_blocks=[0, 2])
    prune(tmp_path / "parent", gone, tmp_path / "cut")
    parent = sketch(tmp_path / "parent")
    assert recognise(sketch(tmp_path / "cut"), parent) == [1, 3]
    model: nn.Module = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std() * torch.randn_like(weight)
    model.half().save_pretrained(tmp_path / "healed")  # type: ignore[operator]
    assert recognise(sketch(tmp_path / "healed"), parent) == [1, 3]
    save_tiny(tmp_path / "stranger", family, seed=1)
    with pytest.raises(HealingError, match="block 0 is not known again"):
        recognise(sketch(tmp_path / "stranger"), parent)


def test_a_quantized_parent_is_known(tmp_path: Path) -> None:
    save_tiny(tmp_path / "whole", "llama")
    (tmp_path / "parent").mkdir()
    quantize(tmp_path / "whole", tmp_path / "parent", None, "rtn", RtnParams(group_size=16))
    prune(tmp_path / "whole", Selection(num_blocks=4, drop_blocks=[1]), tmp_path / "cut")
    assert recognise(sketch(tmp_path / "cut"), sketch(tmp_path / "parent")) == [0, 2, 3]


def test_the_nearest_is_taken() -> None:
    assert recognise([A, C], [A, B, C]) == [0, 2]
    assert recognise([{"w (2,)": [0.3, 1.0]}], [A, B, C]) == [1]
    narrow = {"w (3,)": [9.0, 9.0], "norm (2,)": [1.0, 1.1]}  # a width was cut: norms are left
    parent = [{**A, "norm (2,)": [1.0, 1.2]}, {**B, "norm (2,)": [1.0, 1.1]}]
    assert recognise([narrow], parent) == [1]


@pytest.mark.parametrize(
    ("student", "parent", "said"),
    [
        ([A], [A, A, B], "block 0 is not known again: it is 0.00 .* block 0 .* 0.00 from another"),
        ([A, {"w (2,)": [1.0, 0.9]}], [A, B, C], "block 1 is not known again: .* heal.kept"),
        ([A], [{"w (2,)": [1.0, 0.8]}], "0.62 of its size from block 0 .* 1.00 from another"),
        ([{}], [A], "block 0 is not known again: it is inf"),
        ([B, A], [A, B, C], r"its parent's \[1, 0\], not in its order"),
    ],
)
def test_what_is_not_sure_is_told(
    student: list[dict[str, list[float]]], parent: list[dict[str, list[float]]], said: str
) -> None:
    with pytest.raises(HealingError, match=said):
        recognise(student, parent)
