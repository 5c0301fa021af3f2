"""Laws of the grids and of GPTQ, and files that plain transformers opens."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder
from compressor.dense import DenseReader
from compressor.errors import QuantizationError
from compressor.moments import Gram
from compressor.quantize import GptqParams, RtnParams
from compressor.quantize.driver import quantize
from compressor.quantize.gptq import gptq, inverse_factor, sweep
from compressor.quantize.grid import Grid, QuantizedWeight
from compressor.quantize.inputs import Group, input_groups, stream_writers
from compressor.quantize.rtn import rtn
from compressor.quantize.turns import Catching, Moments, quantize_in_turn
from compressor.walk import Step, Stream, walk
from tests.tiny import save_tiny, tokens

GRID = Grid(3, 8, torch.float32)


def matrix(rows: int = 12, columns: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = 32, count: int = 400, seed: int = 1) -> Tensor:
    """Inputs (N, I) that share a few directions and differ in size."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
    sizes = torch.rand(columns, generator=draw) + 0.1
    return (shared + 0.3 * torch.randn(count, columns, generator=draw)) * sizes


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def swept(
    weight: Tensor, gram: Tensor, grid: Grid = GRID, act_order: bool = True
) -> QuantizedWeight:
    """Plain GPTQ."""
    return gptq(weight, gram, grid, damp=0.01, act_order=act_order, polish=0)


def gptq_(weight: Tensor, gram: Tensor, grid: Grid = GRID, act_order: bool = True) -> Tensor:
    return swept(weight, gram, grid, act_order).dequantize()


