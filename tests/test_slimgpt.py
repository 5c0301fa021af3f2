"""SlimGPT equals brute-force optimal brain surgery, and its result is a native model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder
from compressor.errors import (
    CheckpointError,
    CompressError,
    NotApplicable,
    SelectionError,
    UnsupportedArchitecture,
)
from compressor.prune.brain_surgery import eliminate, remove_units, unit_scores
from compressor.prune.slimgpt import REPORT, slimgpt
from compressor.prune.width import Branch, Sizes, narrowed, sizes_of, spread
from tests.tiny import save_tiny, tokens

WINDOWS = tokens(5, 24)
SUPPORTED = ["gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"]
PARAMS: dict[str, Any] = {"ratio": 0.3, "attention_ratio": None, "multiple": 8, "damp": 0.01}


def problem(rows: int = 5, columns: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the gram of correlated inputs, float64."""
    noise = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=noise, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=noise, dtype=torch.float64)
    x = mix @ torch.randn(columns, 60, generator=noise, dtype=torch.float64)
    return weight, x @ x.T / 60


def test_t11_column_scores_and_compensation() -> None:
    weight = torch.tensor([[1.0, 2], [0.5, -1]]).double()
    hessian = torch.tensor([[2.0, 1], [1, 2]]).double()
    scores = unit_scores(weight, hessian.inverse(), 1)
    assert scores.tolist() == pytest.approx([1.875, 7.5])
    left, inverse = eliminate(weight, hessian.inverse(), torch.tensor([True, False]))
    assert left.flatten().tolist() == pytest.approx([2.5, -0.75])
    assert inverse.item() == pytest.approx(1 / 2)  # the inverse of what is left of H
    change = torch.cat([torch.zeros(2, 1).double(), left], 1) - weight
    assert torch.trace(change @ hessian @ change.T).item() == pytest.approx(1.875)


@pytest.mark.parametrize("size", [1, 3])
def test_a_score_is_the_loss_that_removing_takes(size: int) -> None:
    """Against least squares without any inverse of H: the best W on the columns that stay."""
    weight, hessian = problem()
    scores = unit_scores(weight, hessian.inverse(), size)
    for unit in range(12 // size):
        stays = torch.ones(12, dtype=torch.bool)
        stays[unit * size : (unit + 1) * size] = False
        best = torch.zeros_like(weight)
        best[:, stays] = torch.linalg.solve(
            hessian[stays][:, stays], (weight @ hessian)[:, stays].T
        ).T
        change = best - weight
        assert scores[unit].item() == pytest.approx((change @ hessian * change).sum().item())
        left, _ = eliminate(weight, hessian.inverse(), ~stays)
        assert torch.allclose(left, best[:, stays])


def one_column_at_a_time(
    weight: Tensor, hessian: Tensor, size: int, count: int
) -> tuple[list[int], Tensor]:
    """The paper without its shortcuts: H^-1 of the alive columns made anew for every column."""

    def without(weight: Tensor, alive: list[int], unit: int) -> tuple[Tensor, list[int], float]:
        weight, alive, lost = weight.clone(), list(alive), 0.0
        inverse = first
        for column in range(unit * size, (unit + 1) * size):
            p = alive.index(column)
            if column % size:
                inverse = torch.linalg.inv(hessian[alive][:, alive])
            lost += float((weight[:, column] ** 2).sum() / inverse[p, p])
            step = torch.outer(weight[:, column], inverse[p]) / inverse[p, p]
            weight[:, alive] -= step
            alive.remove(column)
        return weight, alive, lost

    alive, units = list(range(weight.shape[1])), list(range(weight.shape[1] // size))
    for _ in range(count):
        first = torch.linalg.inv(hessian[alive][:, alive])
        losses = {unit: without(weight, alive, unit)[2] for unit in units}
        least = min(losses, key=lambda unit: losses[unit])
        weight, alive, _ = without(weight, alive, least)
        units.remove(least)
    return units, weight[:, alive]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 7), (2, 3), (3, 2), (4, 2)])
