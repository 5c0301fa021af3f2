"""Searches against brute force and against naive transcriptions of their papers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from compressor.decoder import Decoder
from compressor.errors import SelectionError
from compressor.records import Scores, Selection
from compressor.select.clasp import clasp
from compressor.select.evolution import evolution
from compressor.select.protect import Unit, all_units, cut
from compressor.select.skrr import skrr
from compressor.select.sleb import sleb
from compressor.select.swap import swap
from compressor.trial import Trial
from tests.tiny import save_tiny, tokens, weights_read

L = 6
SCORES = Scores(
    num_blocks=L,
    block={"bi": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]},
    attention={"bi": [0.1, 0.5, 0.2, 0.5, 0.5, 0.5]},
    ffn={"bi": [0.4, 0.4, 0.4, 0.4, 0.15, 0.4]},
    distances=[[0.5 - 0.01 * l for l in range(L - n + 1)] for n in range(1, L + 1)],
)
START: dict[str, Any] = {"start": "lowest", "score": "bi", "protect": (), "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks of which the middle ones matter least, as in trained models."""
    path = tmp_path_factory.mktemp("model")
    model: Any = save_tiny(path, "llama", num_hidden_layers=L)
    with torch.no_grad():
        for block, scale in zip(model.model.layers, (1, 0.5, 0.15, 0.2, 0.6, 2), strict=True):
            block.self_attn.o_proj.weight.mul_(scale)
            block.mlp.down_proj.weight.mul_(scale)
    model.save_pretrained(path)
    return path


@pytest.fixture
def trial(folder: Path) -> Trial:
    return Trial(Decoder(folder), tokens())


@pytest.fixture(scope="module")
def loss_of(folder: Path) -> Callable[[Iterable[Unit]], float]:
    """The loss of a cut, by an evaluator that no search shares."""
    own = Trial(Decoder(folder), tokens())
    return lambda units: own.loss(cut(L, units))


def units_of(selection: Selection) -> set[Unit]:
    lost: set[Unit] = {("attention", i) for i in selection.drop_attention}
    lost |= {("ffn", i) for i in selection.drop_ffn}
    return lost | {(k, i) for i in selection.drop_blocks for k in ("attention", "ffn")}


def greedy(loss_of: Any, free: list[Unit], n: int) -> tuple[set[Unit], list[Unit]]:
    gone: list[Unit] = []
    for _ in range(n):
        rest = {u: loss_of([*gone, u]) for u in free if u not in gone}
        gone.append(min(rest, key=lambda u: rest[u]))
    return set(gone), gone


@pytest.mark.parametrize("part", ["block", "attention", "ffn", "sublayers"])
@pytest.mark.parametrize("protect", [(), (0, -1)], ids=str)
def test_sleb_is_greedy_on_the_true_loss(
    part: Any, protect: tuple[int, ...], trial: Trial, loss_of: Any
) -> None:
    kept = {i % L for i in protect}
    free = [u for u in all_units(L, part) if u[1] not in kept]
    expected, order = greedy(loss_of, free, 3)
    found = sleb(SCORES, trial, n=3, part=part, protect=protect)
    assert found == cut(L, expected, found.reason, found.evaluations)
    assert found.reason.endswith(", ".join(f"{k} {i}" for k, i in order))
    assert found.evaluations == trial.spent > 0


def test_sleb_costs_half_of_its_masks(trial: Trial) -> None:
    found = sleb(SCORES, trial, n=2, part="block", protect=(0, -1))
    masks = (L - 2) + (L - 3)
    assert found.evaluations < 0.75 * masks
    again = Trial(trial.decoder, tokens())
    assert sleb(SCORES, again, n=2, part="block", protect=(0, -1)) == found


def best_of(loss_of: Any, part: Any, n: int) -> dict[frozenset[Unit], float]:
    masks = itertools.combinations(all_units(L, part), n)
    return {frozenset(m): loss_of(m) for m in masks}