def test_methods_vector_t5() -> None:
    weight = torch.tensor([[0.6, -0.9, 0.22]], dtype=torch.float64)
    hessian = torch.tensor([[4, 1, 0], [1, 3, 1], [0, 1, 2]], dtype=torch.float64)

    def nearest(columns: Tensor, index: int) -> Tensor:
        """2 bits, scale 0.5, zero point 2."""
        return 0.5 * ((columns[index] / 0.5).round() + 2).clamp(0, 3) - 1

    factor, damp = inverse_factor(hessian, 0.01)
    upper = [[0.524438, -0.206684, 0.101815], [0, 0.627779, -0.309251], [0, 0, 0.701862]]
    torch.testing.assert_close(factor, torch.tensor(upper).double(), atol=1e-6, rtol=0)
    rounded = sweep(weight, factor, nearest)
    assert rounded.tolist() == [[0.5, -1.0, 0.5]]
    change = weight - rounded
    errors = torch.linalg.solve(factor, change, left=False)
    expected = torch.tensor([[0.190680, 0.222070, -0.328752]]).double()
    torch.testing.assert_close(errors, expected, atol=1e-6, rtol=0)
    damped = hessian + damp * 3 * torch.eye(3).double()
    assert float(errors.square().sum()) == pytest.approx(2 * 0.096876, abs=1e-6)
    assert float(change @ damped @ change.T) == pytest.approx(2 * 0.096876, abs=2e-6)
    assert float(change @ hessian @ change.T) == pytest.approx(0.190800, abs=2e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_no_grid_point_beats_rounding(bits: int, symmetric: bool) -> None:
    grid = Grid(bits, 8, torch.float16, symmetric=symmetric)
    weight = matrix()
    result = rtn(weight, None, grid)
    assert (
        -(2 ** (bits - 1))
        <= int(result.integers.min())
        < int(result.integers.max())
        < 2 ** (bits - 1)
    )
    levels = torch.arange(grid.low, grid.high + 1).expand(12, 4, -1)
    if result.zero_point is not None:
        levels = levels - result.zero_point.unsqueeze(-1)
    points = (result.scale.float().unsqueeze(-1) * levels).repeat_interleave(8, dim=1)
    nearest = (points - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((result.dequantize() - weight).abs(), nearest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_exact_in_the_dtype_they_are_stored_in(dtype: torch.dtype) -> None:
    for search in (True, False):
        scale = Grid(4, 8, dtype, search).fit(matrix())[0]
        assert torch.equal(scale, scale.to(dtype).float())
    small = matrix() * 1e-3
    off = rtn(small, None, Grid(8, 8, dtype)).dequantize().float() - small
    assert off.norm() < 0.01 * small.norm()
    assert (Grid(4, 8, dtype).fit(torch.full((2, 8), 1e-12))[0] != 0).all()
    zeros = rtn(torch.zeros(2, 8), None, Grid(4, 8, dtype))
    assert torch.equal(zeros.dequantize(), torch.zeros(2, 8, dtype=dtype))


def test_unsearched_scale_spends_every_level() -> None:
    weight = torch.tensor([[7.5, -1.2, 0.4, 3.6, -15.0, 9.9, 0.0, 2.0]])
    grid = Grid(4, 4, torch.float32, search=False)
    result = rtn(weight, None, grid)
    assert result.scale.tolist() == [[1.0, 2.0]]
    assert result.integers.tolist() == [[7, -1, 0, 4, -8, 5, 0, 1]]


def test_asymmetric_grid_spans_the_group_and_zero() -> None:
    """s = (hi - lo) / (2^b - 1), z = round(-lo / s) - 2^(b-1); zero is in every range."""
    weight = torch.tensor([[-1.0, 2.0, 0.5, 0.0, 1.0, 3.0, 2.5, 0.25]])
    found = rtn(weight, None, Grid(2, 4, torch.float32, search=False, symmetric=False))
    assert found.scale.tolist() == [[1.0, 1.0]]
    assert found.zero_point is not None and found.zero_point.tolist() == [[-1, -2]]
    assert found.integers.tolist() == [[-2, 1, -1, -1, -1, 1, 0, -2]]
    assert found.dequantize().tolist() == [[-1, 2, 0, 0, 1, 3, 2, 0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_scales_lower_the_weighted_error(symmetric: bool) -> None:
    weight, importance = matrix(), torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.01

    def error(grid: Grid, weights: Tensor | None = None) -> Tensor:
        found = rtn(weight, None if weights is None else torch.diag(weights), grid)
        off = (found.dequantize() - weight).square() * importance
        return off.unflatten(1, (-1, 8)).sum(-1)

    plain = error(Grid(3, 8, torch.float32, search=False, symmetric=symmetric))
    grid = Grid(3, 8, torch.float32, symmetric=symmetric)
    unweighted, weighted = error(grid), error(grid, importance)
    assert (weighted <= plain).all() and (weighted <= unweighted).all()
    assert weighted.sum() < unweighted.sum() < plain.sum()


@pytest.mark.parametrize("act_order", [True, False])
def test_diagonal_gram_makes_gptq_round_to_nearest(act_order: bool) -> None:
    grid = Grid(3, 8, torch.float32, search=False)
    gram = torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.1)
    gram[5, 5] = 0  # an input that never moves
    result = swept(matrix(), gram, grid, act_order)
    expected = rtn(matrix(), None, grid)
    assert torch.equal(result.integers, expected.integers)
    assert torch.equal(result.scale, expected.scale)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rounding_on_correlated_inputs(bits: int, act_order: bool) -> None:
    grid, weight, x = Grid(bits, 8), matrix(), correlated()
    left = gptq_(weight, gram_of(x), grid, act_order) - weight
    right = rtn(weight, None, grid).dequantize() - weight
    assert (x @ left.T).square().sum() < 0.8 * (x @ right.T).square().sum()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, None])
def test_textbook_loop_equals_the_fast_one(
    act_order: bool, symmetric: bool, group_size: int | None
) -> None:
    grid = Grid(3, group_size, torch.float32, symmetric=symmetric)
    weight, gram = matrix(12, 160).double(), gram_of(correlated(160)).double()
    naive = textbook(weight, gram, grid, act_order)
    fast = gptq_(weight, gram, grid, act_order).double()
    torch.testing.assert_close(fast, naive, rtol=1e-6, atol=1e-6)


def textbook(weight: Tensor, gram: Tensor, grid: Grid, act_order: bool) -> Tensor:
    """One column after another, the inverse of what remains recomputed each time (OBQ)."""
    count, group = len(gram), grid.span(len(gram))
    ridged = gram + 0.01 * gram.diagonal().mean() * torch.eye(count).double()
    order = gram.diagonal().argsort(descending=True).tolist() if act_order else list(range(count))
    importance = 1 / torch.linalg.inv(ridged).diagonal()
    scale, zero = grid.fit(weight, importance)
    left = weight.clone()
    for done, j in enumerate(order):
        g = j // group
        if not act_order and j % group == 0:
            span = slice(j, j + group)
            found = grid.fit(left[:, span], importance[span])
            scale[:, g], zero[:, g] = found[0][:, 0], found[1][:, 0]
        rest = order[done:]
        inverse = torch.linalg.inv(ridged[rest][:, rest])
        code = (left[:, j] / scale[:, g]).round() + zero[:, g]
        rounded = (code.clamp(grid.low, grid.high) - zero[:, g]) * scale[:, g]
        error = (left[:, j] - rounded) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
        left[:, j] = rounded
    return left


@pytest.mark.parametrize("block", [1, 3, 32, 128])
def test_lazy_updates_change_nothing(block: int) -> None:
    weight, gram = matrix().double(), gram_of(correlated()).double()
    factor, _ = inverse_factor(gram, 0.01)

    def nearest(columns: Tensor, index: int) -> Tensor:
        return (columns[index] / 0.4).round() * 0.4

    torch.testing.assert_close(
        sweep(weight, factor, nearest, block), sweep(weight, factor, nearest)
    )


def test_order_of_inputs_does_not_matter_with_act_order() -> None:
    grid, weight, gram = Grid(3, 32, torch.float32), matrix(), gram_of(correlated())
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    shuffled = gptq_(weight[:, shuffle], gram[shuffle][:, shuffle], grid)
    torch.testing.assert_close(shuffled, gptq_(weight, gram, grid)[:, shuffle])


def test_scale_of_the_gram_does_not_matter_even_with_dead_inputs() -> None:
    x = correlated()
    x[:, [3, 17]] = 0
    small = swept(matrix(), gram_of(x) * 2**-20, GRID)
    assert torch.equal(
        small.integers,
        swept(matrix(), gram_of(x), GRID).integers,
    )


def test_the_ridge_grows_until_the_gram_factors_and_is_recorded() -> None:
    gram = gram_of(correlated())
    assert swept(matrix(), gram, GRID).damp == 0.01
    broken = gram - 0.05 * gram.diagonal().mean() * torch.eye(32)
    assert swept(matrix(), broken, GRID).damp == pytest.approx(0.1)
    with pytest.raises(QuantizationError, match="not positive definite"):
        swept(matrix(), torch.eye(32) / 2 - 1, GRID)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (0.0, "zero")])