def test_remove_units_is_the_naive_greedy(size: int, count: int) -> None:
    weight, hessian = problem(seed=size)
    units, left = remove_units(weight, hessian, size, count, damp=0.0)
    expected_units, expected = one_column_at_a_time(weight, hessian, size, count)
    assert units.tolist() == expected_units
    assert torch.allclose(left, expected, rtol=1e-8)
    ridge = 0.5 * hessian.diagonal().mean() * torch.eye(12).double()
    units, left = remove_units(weight, hessian, size, count, damp=0.5)
    expected_units, expected = one_column_at_a_time(weight, hessian + ridge, size, count)
    assert units.tolist() == expected_units
    assert torch.allclose(left, expected, rtol=1e-8)


def test_batches_shrink_and_end_at_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(columns=80)
    sizes: list[int] = []
    real = eliminate

    def counting(weight: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(int(gone.sum()))
        return real(weight, inverse, gone)

    monkeypatch.setattr("compressor.prune.brain_surgery.eliminate", counting)
    units, left = remove_units(weight, hessian, 1, 50, damp=1e-9)
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-31:], sum(sizes)) == (3, [1] * 31, 50)
    best = torch.linalg.solve(hessian[units][:, units], (weight @ hessian)[:, units].T).T
    assert torch.allclose(left, best, rtol=1e-4, atol=1e-6)
    assert units.tolist() == sorted(units.tolist())


def test_uncorrelated_inputs_need_no_compensation() -> None:
    weight, _ = problem()
    energy = torch.rand(12, generator=torch.Generator().manual_seed(3)).double() + 0.1
    units, left = remove_units(weight, energy.diag(), 1, 5, damp=0.0)
    order = ((weight**2).sum(0) * energy).argsort()
    assert units.tolist() == sorted(order[5:].tolist())
    assert torch.allclose(left, weight[:, units])


def test_grams_that_cannot_work_are_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(CompressError, match="use more text, or raise damp"):
        remove_units(weight, torch.zeros_like(hessian), 1, 1, damp=0.01)


def test_rows_of_fused_linears() -> None:
    """Two groups of two query heads of width 3: q 0-11, k 12-17, v 18-23."""
    branch = Branch("a", "o_proj", ("qkv_proj",), 2, {"q": 6, "k": 3})
    second = torch.tensor([1])
    assert branch.rows_of("qkv_proj", second).tolist() == [*range(6, 12), 15, 16, 17, 21, 22, 23]
    assert branch.columns(second).tolist() == [*range(6, 12)]
    ffn = Branch("f", "down_proj", ("gate_up_proj",), 5, {"c": 1})
    assert ffn.rows_of("gate_up_proj", torch.tensor([0, 3])).tolist() == [0, 3, 5, 8]
    assert spread(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]


