"""Zeroed weights: magnitude under the LAMP threshold, Wanda; everything else bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compressor.blocks import Blocks, weight_of
from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder
from compressor.errors import CheckpointError, CompressError, ConfigError, NotApplicable
from compressor.inputs import input_gram, input_norms
from compressor.magnitude import lamp_survivors
from compressor.prune import WandaParams
from compressor.prune.magnitude import largest, magnitude
from compressor.prune.sparse import REPORT
from compressor.prune.wanda import block_statistics, kept, wanda
from compressor.walk import Stream, walk
from pipelines.table import cells, rows
from tests.tiny import FAMILIES, save_tiny, tokens

WINDOWS = tokens(5, 12)
DEFAULTS: dict[str, Any] = {k: v for k, v in dict(WandaParams()).items() if k != "sparsity"}


def linears(model: Any) -> dict[str, Tensor]:
    """Every linear's weight (O, I) of a live model in float64."""
    blocks = Blocks(model)
    return {
        name: weight_of(linear).detach().double()
        for index in range(len(blocks))
        for name, linear in blocks.linears(index).items()
    }


def reload(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_only_zeros_differ(source: Path, out: Path, pruned: set[str]) -> None:
    """Outside the linears no bit differs; inside, a weight is what it was, or zero."""
    before, after = Checkpoint(source), Checkpoint(out)
    assert set(before.names) == set(after.names)
    for name in before.names:
        was, now = before.tensor(name), after.tensor(name)
        assert was.dtype == now.dtype
        if name.removesuffix(".weight") in pruned:
            assert torch.equal(now[now != 0], was[now != 0])
        else:
            assert torch.equal(was, now)
    assert after.config == before.config


def test_t1_lamp_threshold() -> None:
    a = torch.tensor([0.5, -0.1, 0.3, -0.2])
    b = torch.tensor([3.0, 1, 2])
    found = lamp_survivors(lambda: [("a", a), ("b", b)], 4 / 7)
    assert found == {"a": (1, 4), "b": (2, 3)}
    assert largest(b, 2).tolist() == [True, False, True]


def test_of_equal_magnitudes_the_last_stay_and_the_count_is_exact() -> None:
    assert largest(torch.tensor([[1.0, -1, 1], [1, 2, -1]]), 3).tolist() == [
        [False, False, False], [True, True, True],
    ]  # fmt: skip
    ties = torch.tensor([0.2, 0.2, 0.4])
    assert lamp_survivors(lambda: [("t", ties)], 1 / 3) == {"t": (2, 3)}


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_magnitude_is_one_global_sort_of_lamp_scores(
    family: str, sparsity: float, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "source", family)
    found = magnitude(tmp_path / "source", tmp_path / "out", sparsity=sparsity)
    dense, sparse = linears(model), linears(reload(tmp_path / "out"))
    scores: dict[str, np.ndarray[Any, Any]] = {}
    for name, weight in dense.items():
        squares = weight.flatten().numpy() ** 2
        scores[name] = np.array([w / squares[squares >= w].sum() for w in squares])
    everything = np.sort(np.concatenate(list(scores.values())))[::-1]
    threshold = everything[round((1 - sparsity) * len(everything)) - 1]
    for name, weight in dense.items():
        expected = weight.flatten().numpy() * (scores[name] >= threshold * (1 - 1e-9))
        assert np.array_equal(sparse[name].flatten().numpy(), expected)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["overall"] == found["sparsity"] == pytest.approx(sparsity, abs=1e-4)
    assert report["linear"] == {n: (w == 0).double().mean().item() for n, w in sparse.items()}
    assert len(set(report["linear"].values())) > 3
    assert_only_zeros_differ(tmp_path / "source", tmp_path / "out", set(dense))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_stored_dtype_stays(method: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "full", "qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    if method == "magnitude":
        magnitude(tmp_path / "source", tmp_path / "out", sparsity=0.5)
    else:
        wanda(tmp_path / "source", tmp_path / "out", WINDOWS, sparsity=0.5, **DEFAULTS)
    assert Checkpoint(tmp_path / "out").dtype == torch.bfloat16
    assert_only_zeros_differ(tmp_path / "source", tmp_path / "out", set(linears(model)))


def test_wanda_rule() -> None:
    """|W| alone would drop the second input of the first row, the norms say the first."""
    metric = torch.tensor([[3.0, 2, 1, 4], [-4, 1, 2, 3]]).abs() * torch.tensor([0.1, 1, 2, 1])
    assert kept(metric, 0.25).tolist() == [[False, True, True, True], [False, True, True, True]]
    assert kept(metric, 0.5).tolist() == [[False, False, True, True], [False, False, True, True]]
    assert kept(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]
    assert kept(metric, 0.0).all()


@pytest.mark.parametrize(("pattern", "run"), [("2:4", 4), ("4:8", 8)])
def test_patterns_keep_half_of_every_run(pattern: str, run: int) -> None:
    metric = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    keep = kept(metric, 0.5, pattern)
    for row, mask in zip(metric, keep, strict=True):
        for start in range(0, 16, run):
            chunk = slice(start, start + run)
            assert mask[chunk].sum() == run // 2
            assert row[chunk][mask[chunk]].min() > row[chunk][~mask[chunk]].max()


def test_inputs_that_do_not_split_into_runs_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", intermediate_size=36)
    params = DEFAULTS | {"pattern": "4:8"}
    with pytest.raises(NotApplicable, match=r"0\.mlp\.down_proj: its 36 inputs do not split"):
        wanda(tmp_path / "source", tmp_path / "out", WINDOWS, sparsity=0.5, **params)
    params["pattern"] = "2:4"
    found = wanda(tmp_path / "source", tmp_path / "out", WINDOWS, sparsity=0.5, **params)
    assert found["sparsity"] == 0.5
    for weight in linears(reload(tmp_path / "out")).values():
        assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()


def inputs_in(model: Any) -> dict[str, Tensor]:
    """Inputs (tokens, I) of every linear, from one forward of the live model."""
    seen: dict[str, Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
        for index in range(4)
        for name, linear in Blocks(model).linears(index).items()
    ]
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def naive_wanda(model: Any, shares: list[float]) -> dict[str, Tensor]:
    """The paper in float64 on the live model: hooks, then rows, block after block."""
    model = model.double()
    for index in range(4):
        seen = inputs_in(model)
        for name, linear in Blocks(model).linears(index).items():
            weight = weight_of(linear).data
            norms = (seen[name] ** 2).sum(0).sqrt()
            for row in weight:
                order = (row.abs() * norms).argsort(stable=True)
                row[order[: round(shares[index] * len(row))]] = 0
    return linears(model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_wanda_equals_the_paper(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "source", family)
    names = set(linears(model))
    shares = wanda(
        tmp_path / "source", tmp_path / "out", WINDOWS, sparsity=0.4, batch_size=2, **DEFAULTS
    )["block_sparsity"]
    assert shares == [0.4] * 4
    found = linears(reload(tmp_path / "out"))
    for name, weight in naive_wanda(model, shares).items():
        assert torch.equal(weight, found[name]), name
    assert_only_zeros_differ(tmp_path / "source", tmp_path / "out", names)


@pytest.mark.parametrize("allocation", ["dlp", "owl"])
def test_allocations_follow_the_statistic(allocation: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "source", "llama")
    params = DEFAULTS | {"allocation": allocation, "alpha": 0.1, "outlier": 3.0}
    shares = wanda(tmp_path / "source", tmp_path / "out", WINDOWS, sparsity=0.5, **params)[
        "block_sparsity"
    ]
    statistics = naive_statistics(model, outlier=3.0)
    importance = [-s for s, _ in statistics] if allocation == "dlp" else [d for _, d in statistics]
    rank = np.array([i - min(importance) for i in importance])
    depth = 2 * 0.1 * rank / rank.max()
    assert shares == pytest.approx(list(0.5 + depth.mean() - depth), abs=1e-5)
    assert sum(shares) / 4 == pytest.approx(0.5)
    found = linears(reload(tmp_path / "out"))
    for name, weight in naive_wanda(model, shares).items():
        assert torch.equal(weight, found[name]), name


def naive_statistics(model: Any, outlier: float) -> list[tuple[float, float]]:
    """Median of A and the share of A above `outlier` times its mean, on the dense model."""
    blocks, inputs = Blocks(model.double()), inputs_in(model)
    found = []
    for index in range(4):
        metric = np.concatenate(
            [
                (weight_of(m).abs() * inputs[n].norm(dim=0)).detach().numpy().ravel()
                for n, m in blocks.linears(index).items()
            ]
        )
        median = np.sort(metric)[(len(metric) - 1) // 2]  # the lower of two, as torch takes it
        found.append((float(median), float((metric > outlier * metric.mean()).mean())))
    return found


def test_statistics_are_the_naive_ones(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    found = block_statistics(Stream(Decoder(tmp_path), WINDOWS, batch_size=2), outlier=3.0)
    for mine, naive in zip(found, naive_statistics(model, 3.0), strict=True):
        assert mine == pytest.approx(naive, rel=1e-5)
    assert len({outliers for _, outliers in found}) > 1


def test_an_impossible_span_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    params = DEFAULTS | {"allocation": "dlp", "alpha": 0.4}
    with pytest.raises(ConfigError, match="use an alpha below"):
        wanda(tmp_path / "source", tmp_path / "out", WINDOWS, sparsity=0.9, **params)
    with pytest.raises(ValidationError, match=r"uniform sparsity of 0\.5"):
        WandaParams(pattern="2:4", sparsity=0.6)


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    stream = Stream(Decoder(tmp_path), WINDOWS)
    stream.x[0, 0, 0] = torch.inf
    for step in walk(stream):
        found = stream.decoder.blocks.linears(0)
        name, linear = next(iter(found.items()))
        with pytest.raises(CompressError, match=r"layers\.0\.self_attn\.q_proj: its inputs hold"):
            input_norms(found, (step.run(x) for x in step.inputs()))
        assert isinstance(linear, nn.Linear)
        with pytest.raises(CompressError, match=r"layers\.0\.self_attn\.q_proj: its inputs hold"):
            input_gram(step, name, linear)
        return


def test_quantized_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    path = tmp_path / "source/config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="prune the dense checkpoint"):
        magnitude(tmp_path / "source", tmp_path / "out", sparsity=0.5)


def test_the_report_is_not_carried_on(tmp_path: Path) -> None:
    """Healing fills the zeros, so a later stage must not claim them."""
    save_tiny(tmp_path / "source", "llama")
    magnitude(tmp_path / "source", tmp_path / "out", sparsity=0.5)
    assert REPORT not in [path.name for path in Checkpoint(tmp_path / "out").side_files]


def test_the_table_names_the_share_of_zeros() -> None:
    record = {
        "stages": [
            {"verb": verb, "label": label, "seconds": 1, "peak_bytes": 1, "metrics": metrics}
            for verb, label, metrics in (
                ("prune", "prune", {"sparsity": 0.497}),
                ("evaluate", "evaluate prune", {"parameters": 2_000_000, "blocks": 4}),
            )
        ]
    }
    (row,) = rows(record)
    assert cells(row)[:3] == ["prune", "4", "2.0 M (50 % of linears zero)"]
    assert cells(row | {"sparsity": None})[2] == "2.0 M"
