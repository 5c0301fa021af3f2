"""Error propagation against the paper's formula, least squares and the two streams it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.decoder import Decoder
from compressor.errors import QuantizationError
from compressor.moments import Cross, Gram
from compressor.quantize import KINDS, GptqParams, PropagatingParams, driver
from compressor.quantize.driver import Recipe, quantize, quantize_blocks
from compressor.quantize.error_propagation import propagate_difference, propagate_error
from compressor.quantize.inputs import input_groups, stream_writers
from compressor.quantize.kinds import kind_of
from compressor.quantize.turns import Catching, Reading, moments_of
from compressor.records import BitPlan, Width
from compressor.walk import Stream, walk
from tests.tiny import save_tiny, tiny, tokens


def double(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


WEIGHT = double([[1, 2], [0, 1]])
FULL = double([[1, 0, 1], [0, 1, 1]])
LOW = double([[1, 0, 0.5], [0, 1, 1.5]])


@pytest.mark.parametrize(
    ("alpha", "damp", "corrected", "residual"),
    [
        (0, 0, [[1, 2], [0, 1]], 0.5),
        (1, 0, [[0.928571, 1.785714], [-0.071429, 0.785714]], 0.142857),
        (0.5, 0, [[0.964286, 1.892857], [-0.035714, 0.892857]], 0.232143),
        (0.5, 0.01, [[0.964514, 1.893542], [-0.035486, 0.893542]], 0.233287),
        (0.5, 1, [[0.978261, 1.934783], [-0.021739, 0.934783]], 0.315690),
        (1, 1, None, 0.197543),
    ],
)
def test_methods_vector_t6(
    alpha: float, damp: float, corrected: list[list[float]] | None, residual: float
) -> None:
    gram, cross = LOW @ LOW.T, (FULL - LOW) @ LOW.T
    assert gram.tolist() == [[1.25, 0.75], [0.75, 3.25]]
    assert cross.tolist() == [[0.25, 0.75], [-0.25, -0.75]]
    found, used = propagate_error(WEIGHT, WEIGHT @ cross, gram, alpha=alpha, damp=damp)
    assert used == damp
    if corrected:
        torch.testing.assert_close(found, double(corrected), atol=1e-6, rtol=0)
    left = (WEIGHT @ FULL - found @ LOW).square().sum()
    assert float(left) == pytest.approx(residual, abs=1e-6)
    halves = propagate_error(WEIGHT, WEIGHT @ cross / 2, gram / 2, alpha=alpha, damp=damp)[0]
    torch.testing.assert_close(halves, found)


def streams(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W (6, 8) and the inputs of both streams, (50, 8) each."""
    draw = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(6, 8, generator=draw), torch.randn(50, 8, generator=draw)
    return weight, x, x + 0.3 * torch.randn(50, 8, generator=draw)


def moments(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(C, H) as the walk gathers them."""
    gram, cross = Gram(x.shape[1], x.device), Cross(x.shape[1], x.shape[1], x.device)
    for a, b in zip(x.split(20), other.split(20), strict=True):
        gram.add(b)
        cross.add(a - b, b)
    return cross.mean, gram.mean


@pytest.mark.parametrize("rows", [5, 8, 20])
def test_a_difference_of_inputs_is_solved_for_whichever_way_is_cheaper(rows: int) -> None:
    _, x, other = streams()
    weight = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    cross, gram = moments(x, other)
    expected, damp = propagate_error(weight, weight @ cross, gram, alpha=0.7, damp=0.1)
    found, used = propagate_difference(weight, cross, gram, alpha=0.7, damp=0.1)
    torch.testing.assert_close(found, expected)
    assert used == damp and not torch.allclose(found, weight, rtol=0.01)
    still, _ = propagate_difference(weight, torch.zeros(8, 8), gram, alpha=1, damp=0.1)
    assert torch.equal(still, weight)


def test_all_of_it_without_ridge_is_least_squares() -> None:
    weight, x, other = streams()
    cross, gram = moments(x, other)
    found, _ = propagate_error(weight, weight @ cross, gram, alpha=1, damp=0)
    expected = torch.linalg.lstsq(other.double(), x.double() @ weight.T.double()).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_ridge_pulls_towards_the_weight() -> None:
    """alpha 1 minimises ||W X - V X'||^2 / N + ridge ||V - W||^2: its gradient is zero there."""
    weight, x, other = (each.double() for each in streams())
    cross, gram = (x - other).T @ other / 50, other.T @ other / 50
    found, _ = propagate_error(weight, weight @ cross, gram, alpha=1, damp=0.3)
    ridge = 0.3 * gram.diagonal().mean()
    slope = (found @ other.T - weight @ x.T) @ other / 50 + ridge * (found - weight)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


@pytest.mark.parametrize("fade", [0.0, 1.0])
def test_with_the_streams_lag_it_is_least_squares_on_the_stream(fade: float) -> None:
    """With `fade`, each token's row of it over the square root of its stream's length."""
    weight, x, other = streams()
    h, lost = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(1))
    parts = (slice(0, 20), slice(20, 50))
    pairs = [(Reading(other[p], lost[p]), Reading(x[p], h[p])) for p in parts]
    gram, cross, lack = moments_of(pairs, weight, Catching(1.0, fade))
    assert cross is None and lack is not None
    found, _ = propagate_error(weight, lack, gram, alpha=1, damp=0)
    behind = h.double() + x.double() @ weight.T.double()
    shares = behind.norm(dim=1, keepdim=True) ** (-fade / 2)
    least = torch.linalg.lstsq(shares * other.double(), shares * (behind - lost.double()))
    torch.testing.assert_close(found.double(), least.solution.T, rtol=1e-3, atol=1e-5)
    half, _ = propagate_error(weight, lack, gram, alpha=0.5, damp=0)
    torch.testing.assert_close(half, (weight + found) / 2)