@pytest.mark.parametrize(("part", "n"), [("block", 2), ("block", 3), ("sublayers", 2)])
def test_local_and_population_search_against_all_masks(
    part: Any, n: int, folder: Path, loss_of: Any
) -> None:
    every = best_of(loss_of, part, n)
    best = min(every, key=lambda m: every[m])
    swapped = swap(SCORES, Trial(Decoder(folder), tokens()), n=n, part=part, max_masks=200, **START)
    evolved = evolution(
        SCORES,
        Trial(Decoder(folder), tokens()),
        n=n,
        part=part,
        population=6,
        max_masks=len(every),
        **START,
    )
    assert cut(L, best, evolved.reason, evolved.evaluations) == evolved
    units: set[Unit] = {("block", i) for i in swapped.drop_blocks}
    units = units_of(swapped) if part == "sublayers" else units
    assert units == best


class Counted(Trial):
    masks: frozenset[str] = frozenset()

    def loss(self, selection: Selection) -> float:
        self.masks |= {selection.model_dump_json()}
        return super().loss(selection)


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
@pytest.mark.parametrize("start", ["lowest", "contiguous", (1, 4)], ids=str)
def test_bounded_searches_never_lose_to_their_start(
    limit: int, start: Any, folder: Path, loss_of: Any
) -> None:
    given = {"lowest": (0, 1), "contiguous": (4, 5)}.get(start, start)
    begun = loss_of([("block", i) for i in given])
    asked = START | {"start": start, "n": 2, "part": "block", "max_masks": limit}
    for search, more in ((swap, {}), (evolution, {"population": 3})):
        trial = Counted(Decoder(folder), tokens())
        found = search(SCORES, trial, **asked, **more)
        assert loss_of([("block", i) for i in found.drop_blocks]) <= begun
        assert len(trial.masks) <= limit
        assert len(found.drop_blocks) == 2
        assert search(SCORES, Trial(Decoder(folder), tokens()), **asked, **more) == found


def test_searches_leave_what_is_protected(trial: Trial) -> None:
    asked = START | {"n": 2, "protect": (0, -1)}
    for found in (
        swap(SCORES, trial, part="block", max_masks=40, **asked),
        evolution(SCORES, trial, part="block", max_masks=40, population=4, **asked),
        clasp(SCORES, trial, n=2, protect=(0, -1)),
        skrr(SCORES, trial, n=2, beam=2, reuse=True, protect=(0, -1)),
        swap(SCORES, trial, part="sublayers", max_masks=40, **asked),
    ):
        gone = {*found.drop_blocks, *found.drop_attention, *found.drop_ffn}
        gone |= {*found.reuse_attention, *found.reuse_ffn}
        assert gone
        assert not gone & {0, 5}


def test_starts_that_do_not_fit_are_refused(trial: Trial) -> None:
    for wrong, said in (
        ({"start": (1,)}, "expected 2 different unprotected indices below 6, got"),
        ({"start": (1, 1)}, "expected 2 different"),
        ({"start": (1, 6)}, "expected 2 different"),
        ({"start": (0, 1), "protect": (0,)}, "expected 2 different"),
        ({"score": "none"}, "no score 'none'"),
        ({"n": 6}, "n = 6 is more than the 5 blocks"),
        ({"part": "ffn", "start": "contiguous"}, "a contiguous run is of blocks"),
    ):
        asked = {"n": 2, "part": "block", "max_masks": 9} | START | wrong
        with pytest.raises(SelectionError, match=said):
            swap(SCORES, trial, **asked)
    for search, more in ((sleb, {"part": "sublayers"}), (skrr, {"beam": 1, "reuse": True})):
        with pytest.raises(SelectionError, match="n = 12 is more than the 11 sublayers"):
            search(SCORES, trial, n=12, protect=(), **more)
    with pytest.raises(SelectionError, match="n = 6 is more than the 5 blocks"):
        clasp(SCORES, trial, n=6, protect=())
    assert trial.spent == 0


