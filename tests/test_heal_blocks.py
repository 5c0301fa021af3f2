"""LISA and tuning of a few blocks: what trains, what holds optimizer state, what is written."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint
from compressor.errors import HealingError, NotApplicable
from compressor.heal import LastBlocksParams, LisaParams, TrainingParams
from compressor.heal.last_blocks import around, behind, removed, thawed
from compressor.heal.lisa import Schedule, active
from compressor.heal.write import replace, rewrite
from compressor.prune.blocks import prune
from compressor.records import Selection
from tests.healing import WINDOWS, run, task
from tests.tiny import FAMILIES, save_tiny, tiny

SHARED = {
    "steps": 4, "warmup_steps": 0, "batch_size": 2, "save_every": 99, "validation": 0,
    "learning_rate": 1e-2,
}  # fmt: skip
LISA = LisaParams(**SHARED, blocks=1, every=2)
LAST = LastBlocksParams(**SHARED, blocks=2)


def changed(source: Path, out: Path) -> set[str]:
    before, after = Checkpoint(source), Checkpoint(out)
    assert sorted(before.names) == sorted(after.names)
    for name in before.names:
        assert before.stored_dtype(name) == after.stored_dtype(name)
    return {n for n in before.names if not torch.equal(before.tensor(n), after.tensor(n))}


def adamw(model: Any, batches: list[torch.Tensor], rate: float, steps: int) -> dict[str, Any]:
    """Plain full fine-tuning by hand: cosine without warm-up, gradients clipped to norm 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + torch.cos(torch.tensor(torch.pi * step / steps))) / 2
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def test_lisa_with_all_blocks_is_full_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "source", "llama")
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "compressor.heal.train.next_token_loss",
        lambda model, batch: seen.append(batch["input_ids"]) or model(
            input_ids=batch["input_ids"], labels=batch["input_ids"]).loss,
    )  # fmt: skip
    params = LISA.model_copy(update={"blocks": 4, "batch_size": 2, "micro_batch_size": 2})
    _, out = run(tmp_path, params)
    by_hand = adamw(model.train(), seen, 1e-2, 4)
    healed = AutoModelForCausalLM.from_pretrained(out)
    for name, parameter in healed.named_parameters():
        torch.testing.assert_close(parameter, by_hand[name], rtol=1e-4, atol=1e-6)


def test_lisa_trains_what_is_drawn_and_all_outside(tmp_path: Path) -> None:
    """Steps 0 to 3 are periods 0 and 1; embeddings, norm and head train in both."""
    save_tiny(tmp_path / "source", "llama")
    _, out = run(tmp_path, LISA)
    drawn = active(0, 0, 4, 1) | active(0, 1, 4, 1)
    assert len(drawn) == 2
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    blocks = {n for n in changed(tmp_path / "source", out) if n not in outside}
    assert {int(n.split(".")[2]) for n in blocks} == drawn
    assert outside <= changed(tmp_path / "source", out)


