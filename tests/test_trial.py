"""A model with parts left out in place equals one that was built without them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compressor import cut
from compressor.blocks import Blocks
from compressor.decoder import Decoder
from compressor.errors import NotApplicable, SelectionError
from compressor.records import Selection
from compressor.trial import Trial
from tests.tiny import FAMILIES, save_tiny, tokens, weights_read

SANDWICH = (
    ("input_layernorm", "self_attn", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)
NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "gpt2": (("ln_1", "attn"), ("ln_2", "mlp")),
    "opt": (("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "fc1", "fc2")),
    "olmo2": (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")),
    "gpt_neox": (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp")),
}
"""Modules of both branches in the order they run; the other families are Llama's."""
LLAMA = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
SELECTIONS = {
    "nothing": Selection(num_blocks=4),
    "blocks": Selection(num_blocks=4, drop_blocks=[0, 2]),
    "sublayers": Selection(num_blocks=4, drop_attention=[0, 3], drop_ffn=[1]),
    "all kinds": Selection(num_blocks=4, drop_blocks=[2], drop_attention=[3], drop_ffn=[0]),
    "shared": Selection(
        num_blocks=4, drop_attention=[3], reuse_attention={1: 2}, reuse_ffn={0: 1, 3: 1}
    ),
}


def built(model: Any, family: str, selection: Selection) -> Any:
    """The cut model, made by copying modules, zeroing outputs and deleting blocks."""
    model = copy.deepcopy(model)
    layers = Blocks(model).layers
    whole = copy.deepcopy(layers)
    attention, ffn = NAMES.get(family, LLAMA)
    for names, reuse in ((attention, selection.reuse_attention), (ffn, selection.reuse_ffn)):
        for taker, giver in reuse.items():
            for name in names:
                given = getattr(whole[giver], name).state_dict()
                getattr(layers[taker], name).load_state_dict(given)
    for names, dropped in ((attention, selection.drop_attention), (ffn, selection.drop_ffn)):
        for index in dropped:
            getattr(layers[index], names[-1]).register_forward_hook(zero)
    for index in reversed(selection.drop_blocks):
        del layers[index]
        if getattr(model.config, "layer_types", None):
            types = list(model.config.layer_types)
            model.config.layer_types = types[:index] + types[index + 1 :]
    model.config.num_hidden_layers = len(layers)
    return model


def zero(_: nn.Module, __: Any, out: Any) -> Any:
    return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_equals_the_model_built_without_the_parts(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, family)
    trial = Trial(Decoder(tmp_path), tokens(), batch_size=2)
    for name, selection in SELECTIONS.items():
        expected = logits(built(model, family, selection), tokens())
        loss = cross_entropy(expected[:, :-1].flatten(0, 1).double(), tokens()[:, 1:].flatten())
        assert trial.loss(selection) == pytest.approx(loss.item(), rel=1e-5), name
        states = trial.states(selection)
        head = logits_of(trial, selection)
        torch.testing.assert_close(head, expected, rtol=2e-4, atol=2e-4)
        assert states.shape == (*tokens().shape, 32)


def logits_of(trial: Trial, selection: Selection) -> torch.Tensor:
    """By the model's own head on what `states` says it reads."""
    model: Any = trial.decoder.model
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        plain: torch.Tensor = model.get_output_embeddings()(trial.states(selection))
        return cap * torch.tanh(plain / cap) if cap else plain


