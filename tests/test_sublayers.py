"""Residual branches: found by watching, checked against what a block really computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.blocks import Blocks, hidden
from compressor.errors import NotApplicable
from compressor.sublayers import Sublayer, Sublayers, find_sublayers
from tests.tiny import FAMILIES, tiny, tokens

PRE_NORM = ("input_layernorm", "post_attention_layernorm")
EXPECTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gemma3_text": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "gemma2": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "gpt2": (("ln_1",), ("ln_2",)),
    "opt": (("self_attn_layer_norm",), ("final_layer_norm",)),
    "olmo2": (("post_attention_layernorm",), ("post_feedforward_layernorm",)),
}
"""Norms of attention and feed-forward; the other families have one before each."""


def tails(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.rpartition(".")[2] for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_told_apart_by_what_they_do(family: str) -> None:
    found = find_sublayers(tiny(family))
    assert len(found) == 4
    for each in found:
        expected = EXPECTED.get(family, (PRE_NORM[:1], PRE_NORM[1:]))
        assert (tails(each.attention.norms), tails(each.ffn.norms)) == expected
        assert each.parallel == (family == "gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_the_sum_of_its_branches(family: str) -> None:
    model = tiny(family)
    branches = find_sublayers(tiny(family))
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            seen[f"{name} in"], seen[f"{name} out"] = given[0], hidden(out)

        return hook

    names = {n for b in branches for s in (b.attention, b.ffn) for n in (s.first, s.last)}
    names |= {f"{Blocks(model).prefix}.{i}" for i in range(4)}
    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        model(tokens(), use_cache=False)
    for index, block in enumerate(branches):
        where = f"{Blocks(model).prefix}.{index}"
        start, end = seen[f"{where} in"], seen[f"{where} out"]
        attention = seen[f"{block.attention.last} out"]
        ffn = seen[f"{block.ffn.last} out"].view_as(start)  # OPT flattens batch and time
        middle = start if block.parallel else start + attention
        torch.testing.assert_close(seen[f"{block.attention.first} in"], start)
        torch.testing.assert_close(seen[f"{block.ffn.first} in"].view_as(start), middle)
        torch.testing.assert_close(end, start + attention + ffn)


def other(family: str, **config: Any) -> list[Sublayers]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | config)))
    return find_sublayers(made)


def test_a_norm_that_serves_both_belongs_to_neither() -> None:
    first = other("phi", intermediate_size=48)[1]
    assert first.parallel
    assert first.attention == Sublayer(
        ("model.layers.1.self_attn",),
        (),
        "model.layers.1.input_layernorm",
        "model.layers.1.self_attn",
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: find_sublayers(tiny("opt", do_layer_norm_before=False)), "post-norm"),
        (lambda: other("bloom", n_head=4, n_layer=2), "adds the residual stream inside itself"),
    ],
)
def test_blocks_without_branches_are_refused(make: Any, said: str) -> None:
    with pytest.raises(NotApplicable, match=said):
        make()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_forwards_are_the_blocks_own_again(family: str) -> None:
    model = tiny(family)
    blocks = Blocks(model)
    with blocks.stand_in(lambda x, *_, **__: x, [1]):
        assert ["forward" in block.__dict__ for block in blocks][:3] == [False, True, False]
    find_sublayers(model)
    assert not any("forward" in block.__dict__ for block in blocks)
