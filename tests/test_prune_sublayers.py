"""Sublayers removed structurally: equal to silencing them, loadable by anyone, cut again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.blocks import hidden
from compressor.prune.driver import prune
from compressor.records import Selection
from compressor.sublayers import find_sublayers
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

ALL = sorted(FAMILIES)
SELECTIONS = {
    "attention": {"drop_attention": [1, 2]},
    "ffn": {"drop_ffn": [0, 2]},
    "joint": {"drop_attention": [0, 2], "drop_ffn": [1]},
    "with a block": {"drop_blocks": [0], "drop_attention": [2], "drop_ffn": [3]},
}
PLAIN = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def selection(**drop: list[int]) -> Selection:
    return Selection(num_blocks=4, **drop)  # type: ignore[arg-type]


def cut(tmp_path: Path, family: str, drop: dict[str, list[int]], **overrides: Any) -> Path:
    """The folder of a tiny model without `drop`; its source is beside it."""
    save_tiny(tmp_path / "source", family, **overrides)
    prune(tmp_path / "source", selection(**drop), tmp_path / "out", flavour="auto")
    return tmp_path / "out"


def silenced(family: str, drop: dict[str, list[int]], **overrides: Any) -> Any:
    """An independent construction: the whole model, what the branches return made zero."""
    model = tiny(family, **overrides)

    def silence(_: Any, __: Any, out: Any) -> Any:
        zero = torch.zeros_like(hidden(out))
        return (zero, *out[1:]) if isinstance(out, tuple) else zero

    gone = drop.get("drop_blocks", [])
    for index, block in enumerate(find_sublayers(tiny(family, **overrides))):
        for kind in ("attention", "ffn"):
            branch = getattr(block, kind)
            if index in {*gone, *drop.get(f"drop_{kind}", [])}:
                model.get_submodule(branch.last).register_forward_hook(silence)
    return model


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(tokens() if ids is None else ids, use_cache=False).logits
    return out


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("drop", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("family", ALL)
def test_equals_silencing_the_branches(
    family: str, drop: dict[str, list[int]], tmp_path: Path
) -> None:
    model = load(cut(tmp_path, family, drop))
    expected = logits(silenced(family, drop))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, logits(tiny(family)), atol=1e-2)
    prompt = tokens(2, 10)
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **PLAIN)
    assert torch.equal(
        cached, model.generate(prompt, attention_mask=mask, use_cache=False, **PLAIN)
    )