def test_unusable_grams_are_refused(value: float, words: str) -> None:
    with pytest.raises(QuantizationError, match=words):
        swept(matrix(), torch.full((32, 32), value), GRID)


def test_gram_is_the_mean_over_tokens_whatever_the_batches() -> None:
    x = correlated(8, 12).view(3, 4, 8)
    gram = Gram(8, torch.device("cpu"))
    gram.add(x[:2])
    gram.add(x[2:])
    torch.testing.assert_close(gram.mean, gram_of(x.flatten(0, 1)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [32, 40, 24, 8])
def test_packing_round_trip(bits: int, width: int) -> None:
    result = rtn(matrix(5, width), None, Grid(bits, 8))
    packed = pack_to_int32(result.integers, bits)
    assert packed.shape == (5, -(-width * bits // 32))
    stream = sum(
        (int(u) + 2 ** (bits - 1)) << (bits * k) for k, u in enumerate(result.integers[0].tolist())
    )
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(packed.shape[1])]
    assert [w & 0xFFFFFFFF for w in packed[0].tolist()] == words
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((5, width))), result.integers)


GROUPS = {
    "llama": "q_proj k_proj v_proj, o_proj, gate_proj up_proj, down_proj",
    "phi3": "qkv_proj, o_proj, gate_up_proj, down_proj",
    "opt": "q_proj k_proj v_proj, out_proj, fc1, fc2",
    "gpt_neox": "query_key_value, dense, dense_h_to_4h, dense_4h_to_h",
}