@pytest.mark.parametrize("damp", [0.0, 0.2])
def test_equal_streams_leave_the_weight_bitwise(damp: float) -> None:
    weight, x, _ = streams()
    h = x[:, :6]
    for stream in (None, h):
        pairs = [(Reading(x, stream), Reading(x, stream))]
        gram, cross, lack = moments_of(pairs, weight, Catching(1.0, 1.0))
        lack = weight @ cross if cross is not None else lack
        assert lack is not None
        assert torch.equal(propagate_error(weight, lack, gram, alpha=1, damp=damp)[0], weight)


def test_a_singular_gram_gets_a_ridge_that_is_told() -> None:
    weight, x, other = streams()
    other[:, 3] = other[:, 2]
    other[:, 5] = 0
    cross, gram = moments(x, other)
    found, used = propagate_error(weight, weight @ cross, gram, alpha=1, damp=0)
    assert used > 0 and torch.isfinite(found).all()
    torch.testing.assert_close(found[:, 5], weight[:, 5])
    with pytest.raises(QuantizationError, match="not positive definite"):
        propagate_error(weight, weight, torch.full((8, 8), torch.nan), alpha=1, damp=0.1)


@pytest.mark.parametrize(
    ("family", "adds"),
    [
        ("llama", True), ("phi3", True), ("opt", True), ("gpt_neox", True), ("qwen3", True),
        ("gemma2", False), ("olmo2", False), ("granite", False),
    ],
)  # fmt: skip
def test_linears_that_write_the_stream(family: str, adds: bool, tmp_path: Path) -> None:
    """Blocks that norm or scale what they add have none, by their outputs alone."""
    save_tiny(tmp_path, family)
    decoder = Decoder(tmp_path)
    probe = decoder.embed(tokens(1))
    for step in walk(Stream(decoder, tokens(2))):
        groups = input_groups(decoder, probe, step.index)
        last = {g.leader: g[g.leader] for i, g in enumerate(groups) if i in (1, 3)}
        assert stream_writers(decoder, probe, step.index, last) == (last.keys() if adds else set())
        some = dict(list(last.items())[:1])
        assert not stream_writers(decoder, probe, step.index, some)


def test_one_norm_for_both_branches(tmp_path: Path) -> None:
    """Cohere: five linears share inputs, each of them quantized on its own grid and together."""
    model = save_tiny(tmp_path, "cohere")
    plan = BitPlan(linears={"*.gate_proj": Width(bits=3), "*.up_proj": Width(bits=3)})
    params = GptqParams(bits=5, group_size=16, scheme=plan, propagation="official")
    decoder = Decoder(tmp_path)
    recipe = Recipe.of(decoder, "gptq", params)
    found = next(iter(quantize_blocks(decoder, tokens(4), recipe))).weights
    path = "model.layers.0"
    low = reads(model, f"{path}.self_attn.q_proj")
    for bits, members in ((5, "qkv"), (3, ("gate", "up"))):
        parent = "self_attn" if bits == 5 else "mlp"
        for member in members:
            name = f"{path}.{parent}.{member}_proj"
            assert found[name].grid.bits == bits, name
            weight = model.get_submodule(name).weight.data
            gram = moments(low, low)[1]
            expected = recipe.quantizer(weight, gram, recipe.grids[name])
            same = (expected.integers == found[name].integers).float().mean()
            assert same > 0.9, name
    assert found[f"{path}.self_attn.o_proj"].grid.bits == 5
    assert recipe.strengths["down"][0] == 0 < recipe.strengths["gate_up"][0]


