"""Who gets how many bits: the rule, what the methods predict, and files on a budget."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.allocate import METHODS, AllocateParams, FisherParams, ImportanceParams
from compressor.allocate.driver import Allocation, measure, spend
from compressor.allocate.fisher import fisher
from compressor.allocate.importance import importance, saliencies
from compressor.allocate.measured import Measured
from compressor.allocate.probe import Probe
from compressor.allocate.refine import MixedModel, refine
from compressor.allocate.rule import greedy, hull
from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder
from compressor.errors import CompressError, ConfigError, QuantizationError, SelectionError
from compressor.quantize import GridParams, RtnParams
from compressor.quantize.driver import quantize
from compressor.quantize.options import Options
from compressor.records import BitPlan, Scores
from pipelines.config import methods
from pipelines.quantize_commands import allocate as allocate_command
from pipelines.quantize_commands import quantize as quantize_command
from tests.tiny import save_corpus, save_tiny, save_tokenizer, tokens

WIDTHS = (2, 3, 4, 8)
SIZES = [{2: 6.0, 3: 9.0, 4: 12.0, 8: 24.0}, {2: 2.0, 3: 3.0, 4: 4.0, 8: 8.0}]


def table(units: int, seed: int) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
    """Sizes and costs of random units; costs fall with bits but need not be convex."""
    draw = random.Random(seed)
    sizes, costs = [], []
    for _ in range(units):
        weights = draw.choice([1, 2, 3, 5])
        falling = sorted((draw.random() for _ in WIDTHS), reverse=True)
        sizes.append({b: float(weights * b) for b in WIDTHS})
        costs.append(dict(zip(WIDTHS, falling, strict=True)))
    return sizes, costs


def total(figures: Any, bits: Any) -> float:
    return math.fsum(row[b] for row, b in zip(figures, bits, strict=True))


def brute_force(sizes: Any, costs: Any, budget: float) -> float:
    """Least cost of all choices within the budget."""
    choices = itertools.product(*sizes)
    return min(total(costs, c) for c in choices if total(sizes, c) <= budget)


@pytest.mark.parametrize("seed", range(8))
def test_the_rule_is_optimal_wherever_it_spends_all(seed: int) -> None:
    sizes, costs = table(5, seed)
    reached = {
        total(sizes, greedy(sizes, costs, budget)): greedy(sizes, costs, budget)
        for budget in range(int(total(sizes, [2] * 5)), int(total(sizes, [8] * 5)) + 1)
    }
    optimal = 0
    for budget, bits in reached.items():
        best = brute_force(sizes, costs, budget)
        assert total(costs, bits) >= best - 1e-12
        optimal += total(costs, bits) <= best + 1e-12
    steps = sum(len(hull(s, c)) - 1 for s, c in zip(sizes, costs, strict=True))
    assert optimal >= steps + 1  # every point on the way, at least


@pytest.mark.parametrize("seed", range(8))
def test_the_budget_is_kept_and_nearly_spent(seed: int) -> None:
    sizes, costs = table(6, seed)
    spent = []
    for budget in range(int(total(sizes, [2] * 6)), int(total(sizes, [8] * 6)) + 1):
        bits = greedy(sizes, costs, budget)
        assert total(sizes, bits) <= budget
        for size, cost, each in zip(sizes, costs, bits, strict=True):
            wider = [b for b in hull(size, cost) if b > each]
            if wider:
                assert total(sizes, bits) + size[wider[0]] - size[each] > budget
        spent.append(total(costs, bits))
    whole = [costs[i][hull(s, costs[i])[-1]] for i, s in enumerate(sizes)]
    assert spent[-1] == pytest.approx(math.fsum(whole))
    assert spent[-1] <= spent[0]


def test_only_the_convex_hull_is_stepped_on() -> None:
    sizes = {2: 2.0, 3: 3.0, 4: 4.0, 8: 8.0}
    assert hull(sizes, {2: 9.0, 3: 3.0, 4: 1.0, 8: 0.0}) == [2, 3, 4, 8]
    assert hull(sizes, {2: 9.0, 3: 8.9, 4: 1.0, 8: 0.0}) == [2, 4, 8]  # 3 is above the line
    assert hull(sizes, {2: 9.0, 3: 1.0, 4: 2.0, 8: 1.5}) == [2, 3]  # more bits, more loss
    assert hull(sizes, {2: 0.0, 3: 1.0, 4: 2.0, 8: 3.0}) == [2]
    assert greedy(SIZES, [{2: 9.0, 3: 3.0, 4: 1.0, 8: 0.0}] * 2, 10) == [2, 4]


def test_equal_units_get_nearly_equal_widths() -> None:
    sizes = [{b: float(b) for b in WIDTHS}] * 10
    costs = [{b: 4.0**-b for b in WIDTHS}] * 10
    for average in (2.0, 2.5, 3.0, 3.7):
        bits = greedy(sizes, costs, average * 10)
        assert max(bits) - min(bits) <= 1
        assert sum(bits) == int(average * 10)


def test_the_papers_rule_is_the_case_of_two_widths() -> None:
    """Of 40 blocks the 10 least important get 2 bits for 3.5 on average (arXiv:2406.17415)."""
    order = random.Random(0).sample(range(40), 40)
    costs = [{b: (rank + 1) / 40 * 4.0**-b for b in (2, 4)} for rank in order]
    bits = greedy([{2: 2.0, 4: 4.0}] * 40, costs, 3.5 * 40)
    assert [b == 2 for b in bits] == [rank < 10 for rank in order]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("allocate") / "llama"
    save_tiny(folder, "llama")
    return folder


def probe_of(
    folder: Path, windows: Tensor, scores: Scores | None = None, **given: Any
) -> tuple[Probe, Options]:
    decoder = Decoder(folder)
    options = Options(decoder, GridParams(group_size=16, **given), WIDTHS)
    made = (options.units, options.widths, options.quantize, options.nearest)
    return Probe(decoder, windows, *made, scores, 2), options


def rounded_by(probe: Probe, weight: Tensor, gram: Tensor, bits: int) -> Tensor:
    return probe.quantize(weight.float(), gram.float(), bits).dequantize().double()


def test_fisher_equals_its_formula_on_the_whole_model(llama: Path) -> None:
    windows = tokens(4, 12)
    probe, _ = probe_of(llama, windows)
    costs = fisher(probe, seed=3, skip=1)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name in (name for unit in probe.units for name in unit.names):

        def keep(_: Any, args: Any, out: Tensor, name: str = name) -> None:
            read[name], made[name] = args[0].detach(), out
            out.retain_grad()

        model.get_submodule(name).register_forward_hook(keep)
    scores = model(windows).logits.log_softmax(-1)
    likelihood = torch.zeros(())
    for window in range(4):
        draw = torch.Generator().manual_seed(3 + window)
        drawn = torch.multinomial(scores[window].detach().float().exp(), 1, generator=draw)
        likelihood = likelihood + scores[window].gather(1, drawn).sum()
    likelihood.backward()
    for unit, cost in list(zip(probe.units, costs, strict=True))[4:12]:
        weight = torch.cat([model.get_submodule(n).weight.detach() for n in unit.names])
        x = read[unit.names[0]].flatten(0, 1)
        gram = x.T @ x / 48
        gradient = torch.cat([made[n].grad for n in unit.names], -1).flatten(0, 1)  # type: ignore[misc]
        counted = [t for t in range(48) if t % 12]  # all but the first of each window
        gradient = gradient[counted]
        for bits in WIDTHS:
            moved = (x @ (weight - rounded_by(probe, weight, gram, bits)).T)[counted]
            naive = 0.0
            for i in range(len(weight)):
                share = float(gradient[:, i].square().sum() / gradient.square().sum())
                for t in range(44):
                    naive += share * float(gradient[t] @ gradient[t] * moved[t, i] ** 2) / 44 / 2
            assert cost[bits] == pytest.approx(naive, rel=0.02)  # some columns round elsewhere


def test_fisher_foretells_the_divergence(llama: Path) -> None:
    """Of all options of one model, each alone: the KL to second order, in nats per token."""
    windows = tokens(16, 16)
    probe, _ = probe_of(llama, windows)
    costs = fisher(probe, seed=0, skip=0)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        full = model(windows).logits.log_softmax(-1)
    found, foretold = [], []
    grams = {}
    for name in (unit.names[0] for unit in probe.units):

        def keep(_: Any, args: Any, name: str = name) -> None:
            x = args[0].flatten(0, 1)
            grams[name] = x.T @ x / len(x)

        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(windows)
        for unit, cost in zip(probe.units, costs, strict=True):
            linears = [model.get_submodule(name) for name in unit.names]
            weights = [linear.weight.clone() for linear in linears]
            for bits in (3, 4):
                gram = grams[unit.names[0]].clone()
                rounded = probe.quantize(torch.cat(weights), gram, bits).dequantize()
                parts = rounded.split([len(w) for w in weights])
                for linear, part in zip(linears, parts, strict=True):
                    linear.weight.copy_(part)
                cut = model(windows).logits.log_softmax(-1)
                found.append(float((full.exp() * (full - cut)).sum(-1).mean()))
                foretold.append(cost[bits])
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.copy_(weight)
    ratios = torch.tensor(foretold) / torch.tensor(found)
    assert 0.7 < float(ratios.median()) < 1.4
    ranks = torch.tensor([found, foretold]).argsort().argsort().double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


def test_importance_is_rank_times_relative_error(llama: Path) -> None:
    windows = tokens(2, 12)
    scores = Scores(num_blocks=4, block={"lim": [-0.2, -0.9, -0.5, -0.9]})
    probe, _ = probe_of(llama, windows, scores)
    costs = importance(probe, score="lim")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    read: dict[str, Tensor] = {}
    for unit in probe.units:

        def keep(_: Any, args: Any, name: str = unit.names[0]) -> None:
            read[name] = args[0].flatten(0, 1)

        model.get_submodule(unit.names[0]).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(windows)
    for unit, cost in zip(probe.units, costs, strict=True):
        weight = torch.cat([model.get_submodule(n).weight.detach() for n in unit.names])
        x = read[unit.names[0]]
        gram = (x.T @ x / len(x)).float()
        for bits in WIDTHS:
            off = weight - rounded_by(probe, weight, gram, bits)
            relative = float((x @ off.T).square().sum() / (x @ weight.T).square().sum())
            rank = [1.0, 0.25, 0.75, 0.25][unit.block]
            assert cost[bits] == pytest.approx(rank * relative, rel=0.02)


def test_relevance_is_taken_by_linear(llama: Path) -> None:
    probe, _ = probe_of(llama, tokens(1, 8))
    names = [name for unit in probe.units for name in unit.names]
    linear = {"relevance": {name: float(i) for i, name in enumerate(names)}}
    scores = Scores(num_blocks=4, block={"relevance": [1, 2, 3, 4]}, linear=linear)
    assert saliencies(scores, "relevance", probe.units)[:3] == [0 + 1 + 2, 3, 4 + 5]
    scores = Scores(num_blocks=4, block={"zd": [-0.3, -0.1, -0.2, -0.4]})
    assert saliencies(scores, "zd", probe.units)[::4] == [0.5, 1.0, 0.75, 0.25]
    with pytest.raises(SelectionError, match=r"no score 'zdd' .*did you mean 'zd'"):
        saliencies(scores, "zdd", probe.units)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_more_bits_cost_less_and_all_units_have_all_widths(method: str, llama: Path) -> None:
    scores = Scores(num_blocks=4, block={"lim": [-0.2, -0.9, -0.5, -0.9]})
    probe, _ = probe_of(llama, tokens(4, 16), scores)
    own = METHODS[method].params(average_bits=3).model_dump(exclude={*AllocateParams.model_fields})
    costs = METHODS[method].load()(probe, **own)
    assert len(costs) == 16
    for cost in costs:
        assert [*cost] == [*WIDTHS]
        assert cost[2] > cost[3] > cost[4] > cost[8] > 0


def test_batches_do_not_matter(llama: Path) -> None:
    probe, _ = probe_of(llama, tokens(5, 12))
    whole = dataclasses.replace(probe, batch_size=5)
    parts = dataclasses.replace(probe, batch_size=2)
    both = [fisher(each, seed=0, skip=0) for each in (whole, parts)]
    for one, other in zip(*both, strict=True):
        assert one == pytest.approx(other, rel=0.05)  # a rounding may fall the other way


def chosen(probe: Probe, options: Options, **budget: Any) -> Allocation:
    params = FisherParams(group_size=16, **budget)
    measured = measure(probe, "fisher", params, options.dense_bytes)
    return spend(measured.costs, probe, params, options.dense_bytes)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_files_are_as_large_as_foretold(
    form: Any, symmetric: bool, llama: Path, tmp_path: Path
) -> None:
    _, options = probe_of(llama, tokens(1, 8), format=form, symmetric=symmetric)
    assert options.widths == ([2, 4, 8] if form == "gptq" else [2, 3, 4, 8])
    assert [*options.left_out] == [b for b in WIDTHS if b not in options.widths]
    bits = [options.widths[i % len(options.widths)] for i in range(len(options.units))]
    params = RtnParams(group_size=16, format=form, scheme=options.plan(bits, ""))
    quantize(llama, tmp_path / "out", None, "rtn", params)
    file = Checkpoint(tmp_path / "out")
    packed = 0
    for name in file.names:
        if any(name.startswith(f"{n}.") for unit in options.units for n in unit.names):
            packed += file.tensor(name).nbytes
    sizes = [unit.sizes[b] for unit, b in zip(options.units, bits, strict=True)]
    assert sum(sizes) == packed
    slack = options.dense_bytes + packed - file.weight_bytes
    assert 0 <= slack < 60 * len(file.names)


def test_a_file_on_a_budget_of_bytes_loads_and_computes_what_was_planned(
    llama: Path, tmp_path: Path
) -> None:
    probe, options = probe_of(llama, tokens(4, 16))
    budget = options.dense_bytes + sum(unit.sizes[4] for unit in options.units) - 500
    found = chosen(probe, options, max_bytes=budget)
    assert len(set(found.bits)) > 1
    plan = options.plan(found.bits, "")
    quantize(llama, tmp_path / "out", None, "rtn", RtnParams(scheme=plan))
    assert Checkpoint(tmp_path / "out").weight_bytes <= found.size_bytes <= budget
    assert found.size_bytes > budget - 2 * max(u.sizes[4] - u.sizes[3] for u in options.units)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    model = AutoModelForCausalLM.from_pretrained(llama)
    for unit, bits in zip(options.units, found.bits, strict=True):
        for name in unit.names:
            linear = model.get_submodule(name)
            grid = RtnParams(bits=bits, group_size=16)
            linear.weight.data.copy_(rounded(linear.weight.data, grid))
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def rounded(weight: Tensor, params: RtnParams) -> Tensor:
    from compressor.quantize.grid import Grid
    from compressor.quantize.rtn import rtn

    grid = Grid(params.bits, params.group_size, torch.float32)
    return rtn(weight, None, grid).dequantize()


def test_swaps_are_taken_only_when_the_loss_says_so() -> None:
    sizes = [{b: float(b) for b in (2, 3, 4)}] * 4
    foretold = [{b: 4.0**-b for b in (2, 3, 4)}] * 4
    truth = [{b: weight * 4.0**-b for b in (2, 3, 4)} for weight in (1.0, 30.0, 1.0, 2.0)]
    asked: list[tuple[int, ...]] = []

    def loss(bits: list[int]) -> float:
        asked.append(tuple(bits))
        return total(truth, bits)

    found = refine([3, 3, 3, 3], sizes, foretold, 12, loss=loss, evaluations=40)
    assert found.losses == (total(truth, [3] * 4), total(truth, found.bits))
    assert total(truth, found.bits) == brute_force(sizes, truth, 12)
    assert len(asked) == len(set(asked)) == found.evaluations <= 40
    assert all(sum(bits) <= 12 for bits in asked)
    worse = refine(found.bits, sizes, foretold, 12, loss=loss, evaluations=5)
    assert (worse.bits, worse.evaluations) == (found.bits, 5)
    assert refine([3] * 4, sizes, foretold, 12, loss=loss, evaluations=1).bits == [3] * 4
    assert refine([2] * 4, sizes, foretold, 8, loss=loss, evaluations=9).evaluations == 1


def test_the_mixed_model_is_the_model_with_rounded_weights(llama: Path) -> None:
    windows = tokens(3, 12)
    probe, _ = probe_of(llama, windows)
    fisher(probe, seed=0, skip=0)
    mixed = MixedModel(probe, windows)
    draw = random.Random(0)
    bits = [3] * len(probe.units)
    for change in (0, 15, 9, 9, 4):
        bits[change] = draw.choice([2, 4, 8])
        model = AutoModelForCausalLM.from_pretrained(llama)
        for unit, each in zip(probe.units, bits, strict=True):
            linears = [model.get_submodule(name) for name in unit.names]
            stack = torch.cat([linear.weight.data for linear in linears])
            rounded = probe.nearest(stack, probe.energies[unit.names[0]], each).dequantize()
            parts = rounded.split([len(linear.weight) for linear in linears])
            for linear, part in zip(linears, parts, strict=True):
                linear.weight.data.copy_(part)
        with torch.no_grad():
            naive = float(model(windows, labels=windows).loss)
        assert mixed.loss(bits) == pytest.approx(naive, abs=1e-5)


def test_only_blocks_behind_a_change_run_again(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, options = probe_of(llama, tokens(3, 12))
    fisher(probe, seed=0, skip=0)
    mixed, ran, run = MixedModel(probe, probe.tokens), [], Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda d, i, x, b=None: ran.append(i) or run(d, i, x, b))
    mixed.loss([3] * 16)
    assert ran == [0, 0, 1, 1, 2, 2, 3, 3]
    ran.clear()
    mixed.loss([3] * 9 + [2] + [3] * 6)
    assert ran == [2, 2, 3, 3]
    ran.clear()
    mixed.loss([3] * 15 + [4])
    assert ran == [2, 2, 3, 3]
    found = chosen(probe, options, average_bits=3, refine=6)
    assert found.refined is not None
    assert found.refined.losses[1] <= found.refined.losses[0]
    assert found.average_bits <= 3


def test_average_bits_are_met_within_one_step(llama: Path) -> None:
    probe, options = probe_of(llama, tokens(2, 12))
    weights = sum(unit.weights for unit in options.units)
    largest = max(unit.weights for unit in options.units)
    before, costs = math.inf, fisher(probe, seed=0, skip=0)
    for average in (2.0, 2.6, 3.0, 3.7, 8.0):
        params = FisherParams(group_size=16, average_bits=average)
        found = spend(costs, probe, params, options.dense_bytes)
        assert average - 4 * largest / weights < found.average_bits <= average
        assert found.predicted < before
        before = found.predicted
    assert set(found.bits) == {8}


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"average_bits": 1.5}, r"average_bits 1.5: the widths 2, 3, 4, 8 reach 2 to 8"),
        ({"average_bits": 9}, r"reach 2 to 8; give more of them"),
        ({"max_bytes": "30kB"}, r"max_bytes 30,000: 2 to 8 bits make files of [\d,]+ to [\d,]+ "),
    ],
)
def test_budgets_out_of_reach_name_the_range(budget: Any, said: str, llama: Path) -> None:
    probe, options = probe_of(llama, tokens(1, 8))
    with pytest.raises(SelectionError, match=said):
        chosen(probe, options, **budget)
    known = [dict.fromkeys(probe.widths, 1.0) for _ in probe.units]  # measured for another budget
    with pytest.raises(SelectionError, match=said):
        spend(known, probe, FisherParams(group_size=16, **budget), options.dense_bytes)


def test_what_was_measured_is_read_again_in_the_order_of_the_units(tmp_path: Path) -> None:
    energies = {name: torch.rand(4) for name in ("model.layers.10.o", "model.layers.2.o", "b")}
    kept = Measured("fisher", [{2: 0.3, 8: 0.1}, {2: 0.2, 8: 0.0}, {4: 1.0}], energies)
    kept.save(tmp_path)
    for _ in range(2):
        found = Measured.load(tmp_path)
        assert (found.method, found.costs) == (kept.method, kept.costs)
        assert [*found.energies] == [*energies]
        assert all(torch.equal(found.energies[name], energies[name]) for name in energies)
        found.save(tmp_path)


def test_a_budget_is_asked_for_once() -> None:
    for given in ({}, {"average_bits": 3, "max_bytes": 10}):
        with pytest.raises(ValueError, match="give either average_bits or max_bytes"):
            FisherParams.model_validate(given)
    assert FisherParams.model_validate({"max_bytes": "90MB"}).max_bytes == 90_000_000
    assert ImportanceParams.model_validate({"average_bits": 3, "widths": "4,2"}).widths == (4, 2)


def test_what_cannot_be_quantized_is_named(llama: Path) -> None:
    with pytest.raises(QuantizationError, match=r"q_proj: its 32 inputs .* group_size 64"):
        Options(Decoder(llama), GridParams(group_size=64), WIDTHS)
    probe, _ = probe_of(llama, tokens(1, 8))
    with pytest.raises(QuantizationError, match=r"q_proj: its inputs hold NaN"):
        next(probe.differences(probe.units[0], torch.full((32, 32), math.nan)))
    with pytest.raises(QuantizationError, match=r"q_proj: its inputs are zero"):
        next(probe.differences(probe.units[0], torch.zeros(32, 32)))


def test_a_cost_that_is_no_number_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, options = probe_of(llama, tokens(1, 8))
    monkeypatch.setattr(
        "compressor.allocate.fisher.energies", lambda off, _: off[:, 0].double() * math.nan
    )
    with pytest.raises(CompressError, match=r"layers.0.self_attn.q_proj: fisher gives .*nan"):
        chosen(probe, options, average_bits=3)


def test_functions_take_their_own_parameters() -> None:
    import inspect

    for row in methods("allocate").values():
        signature = inspect.signature(row.load())
        keywords = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert keywords == row.params.model_fields.keys() - AllocateParams.model_fields.keys()


TEXT = "--text corpus.jsonl --field text --windows 4 --length 16 -q"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model", "llama")
    save_tokenizer(tmp_path / "model")
    save_corpus(tmp_path / "corpus.jsonl")
    monkeypatch.chdir(tmp_path)


def ask(command: Any, line: str) -> str:
    result = CliRunner().invoke(command, line.split())
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.usefixtures("project")
def test_quantize_on_a_budget_from_the_command_line() -> None:
    asked = f"model --average-bits 3.2 --group-size 16 {TEXT}"
    ask(quantize_command, f"{asked} -o direct")
    metrics = json.loads(Path("direct/manifest.json").read_text())["metrics"]
    assert metrics["bits"] == "mixed"
    assert {len(digits) for digits in metrics["widths"].values()} == {4}
    ask(allocate_command, f"{asked} -o widths")
    plan = BitPlan.load(Path("widths/bits.json"))
    assert plan.reason.startswith("fisher: ")
    same = f"model --group-size 16 --scheme widths/bits.json {TEXT} -o later"
    ask(quantize_command, same)
    for name in ("model.safetensors", "config.json"):
        assert Path("direct", name).read_bytes() == Path("later", name).read_bytes()
    with pytest.raises(ConfigError, match="remove one of the two"):
        ask(quantize_command, f"{asked} --scheme widths/bits.json")
    assert "need --average-bits" in ask(quantize_command, f"model --by lim {TEXT}")
    assert "one width for all" in ask(quantize_command, f"{asked} --bits 4")
    ask(quantize_command, f"model --max-bytes 62kB --by zd --group-size 16 {TEXT} -o small")
    assert Path("small/model.safetensors").stat().st_size <= 62_000