@pytest.mark.parametrize("family", sorted(GROUPS))
def test_groups_are_found_by_watching(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    decoder = Decoder(tmp_path)
    for step in walk(Stream(decoder, tokens(2), batch_size=1)):
        groups = input_groups(decoder, decoder.embed(tokens(1)), step.index)
        found = [{name.rpartition(".")[2] for name in group} for group in groups]
        assert found == [set(group.split()) for group in GROUPS[family].split(", ")]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_batches_give_the_moments_of_one_batch(family: str, tmp_path: Path) -> None:
    """Whether the other batches run again, each group sees what one big forward shows it."""
    save_tiny(tmp_path, family)

    def moments(batch_size: int) -> list[dict[str, Tensor]]:
        decoder, found = Decoder(tmp_path), []
        stream = Stream(decoder, tokens(5), batch_size)
        twin = stream.twin()
        for step in walk(stream):
            seen: dict[str, Tensor] = {}

            def halve(group: Group, moments: Moments, seen: dict[str, Tensor] = seen) -> None:
                kind = "cross" if moments.lack is None else "lack"
                lacking = getattr(moments, kind)
                seen[f"{group.leader} {kind}"] = torch.cat([moments.gram, lacking])
                for linear in group.values():
                    linear.weight.data *= 0.5

            original = Step(twin, step.index, copy.deepcopy(step.block))
            groups = input_groups(decoder, decoder.embed(tokens(1)), step.index)
            ends = {groups[i].leader: groups[i][groups[i].leader] for i in (1, 3)}
            writers = stream_writers(decoder, decoder.embed(tokens(1)), step.index, ends)
            assert len(writers) == 2
            catching = dict.fromkeys(writers, Catching(1.0, 1.0))
            quantize_in_turn(step, original, groups, halve, catching)
            assert {name for name in seen if " lack" in name} == {f"{n} lack" for n in writers}
            assert len(seen) == 4
            for each in (step, original):
                for _ in each.advance():
                    pass
            found.append(seen)
        return found

    once = moments(5)
    for batch_size in (1, 2, 4):
        torch.testing.assert_close(moments(batch_size), once, rtol=1e-4, atol=1e-4)
    first, later = (next(iter(found.values())) for found in once[:2])
    assert not first[32:].any() and later[32:].any()


def test_with_one_batch_nothing_runs_twice(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    decoder = Decoder(tmp_path)
    stream = Stream(decoder, tokens(3), batch_size=3)
    for step in walk(stream):
        groups = input_groups(decoder, decoder.embed(tokens(1)), step.index)
        runs: list[int] = []
        for linear in decoder.blocks.linears(step.index).values():
            linear.register_forward_hook(lambda _, x, out, runs=runs: runs.append(len(x[0])))
        quantize_in_turn(step, None, groups, lambda *_: None)
        assert runs == [3] * 7
        for linear in decoder.blocks.linears(step.index).values():
            linear._forward_hooks.clear()


def save_half(
    folder: Path, family: str, dtype: torch.dtype, **overrides: object
) -> PreTrainedModel:
    """Save a tiny model in `dtype`; the returned one is in float32 with the same weights."""
    model = save_tiny(folder, family, **overrides).to(dtype)
    model.save_pretrained(folder)
    return model.float()


def walked_logits(folder: Path, windows: Tensor) -> Tensor:
    stream = Stream(Decoder(folder), windows, batch_size=2)
    for _ in walk(stream):
        pass
    with torch.no_grad():
        return torch.cat([logits for _, logits in stream.logits()])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gemma3_text"])
def test_file_loads_in_plain_transformers(family: str, bits: int, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, family)
    report = quantize(source, out, tokens(4), "gptq", GptqParams(bits=bits, group_size=16))
    assert bits + 2 <= report["bits_per_weight"] < bits + 2.5  # a float32 scale for 16 weights
    loaded = AutoModelForCausalLM.from_pretrained(out)
    windows = tokens(3, seed=1)
    with torch.no_grad():
        expected = loaded(windows).logits
    torch.testing.assert_close(walked_logits(out, windows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read_as", [torch.float32, None], ids=["float32", "stored"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_readers_multiply_as_we_do(
    dtype: torch.dtype, read_as: torch.dtype | None, tmp_path: Path
) -> None:
    """Exactly in float32, and rounded once in half precision."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_half(source, "llama", dtype)
    quantize(source, out, None, "rtn", RtnParams(group_size=16))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=read_as or "auto")
    with torch.no_grad():
        loaded(tokens(1))  # weights expand at the first forward
    decoder, dense = Decoder(source), dict(loaded.named_parameters())
    for index in range(len(decoder.blocks)):
        with decoder.resident(index):
            for name, linear in decoder.blocks.linears(index).items():
                ours = rtn(linear.weight.data, None, Grid(4, 16, dtype)).dequantize()
                assert torch.equal(ours.to(read_as or dtype), dense[f"{name}.weight"].data), name


def test_all_but_the_linears_is_copied_bitwise(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_half(source, "opt", torch.bfloat16)
    quantize(source, out, None, "rtn", RtnParams(group_size=16))
    before, after = Checkpoint(source), Checkpoint(out)
    packed = {n.removesuffix("_packed") for n in after.names if n.endswith("_packed")}
    assert len(packed) == 4 * 6 and packed < set(before.names)
    kept = set(before.names) - packed
    assert kept | {p + s for p in packed for s in ("_packed", "_scale", "_shape")} == set(
        after.names
    )
    for name in kept:
        assert torch.equal(before.tensor(name), after.tensor(name)), name
        assert before.stored_dtype(name) == after.stored_dtype(name)
    assert (out / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()


def test_driver_equals_a_naive_walk_in_true_sequential_order(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = save_half(source, "llama", torch.float16, num_hidden_layers=2)
    quantize(
        source,
        out,
        tokens(4),
        "gptq",
        GptqParams(bits=3, group_size=16, propagation="none", damp=0.01, polish=0),
        batch_size=3,
    )
    naive_walk_(model, Grid(3, 16, torch.float16))
    reader = DenseReader(out)
    differ = {
        name: float((reader.read(name).float() != weight).float().mean())
        for name, weight in model.named_parameters()
        if "proj" in name
    }
    # A tie may round the other way and the walk amplifies it, so late linears differ a little.
    assert max(value for name, value in differ.items() if ".0." in name) < 0.03
    assert max(differ.values()) < 0.3 and len(differ) == 14


def naive_walk_(model: PreTrainedModel, grid: Grid) -> None:
    """The whole model's forward for every single linear of every group, nothing shared."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for group in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ):
            results: list[QuantizedWeight] = []
            for linear in group:
                seen: list[Tensor] = []
                handle = linear.register_forward_pre_hook(lambda _, x, s=seen: s.append(x[0]))
                with torch.no_grad():
                    model(tokens(4))
                handle.remove()
                gram = gram_of(seen[0].flatten(0, 1))
                results.append(swept(linear.weight.data, gram, grid))
            for linear, result in zip(group, results, strict=True):
                linear.weight.data.copy_(result.dequantize())


def test_report_names_every_linear_and_its_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_half(source, "llama", torch.float16)
    errors = {}
    for bits in (2, 4, 8):
        out = tmp_path / str(bits)
        summary = quantize(source, out, tokens(4), "gptq", GptqParams(bits=bits, group_size=16))
        rows = json.loads((out / "quantization.json").read_text())["linears"]
        assert len(rows) == 4 * 7 and all(row["damp"] >= 0.3 for row in rows.values())
        assert summary["raised_damp"] == [n for n, row in rows.items() if row["damp"] > 0.3]
        errors[bits] = summary["mean_relative_error"]
    assert 1 > errors[2] > 3 * errors[4] > 30 * errors[8] > 0


def test_group_size_that_divides_nothing_is_refused_before_any_work(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", intermediate_size=80)
    with pytest.raises(QuantizationError) as caught:
        quantize(tmp_path / "source", tmp_path / "out", None, "rtn", RtnParams(group_size=32))
    message = str(caught.value)
    assert "model.layers.0.mlp.down_proj" in message and "80" in message and "use 16" in message
    assert not (tmp_path / "out").exists()


def test_what_no_runtime_loads_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "gpt2", "gpt2")
    with pytest.raises(QuantizationError, match="Conv1D"):
        quantize(tmp_path / "gpt2", tmp_path / "out", None, "rtn", RtnParams(group_size=16))
    save_tiny(tmp_path / "llama", "llama")
    quantize(tmp_path / "llama", tmp_path / "once", None, "rtn", RtnParams(group_size=16))
    with pytest.raises(QuantizationError, match="already quantized"):
        quantize(tmp_path / "once", tmp_path / "twice", None, "rtn", RtnParams(group_size=16))


def test_names_without_the_models_first_part_are_packed_once(tmp_path: Path) -> None:
    """Old checkpoints of some families were saved from the inner model."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, "llama", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    inner = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(inner, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, out, None, "rtn", RtnParams(group_size=16))
    names = Checkpoint(out).names
    assert "layers.0.mlp.up_proj.weight_packed" in names
    assert not any(name.endswith("_proj.weight") for name in names)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        expected = loaded(tokens()).logits
    torch.testing.assert_close(walked_logits(out, tokens()), expected, rtol=1e-5, atol=1e-5)