class Blockwise:
    """The model's blocks as functions of (N, T, D), by transformers alone, in float64."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).double().eval()

    @torch.no_grad()
    def embedded(self) -> torch.Tensor:
        return self.model.model.embed_tokens(tokens())  # type: ignore[no-any-return]

    @torch.no_grad()
    def block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1).double()[None, None]
        rotary = self.model.model.rotary_emb(x, places)
        return self.model.model.layers[index](  # type: ignore[no-any-return]
            x, attention_mask=mask, position_embeddings=rotary, use_cache=False
        )


def naive_clasp(blocks: Blockwise, n: int, kept: set[int]) -> tuple[int, ...]:
    """The table of CLaSp, cell by cell, every state of every cell held."""
    h = [blocks.embedded()]
    for index in range(L):
        h.append(blocks.block(index, h[-1]))
    g: dict[tuple[int, int], torch.Tensor] = {(0, 0): h[0]}
    skipped: dict[tuple[int, int], bool] = {}
    for l in range(L):
        for m in range(n + 1):
            run = blocks.block(l, g[l, m]) if (l, m) in g else None
            skip = g.get((l, m - 1)) if l not in kept else None
            cosine = [
                cosine_similarity(x, h[l + 1], dim=-1).mean().item() if x is not None else -9
                for x in (run, skip)
            ]
            state = run if cosine[0] >= cosine[1] else skip
            if state is not None:
                g[l + 1, m], skipped[l + 1, m] = state, cosine[0] < cosine[1]
    path, m = [], n
    for l in range(L, 0, -1):
        if skipped[l, m]:
            path.append(l - 1)
            m -= 1
    return tuple(reversed(path))


@pytest.mark.parametrize("protect", [(), (0, 2)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_clasp_is_the_papers_table(n: int, protect: Any, folder: Path, trial: Trial) -> None:
    found = clasp(SCORES, trial, n=n, protect=protect)
    assert tuple(found.drop_blocks) == naive_clasp(Blockwise(folder), n, set(protect))
    assert 1 < found.evaluations <= n + 1


@pytest.mark.parametrize("seed", range(6))
def test_clasp_with_one_skip_against_every_skip(seed: int, tmp_path: Path) -> None:
    """One state per cell is not exhaustive, so how far it is from the best is recorded here."""
    save_tiny(tmp_path, "llama", num_hidden_layers=L, seed=seed)
    blocks = Blockwise(tmp_path)

    def last(skip: int | None) -> torch.Tensor:
        x = blocks.embedded()
        for index in range(L):
            x = x if index == skip else blocks.block(index, x)
        return x

    cosines = [cosine_similarity(last(i), last(None), dim=-1).mean().item() for i in range(L)]
    (chosen,) = clasp(SCORES, Trial(Decoder(tmp_path), tokens()), n=1, protect=()).drop_blocks
    rank = sorted(cosines, reverse=True).index(cosines[chosen])
    assert rank <= FROM_THE_BEST[seed]


FROM_THE_BEST = [0, 0, 0, 0, 0, 0]


def naive_skrr(folder: Path, n: int, beam: int) -> tuple[set[Unit], dict[Unit, int], float]:
    """Algorithms 1 and 2, with the discrepancy by an evaluator of its own."""
    windows = [tokens(), torch.tensor([[1]])]
    trials = [Trial(Decoder(folder), w) for w in windows]
    full = [t.states(Selection(num_blocks=L)).double() for t in trials]

    def d(gone: Iterable[Unit], reuse: dict[Unit, int]) -> float:
        lost = [u for u in gone if u not in reuse]
        shared = {
            f"reuse_{kind}": {i: g for (k, i), g in reuse.items() if k == kind}
            for kind in ("attention", "ffn")
        }
        chosen = Selection(**cut(L, lost).model_dump() | shared)
        return sum(
            (t.states(chosen).double() - f).pow(2).mean().item()
            for t, f in zip(trials, full, strict=True)
        )

    beams: list[frozenset[Unit]] = [frozenset()]
    for _ in range(n):
        grown = {b | {u} for b in beams for u in all_units(L, "sublayers") if u not in b}
        beams = sorted(grown, key=lambda m: d(m, {}))[:beam]
    gone, reuse = beams[0], dict[Unit, int]()
    least = d(gone, {})
    for kind, i in sorted(gone, key=lambda u: (u[1], u[0])):
        for way in (range(i - 1, -1, -1), range(i + 1, L)):
            giver = next((j for j in way if (kind, j) not in gone), None)
            if giver is not None and d(gone, {**reuse, (kind, i): giver}) < least:
                reuse[kind, i] = giver
                least = d(gone, reuse)
    return set(gone), reuse, least


@pytest.mark.parametrize(("n", "beam"), [(1, 1), (3, 2), (4, 1)])
def test_skrr_is_the_papers_algorithms(n: int, beam: int, folder: Path, trial: Trial) -> None:
    gone, reuse, least = naive_skrr(folder, n, beam)
    found = skrr(SCORES, trial, n=n, beam=beam, reuse=True, protect=())
    assert units_of(found) == gone - reuse.keys()
    shared: dict[Unit, int] = {("attention", i): g for i, g in found.reuse_attention.items()}
    assert shared | {("ffn", i): g for i, g in found.reuse_ffn.items()} == reuse
    assert f"{least:.4g} with {len(reuse)} shared" in found.reason
    bare = skrr(SCORES, Trial(trial.decoder, tokens()), n=n, beam=beam, reuse=False, protect=())
    assert units_of(bare) == gone
    assert not bare.reuse_attention
    assert not bare.reuse_ffn


@pytest.mark.parametrize(("taker", "giver"), [(3, 2), (2, 3)])
def test_a_twin_stands_in_for_a_skipped_sublayer(taker: int, giver: int, tmp_path: Path) -> None:
    model: Any = save_tiny(tmp_path, "llama", num_hidden_layers=L)
    model.model.layers[3].load_state_dict(model.model.layers[2].state_dict())
    model.save_pretrained(tmp_path)
    trial, others = Trial(Decoder(tmp_path), tokens()), {*range(L)} - {taker}
    found = skrr(SCORES, trial, n=2, beam=1, reuse=True, protect=tuple(others))
    assert (found.reuse_attention, found.reuse_ffn) == ({taker: giver}, {taker: giver})
    assert not units_of(found)
    assert trial.distance(found) < 1e-9


def test_the_null_prompt_reads_no_weight_again(trial: Trial, monkeypatch: Any) -> None:
    asked = weights_read(monkeypatch)
    skrr(SCORES, trial, n=1, beam=1, reuse=True, protect=())
    assert len(asked) == len(set(asked)) == L * 9


def test_a_wide_beam_is_brute_force(folder: Path) -> None:
    trial = Trial(Decoder(folder), tokens())
    distances = {
        frozenset(m): trial.distance(cut(L, m))
        for m in itertools.combinations(all_units(L, "sublayers"), 2)
    }
    config: Any = trial.decoder.model.config
    config.bos_token_id = None  # no null prompt
    found = skrr(SCORES, trial, n=2, beam=12, reuse=False, protect=())
    assert distances[frozenset(units_of(found))] == min(distances.values())


def test_searches_with_nothing_to_remove(trial: Trial) -> None:
    asked = START | {"n": 0, "part": "block", "max_masks": 5}
    for found in (
        sleb(SCORES, trial, n=0, part="block", protect=()),
        clasp(SCORES, trial, n=0, protect=()),
        swap(SCORES, trial, **asked),
        evolution(SCORES, trial, population=2, **asked),
        skrr(SCORES, trial, n=0, beam=2, reuse=True, protect=()),
    ):
        assert not units_of(found)
        assert found.reason
        assert math.isfinite(found.evaluations)