def test_optimizer_holds_state_of_what_trains_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "source", "llama")
    held: list[int] = []
    begin = Schedule.on_step_begin

    def watched(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        begin(self, args, state, control, **rest)
        held.append(sum(v["exp_avg"].numel() for v in rest["optimizer"].state.values() if v))

    monkeypatch.setattr(Schedule, "on_step_begin", watched)
    run(tmp_path, LISA)
    model = tiny("llama")
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 4 * block
    assert held == [0, outside + block, outside, outside + block]


def test_draws_are_uniform_without_replacement() -> None:
    draws = [active(seed, period, 5, 2) for seed in range(20) for period in range(100)]
    assert all(len(drawn) == 2 and drawn <= set(range(5)) for drawn in draws)
    counts = collections.Counter(i for drawn in draws for i in drawn)
    assert all(abs(count - 800) < 90 for count in counts.values())
    assert active(3, 7, 5, 2) == active(3, 7, 5, 2)
    assert [active(0, p, 5, 2) for p in range(9)] != [active(1, p, 5, 2) for p in range(9)]


@pytest.mark.parametrize("params", [LISA, LAST], ids=["lisa", "last_blocks"])
def test_more_blocks_than_there_are(params: TrainingParams, tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    with pytest.raises(HealingError, match=r"heal\.blocks 9: .* has 4 blocks; ask for fewer"):
        run(tmp_path, params.model_copy(update={"blocks": 9}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_last_blocks_change_nothing_else(tied: bool, head: bool, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=tied)
    model.half().save_pretrained(tmp_path / "source")
    _, out = run(tmp_path, LAST.model_copy(update={"head": head}))
    shell = {"model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"}
    expected = {n for n in Checkpoint(out).names if ".layers.2." in n or ".layers.3." in n}
    assert changed(tmp_path / "source", out) == expected | (shell if head else set())
    assert ("lm_head.weight" in Checkpoint(out)) is not tied
    healed = AutoModelForCausalLM.from_pretrained(out)
    assert (healed.lm_head.weight is healed.model.embed_tokens.weight) is tied


def test_no_gradient_below_the_lowest_block_even_when_tied(tmp_path: Path) -> None:
    """The tied matrix gets the head's share of the gradient: that of a head of its own."""
    model = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    healer = thawed(task(tmp_path, LAST))
    kinds: list[bool] = []
    for block in Blocks(healer.model):
        block.register_forward_hook(lambda m, i, out: kinds.append(out.requires_grad))
    healer.model(WINDOWS, labels=WINDOWS).loss.backward()
    assert kinds == [False, False, True, True]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model(WINDOWS, labels=WINDOWS).loss.backward()
    trained = dict(healer.model.named_parameters())
    gradient = trained["model.embed_tokens.weight"].grad
    torch.testing.assert_close(gradient, model.lm_head.weight.grad)
    for name, parameter in model.named_parameters():
        if ".layers.2." in name or ".layers.3." in name or name == "model.norm.weight":
            torch.testing.assert_close(trained[name].grad, parameter.grad)


@pytest.mark.parametrize(
    ("gone", "blocks", "reach", "expected"),
    [
        ([13, 14, 15, 16, 17, 18], 24, 1, [12, 13]),
        ([13, 14, 15, 16, 17, 18], 24, 2, [11, 12, 13, 14]),
        ([3, 7, 8], 7, 1, [2, 3, 5, 6]),
        ([0, 1], 4, 1, [0]),
        ([4, 5], 4, 1, [3]),
        ([1, 3], 4, 1, [0, 1, 2]),
    ],
)
def test_blocks_around_the_cut(
    gone: list[int], blocks: int, reach: int, expected: list[int]
) -> None:
    kept = [i for i in range(blocks + len(gone)) if i not in gone]
    by_search = {
        new
        for new, old in enumerate(kept)
        if any(old + d in gone for d in (-1, 1))
    }  # fmt: skip
    assert reach != 1 or by_search == set(expected)
    assert around(gone, blocks, reach) == expected


def test_the_cut_is_found_beside_the_parent(tmp_path: Path) -> None:
    save_tiny(tmp_path / "parent", "llama", num_hidden_layers=6)
    gone = Selection(num_blocks=6, drop_blocks=[2, 3])
    prune(tmp_path / "parent", gone, tmp_path / "source")
    params = LAST.model_copy(update={"around_cut": True, "blocks": 1, "head": False})
    _, out = run(tmp_path, params)
    moved = changed(tmp_path / "source", out)
    assert {int(n.split(".")[2]) for n in moved} == {1, 2}
    assert removed(out, tmp_path / "parent") == [2, 3]
    with pytest.raises(NotApplicable, match=r"has every block of .*leave heal\.around_cut out"):
        removed(tmp_path / "parent", tmp_path / "parent")
    with pytest.raises(NotApplicable, match=r"is not given; put a prune stage .* --parent"):
        removed(tmp_path / "source", None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norm_and_head_of_every_family(family: str) -> None:
    model = tiny(family)
    norm, head = behind(model, Blocks(model))
    assert "Norm" in type(norm).__name__
    assert head is model.get_output_embeddings()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("params", [LISA, LAST], ids=["lisa", "last_blocks"])
def test_other_families(family: str, params: TrainingParams, tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", family)
    healed = AutoModelForCausalLM.from_pretrained(run(tmp_path, params)[1])
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with torch.no_grad():
        before, after = (float(m(WINDOWS, labels=WINDOWS).loss) for m in (source, healed))
    assert after < before


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_step_changes_no_bit(family: str, tmp_path: Path) -> None:
    """Weights as they were loaded, written back: every tensor of the file is the same."""
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    save_tiny(tmp_path / "source", family, **tied).bfloat16().save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    replace(model, weights, tmp_path / "source", tmp_path / "out")
    rewrite(tmp_path / "source", tmp_path / "plain", {})
    assert changed(tmp_path / "source", tmp_path / "out") == set()
    assert changed(tmp_path / "source", tmp_path / "plain") == set()


def test_both_copies_of_tied_weights_are_replaced(tmp_path: Path) -> None:
    """Old files hold the head beside the embedding that it is tied to."""
    save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    file = tmp_path / "source/model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    _, out = run(tmp_path, LAST)
    written = load_file(out / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert not torch.equal(written["lm_head.weight"], tensors["lm_head.weight"])