def test_kinds_where_one_norm_feeds_both_branches(tmp_path: Path) -> None:
    save_tiny(tmp_path, "cohere")
    decoder = Decoder(tmp_path)
    probe = decoder.embed(tokens(1))
    with decoder.resident(0):
        groups = input_groups(decoder, probe, 0)
        assert [len(group) for group in groups] == [5, 1, 1]
        leaders = [group.leader for group in groups]
        kinds = [kind_of(name, leaders, decoder.blocks, 0) for name in leaders]
        assert kinds == ["qkv", "o", "down"]
        last = {group.leader: group[group.leader] for group in groups[1:]}
        assert stream_writers(decoder, probe, 0, last) == last.keys()


@pytest.mark.parametrize("method", ["gptq", "qep_rtn"])
def test_inputs_that_are_not_finite_are_told_with_the_linear(method: str, tmp_path: Path) -> None:
    """Weights that pass the check when read can still overflow."""
    save_tiny(tmp_path, "llama")
    decoder = Decoder(tmp_path)
    kept = decoder.weight

    def weight(index: int, name: str) -> Tensor:
        found = kept(index, name)
        return found * 1e38 if (index, name) == (1, "mlp.up_proj.weight") else found

    decoder.weight = weight  # type: ignore[method-assign]
    params = {"gptq": GptqParams, "qep_rtn": PropagatingParams}[method](group_size=16)
    blocks = quantize_blocks(decoder, tokens(4), Recipe.of(decoder, method, params))
    next(blocks)
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.down_proj: its inputs hold NaN"):
        next(blocks)