def test_comparison_with_the_full_model(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    selection = SELECTIONS["all kinds"]
    p, q = (
        log_softmax(logits(m, tokens())[:, :-1].double(), -1)
        for m in (model, built(model, "llama", selection))
    )
    quality = Trial(Decoder(tmp_path), tokens(), batch_size=2).compare(selection)
    kl = kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    losses = -q.gather(-1, tokens()[:, 1:, None])[..., 0].mean(-1)
    assert quality.kl == pytest.approx(kl.item(), rel=1e-4)
    assert quality.window_losses == pytest.approx(losses.tolist(), rel=1e-5)
    assert quality.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert quality.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    same = Trial(Decoder(tmp_path), tokens()).compare(SELECTIONS["nothing"])
    assert (same.kl, same.top1_agreement) == (0, 1)


class Quiet:
    def advance(self, steps: float = 1, note: str = "") -> None:
        assert steps == 1


def orders() -> list[list[Selection]]:
    base = list(SELECTIONS.values())
    return [base, base[::-1], [base[1], base[4], base[1], base[0], base[2], base[3]]]


@pytest.mark.parametrize("states", [0, 30_000, 2**30])
@pytest.mark.parametrize("weights", [0, 2**30])
def test_nothing_depends_on_order_or_memory(
    states: int, weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama")
    fresh = {name: Trial(Decoder(tmp_path), tokens()).loss(s) for name, s in SELECTIONS.items()}
    monkeypatch.setattr(cut, "STATE_BYTES", max(1, states))
    monkeypatch.setattr(cut, "WEIGHT_BYTES", weights)
    for order in orders():
        trial = Trial(Decoder(tmp_path), tokens())
        for selection in order:
            name = next(n for n, s in SELECTIONS.items() if s == selection)
            assert trial.loss(selection) == fresh[name]
        trial = Trial(Decoder(tmp_path), tokens())
        names = [next(n for n, s in SELECTIONS.items() if s == each) for each in order]
        assert trial.try_all(trial.loss, order, Quiet()) == [fresh[name] for name in names]


def test_weights_that_fit_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama")
    read = weights_read(monkeypatch)
    trial = Trial(Decoder(tmp_path), tokens())
    for selection in SELECTIONS.values():
        trial.loss(selection)
    assert len(read) == len(set(read)) == 4 * 9
    read.clear()
    monkeypatch.setattr(cut, "WEIGHT_BYTES", 0)
    trial = Trial(Decoder(tmp_path), tokens())
    for selection in SELECTIONS.values():
        trial.loss(selection)
    assert len(read) > len(set(read))


def test_only_what_differs_is_run_and_counted(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    trial = Trial(Decoder(tmp_path), tokens())
    ran: list[int] = []
    run = trial.decoder.run
    trial.decoder.run = lambda i, x: (ran.append(i), run(i, x))[1]  # type: ignore[method-assign]

    def ask(**cut: Any) -> tuple[list[int], float]:
        before = trial.spent
        ran.clear()
        trial.loss(Selection(num_blocks=4, **cut))
        return list(ran), trial.spent - before

    assert ask() == ([0, 1, 2, 3], 1)
    assert ask(drop_blocks=[2]) == ([3], 0.25)
    assert ask(drop_blocks=[3]) == ([2], 0.25)
    assert ask(drop_blocks=[3]) == ([], 0)
    assert ask() == ([], 0)
    assert ask(drop_attention=[3], drop_ffn=[2]) == ([2, 3], 0.25)
    assert ask(reuse_ffn={1: 2}) == ([1, 2, 3], 0.75)


def test_a_killed_search_replays_its_losses(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    log = tmp_path / "work" / "losses.jsonl"
    first = Trial(Decoder(tmp_path / "model"), tokens(), log=log)
    losses = [first.loss(s) for s in SELECTIONS.values()]
    whole = log.read_text()
    log.write_text(whole[: whole.rindex(",")])
    second = Trial(Decoder(tmp_path / "model"), tokens(), log=log)
    ran: list[int] = []
    run = second.decoder.run
    second.decoder.run = lambda i, x: (ran.append(i), run(i, x))[1]  # type: ignore[method-assign]
    assert [second.loss(s) for s in SELECTIONS.values()] == losses
    assert second.spent == first.spent
    assert log.read_text() == whole
    assert len(ran) == 4


def test_an_overflow_is_the_worst_loss(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e38)
    model.save_pretrained(tmp_path)
    trial = Trial(Decoder(tmp_path), tokens())
    assert trial.loss(SELECTIONS["nothing"]) == float("inf")
    assert trial.loss(Selection(num_blocks=4, drop_blocks=[1])) < 100


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "llama", "llama")
    trial = Trial(Decoder(tmp_path / "llama"), tokens())
    with pytest.raises(SelectionError, match="for a model of 5 blocks, but this one has 4"):
        trial.loss(Selection(num_blocks=5))
    save_tiny(tmp_path / "opt", "opt", do_layer_norm_before=False)
    post_norm = Trial(Decoder(tmp_path / "opt"), tokens())
    assert post_norm.loss(Selection(num_blocks=4, drop_blocks=[1])) > 0
    with pytest.raises(NotApplicable, match="post-norm"):
        post_norm.loss(Selection(num_blocks=4, drop_ffn=[1]))