def naive_slim(model: Any, channels: int) -> tuple[Any, list[float]]:
    """The full-size model in float64 with columns compensated and zeroed, block by block.

    One key-value group of two goes, and channels down to `channels`; H from hooks, every column
    eliminated by itself. Beside it the relative error of each output matrix's outputs.
    """
    model, errors = copy.deepcopy(model).double(), []
    for block in model.model.layers:
        for linear, size, count in (
            (block.self_attn.o_proj, 2 * model.config.head_dim, 1),
            (block.mlp.down_proj, 1, 48 - channels),
        ):
            seen: list[Tensor] = []
            handle = linear.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1))
            )
            with torch.no_grad():
                model(WINDOWS, use_cache=False)
            handle.remove()
            hessian = seen[0].T @ seen[0] / len(seen[0])
            hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
            weight = linear.weight.data
            units, left = one_column_at_a_time(weight.clone(), hessian, size, count)
            columns = [c for unit in units for c in range(unit * size, (unit + 1) * size)]
            dense = seen[0] @ weight.T
            weight.zero_()
            weight[:, columns] = left
            errors.append(float((seen[0] @ weight.T - dense).norm() / dense.norm()))
    return model, errors


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_equals_the_naive_construction(family: str, tmp_path: Path) -> None:
    """Eight channels go one by one, so the greedy is that of the paper."""
    model = save_tiny(tmp_path / "source", family, head_dim=8)
    slimgpt(tmp_path / "source", tmp_path / "out", WINDOWS, **PARAMS, batch_size=2)
    slim = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert slim.config.intermediate_size == 40
    expected, errors = naive_slim(model, 40)
    report = json.loads((tmp_path / "out" / REPORT).read_text())["blocks"]
    found = [row[f"{name}_error"] for row in report for name in ("o_proj", "down_proj")]
    assert found == pytest.approx(errors, rel=1e-3)
    with torch.no_grad():
        logits, wanted = slim(tokens()).logits, expected(tokens()).logits
        assert torch.allclose(logits.double(), wanted, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(model(tokens()).logits.double(), wanted, rtol=0.1, atol=0.1)


def zeroed(model: Any, folder: Path) -> Any:
    """The original at full size: what the report says went is zero, the rest from the result."""
    model, slim = copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(folder)
    rows = json.loads((folder / REPORT).read_text())["blocks"]
    for full, narrow, row in zip(model.model.layers, slim.model.layers, rows, strict=True):
        per_group = full.self_attn.o_proj.in_features // 2
        for linear, other, gone, size in (
            (full.self_attn.o_proj, narrow.self_attn.o_proj, row["removed_groups"], per_group),
            (full.mlp.down_proj, narrow.mlp.down_proj, row["removed_channels"], 1),
        ):
            units = linear.in_features // size
            stay = [u for u in range(units) if u not in gone]
            columns = [c for u in stay for c in range(u * size, (u + 1) * size)]
            linear.weight.data.zero_()
            linear.weight.data[:, columns] = other.weight.data
    return model


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_result_is_a_native_model(family: str, tmp_path: Path) -> None:
    biased = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = save_tiny(tmp_path / "source", family, **biased)
    before = Checkpoint(tmp_path / "source")
    slimgpt(tmp_path / "source", tmp_path / "out", WINDOWS, **PARAMS)
    slim, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(slim) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    slim.eval()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert (config["head_dim"], config["intermediate_size"]) == (8, 40)
    with torch.no_grad():
        expected = zeroed(model, tmp_path / "out")(tokens(), use_cache=False).logits
        assert torch.allclose(slim(tokens(), use_cache=False).logits, expected, atol=1e-4)
    plain = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = tokens(2, 10)
    mask = torch.ones_like(prompt)
    cached = slim.generate(prompt, attention_mask=mask, use_cache=True, **plain)
    assert torch.equal(cached, slim.generate(prompt, attention_mask=mask, use_cache=False, **plain))
    after = Checkpoint(tmp_path / "out")
    untouched = [
        n for n in before.names if "norm" in n or "embed" in n or n.endswith("o_proj.bias")
    ]
    assert len(untouched) > 8
    assert all(torch.equal(before.tensor(n), after.tensor(n)) for n in untouched)
    assert set(before.names) == set(after.names)


def test_rows_that_stay_are_bitwise_and_half_precision_stays(tmp_path: Path) -> None:
    save_tiny(tmp_path / "full", "qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    slimgpt(tmp_path / "source", tmp_path / "out", WINDOWS, **PARAMS)
    before, after = Checkpoint(tmp_path / "source"), Checkpoint(tmp_path / "out")
    assert {after.stored_dtype(name) for name in after.names} == {torch.bfloat16}
    report = json.loads((tmp_path / "out" / REPORT).read_text())["blocks"]
    for index, row in enumerate(report):
        (gone,) = row["removed_groups"]
        stay = 1 - gone
        for name, size in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            for kind in ("weight", "bias"):
                path = f"model.layers.{index}.self_attn.{name}.{kind}"
                rows = before.tensor(path)[stay * size : (stay + 1) * size]
                assert torch.equal(after.tensor(path), rows)
        assert 0 < row["o_proj_error"] < 1
        assert 0 < row["down_proj_error"] < 1


def test_attention_may_stay_whole(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    found = slimgpt(
        tmp_path / "source", tmp_path / "out", WINDOWS, **PARAMS | {"attention_ratio": 0.0}
    )
    assert (found["heads"], found["groups"]) == (4, 2)
    before, after = Checkpoint(tmp_path / "source"), Checkpoint(tmp_path / "out")
    for name in before.names:
        if "self_attn" in name:
            assert torch.equal(before.tensor(name), after.tensor(name))
    assert "o_proj_error" not in (tmp_path / "out" / REPORT).read_text()


def budget(family: str, tmp_path: Path, sizes: Sizes | None = None, **asked: Any) -> Sizes:
    save_tiny(tmp_path, family, num_hidden_layers=1, **(vars(sizes) if sizes else {}))
    decoder = Decoder(tmp_path)
    return narrowed(decoder, sizes_of(decoder), **asked)


def test_channels_make_up_for_what_whole_groups_miss(tmp_path: Path) -> None:
    """Attention 3072 weights of 7680: half of it is a fifth, 0.2 of all is reached without FFN."""
    asked = {"multiple": 4, "attention_ratio": 0.5}
    assert budget("llama", tmp_path, ratio=0.2, **asked) == Sizes(2, 1, 8, 48)
    assert budget("llama", tmp_path, ratio=0.4, **asked) == Sizes(2, 1, 8, 32)
    assert budget("llama", tmp_path, ratio=0.4, multiple=4, attention_ratio=0.2) == Sizes(
        4, 2, 8, 16
    )
    with pytest.raises(SelectionError, match="removes nothing: the least step is one of 2 key"):
        budget("llama", tmp_path, ratio=0.1, multiple=64, attention_ratio=0.0)
    with pytest.raises(SelectionError, match="less than half of multiple 64; ask for less"):
        budget("llama", tmp_path, ratio=0.5, multiple=64, attention_ratio=0.0)


def test_head_counts_are_those_the_config_class_takes(tmp_path: Path) -> None:
    """8 heads on a hidden size of 32: Llama takes 1, 2, 4 or 8, Mistral any; of two the larger."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    for family, share, groups in (
        ("llama", 3 / 8, 4),
        ("llama", 1 / 4, 8),
        ("mistral", 3 / 8, 5),
        ("mistral", 5 / 16, 6),
    ):
        save_tiny(tmp_path / family, family, **heads)
        decoder = Decoder(tmp_path / family)
        found = narrowed(decoder, sizes_of(decoder), ratio=0.3, attention_ratio=share, multiple=8)
        assert found.groups == found.heads == groups


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gpt2", r"transformer\.h\.0\.attn has the linears none; only k_proj, q_proj, v_proj or"),
        ("opt", r"layers\.0: expected one module for .* found model\.decoder\.layers\.0\.fc1, "),
        ("gpt_neox", "all blocks must share one number each"),
        ("olmo2", r"self_attn\.q_norm\.weight has shape \(32,\), which does not split into 2"),
        ("diffllama", r"self_attn\.lambda_q1 has shape \(8,\), which does not split"),
    ],
)
def test_what_does_not_split_is_refused(family: str, said: str, tmp_path: Path) -> None:
    if family == "diffllama":
        config = AutoConfig.for_model(
            family, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    else:
        save_tiny(tmp_path / "source", family)
    with pytest.raises(NotApplicable, match=said) as refusal:
        slimgpt(tmp_path / "source", tmp_path / "out", WINDOWS, **PARAMS)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_computes_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a family scaled its logits by a width that the config no longer gives."""
    save_tiny(tmp_path / "source", "llama")
    honest = Sizes.config
    monkeypatch.setattr(
        Sizes, "config", lambda sizes, parsed: honest(sizes, parsed) | {"rms_norm_eps": 1e-3}
    )
    with pytest.raises(UnsupportedArchitecture, match="computes something else with fewer heads"):
        slimgpt(tmp_path / "source", tmp_path / "out", WINDOWS, **PARAMS)


def test_quantized_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    path = tmp_path / "source/config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="prune the dense checkpoint"):
        slimgpt(tmp_path / "source", tmp_path / "out", WINDOWS, **PARAMS)