def test_a_linear_that_never_runs_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    decoder = Decoder(tmp_path)
    probe = decoder.embed(tokens(1))
    with decoder.resident(0) as block:
        block.mlp.spare = torch.nn.Linear(4, 4)
        with pytest.raises(QuantizationError, match=r"layers\.0\.mlp\.spare is never run"):
            input_groups(decoder, probe, 0)
        del block.mlp.spare


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt_neox"])
def test_kinds_of_linears(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    decoder = Decoder(tmp_path)
    for step in walk(Stream(decoder, tokens(2))):
        groups = input_groups(decoder, decoder.embed(tokens(1)), step.index)
        leaders = [group.leader for group in groups]
        kinds = [kind_of(name, leaders, decoder.blocks, step.index) for name in leaders]
        assert tuple(kinds) == KINDS


def test_published_sets_and_values_over_them() -> None:
    official = PropagatingParams(propagation="official").strengths()
    assert official == {k: (0.0 if k == "down" else 0.5, 1.0) for k in KINDS}
    later = PropagatingParams(propagation="onecompression").strengths()
    assert later["qkv"] == (0.5, 0.01) and later["down"][0] == 0
    mixed = PropagatingParams(propagation="official", alpha={"down": 0.25}, ridge=0.1).strengths()
    assert mixed == {k: (0.25 if k == "down" else 0.5, 0.1) for k in KINDS}
    assert all(a == 0 for a, _ in PropagatingParams(alpha=0).strengths().values())


def drifts(folder: Path, **params: object) -> list[float]:
    recipe = Recipe.of(Decoder(folder), "gptq", GptqParams(group_size=16, bits=3, **params))
    found = [block.drift for block in quantize_blocks(Decoder(folder), tokens(16), recipe)]
    return [value for value in found if value is not None]


def test_correction_slows_the_drift_of_the_stream(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    corrected = drifts(tmp_path, alpha=1.0, ridge=0.01, catch_up=0)
    caught_up = drifts(tmp_path, alpha=1.0, ridge=0.01, catch_up=1)
    plain = drifts(tmp_path, alpha=1e-9)  # keeps the second stream, changes nothing
    assert len(plain) == 4 and not drifts(tmp_path, alpha=0)
    assert corrected[-1] < 0.97 * plain[-1] and caught_up[-1] < 0.97 * corrected[-1]


def test_first_blocks_first_group_is_never_corrected(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    first: list[list[Tensor]] = []
    for alpha in (0.0, 1.0):
        recipe = Recipe.of(Decoder(tmp_path), "gptq", GptqParams(group_size=16, alpha=alpha))
        block = next(iter(quantize_blocks(Decoder(tmp_path), tokens(4), recipe)))
        first.append([weight.integers for weight in block.weights.values()])
    same = [torch.equal(a, b) for a, b in zip(*first, strict=True)]
    assert same[:3] == [True] * 3 and not all(same)


@pytest.mark.parametrize(("catch_up", "fade"), [(0.0, 0.0), (0.6, 0.0), (0.6, 1.5), (0.0, 1.0)])
def test_two_streams_equal_two_whole_models(catch_up: float, fade: float, tmp_path: Path) -> None:
    """Against the whole models' forwards: what is asked of each group of linears."""
    save_tiny(tmp_path, "llama", num_hidden_layers=2)
    original, compressed = tiny("llama", num_hidden_layers=2), tiny("llama", num_hidden_layers=2)
    strengths = {"alpha": 0.7, "ridge": 0.05, "catch_up": catch_up, "fade": fade}
    params = GptqParams(group_size=16, bits=3, act_order=False, polish=0, **strengths)
    recipe = Recipe.of(Decoder(tmp_path), "gptq", params)
    blocks = list(quantize_blocks(Decoder(tmp_path), tokens(4), recipe))
    for index, block in enumerate(blocks):
        for group in STAGES:
            names = [f"model.layers.{index}.{member}" for member in group.split()]
            full, low = reads(original, names[0]), reads(compressed, names[0])
            counts, lag = torch.ones(len(low), 1), torch.zeros(1, 1)
            if group in WRITTEN_AFTER:
                norm = f"model.layers.{index}.{WRITTEN_AFTER[group]}"
                there, here = reads(original, norm), reads(compressed, norm)
                behind = there + full @ original.get_submodule(names[0]).weight.data.T
                counts = behind.norm(dim=1, keepdim=True) ** -fade
                lag = catch_up * (counts * (there - here)).T @ low / len(low)
            gram = (counts * low).T @ low / len(low)
            cross = (counts * (full - low)).T @ low / len(low)
            for name in names:
                weight = original.get_submodule(name).weight.data
                lack = weight @ cross + lag
                target, _ = propagate_error(weight, lack, gram, alpha=0.7, damp=0.05)
                expected = recipe.quantizer(target, gram, recipe.grids[name]).integers
                found = block.weights[name]
                assert (expected == found.integers).float().mean() > 0.95, name
                compressed.get_submodule(name).weight.data.copy_(found.dequantize())


def reads(model: PreTrainedModel, name: str) -> Tensor:
    """What a module of a whole model reads, (tokens, I)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(tokens(4))
    handle.remove()
    return seen[0].flatten(0, 1)


WRITTEN_AFTER = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
}
STAGES = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj",
    "mlp.down_proj",
)


def test_several_batches_quantize_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama", num_hidden_layers=2)
    recipe = Recipe.of(Decoder(tmp_path), "gptq", GptqParams(group_size=16, polish=0))
    once = list(quantize_blocks(Decoder(tmp_path), tokens(5), recipe))
    monkeypatch.setattr(driver, "_INPUT_BYTES", 0)
    parts = list(quantize_blocks(Decoder(tmp_path), tokens(5), recipe, 2))
    for one, other in zip(once, parts, strict=True):
        assert other.drift == pytest.approx(one.drift, rel=0.02)
    for name, weight in once[0].weights.items():  # later blocks amplify a tie that fell otherwise
        same = (weight.integers == parts[0].weights[name].integers).float().mean()
        assert same > 0.9, name


def test_report_holds_ridges_and_the_drift(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    params = GptqParams(group_size=16, alpha={"down": 0.0}, ridge=0.2)
    summary = quantize(tmp_path / "source", tmp_path / "out", tokens(4), "gptq", params)
    report = json.loads((tmp_path / "out/quantization.json").read_text())
    assert len(report["drift"]) == 4 and summary["drift"] == report["drift"][-1] > 0
    ridges = {name: row["ridge"] for name, row in report["linears"].items()}
    assert all(value == (0 if "down" in name else 0.2) for name, value in ridges.items())
