"""Selections are argmins over what is allowed."""

from __future__ import annotations

import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

import pytest

from compressor.errors import SelectionError
from compressor.records import Scores, Selection
from compressor.select.contiguous import contiguous, simple
from compressor.select.even import even
from compressor.select.lowest import fixed, joint, lowest

L = 7


def scores(seed: int = 0) -> Scores:
    draw = random.Random(seed)
    distances = [[draw.random() for _ in range(L - n + 1)] for n in range(1, L + 1)]
    return Scores(
        num_blocks=L, block={"bi": [draw.random() for _ in range(L)]}, distances=distances
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("protect", [(), (-1,), (0, 6)], ids=str)
def test_contiguous_is_the_least_allowed_run(seed: int, n: int, protect: tuple[int, ...]) -> None:
    table = scores(seed)
    kept = {i % L for i in protect}
    runs = [range(start, start + n) for start in range(L - n + 1)]
    allowed = [run for run in runs if not kept & set(run)]
    best = min(allowed, key=lambda run: table.distances[n - 1][run[0]])
    assert contiguous(table, n=n, protect=protect).drop_blocks == list(best)


def test_of_equal_runs_the_first_goes() -> None:
    flat = Scores(num_blocks=4, distances=[[0.5] * (5 - n) for n in range(1, 5)])
    assert contiguous(flat, n=2, protect=()).drop_blocks == [0, 1]


def test_the_last_run_can_be_chosen_without_protection() -> None:
    table = Scores(num_blocks=3, distances=[[0.3, 0.2, 0.1], [0.2, 0.1], [0.1]])
    assert contiguous(table, n=1, protect=()).drop_blocks == [2]
    assert contiguous(table, n=1, protect=(-1,)).drop_blocks == [1]


def test_simple_keeps_the_very_last() -> None:
    assert simple(Scores(num_blocks=32), n=8).drop_blocks == list(range(23, 31))


def test_lowest_follows_the_score() -> None:
    table = Scores(num_blocks=5, block={"bi": [0.4, 0.1, 0.3, 0.1, 0.2]})
    assert lowest(table, n=1, score="bi", protect=()).drop_blocks == [3]
    assert lowest(table, n=3, score="bi", protect=()).drop_blocks == [1, 3, 4]
    assert lowest(table, n=3, score="bi", protect=(3, -1)).drop_blocks == [0, 1, 2]


def test_fixed_takes_the_list() -> None:
    assert fixed(Scores(num_blocks=5), blocks=(3, -5)).drop_blocks == [0, 3]
    assert fixed(Scores(num_blocks=5), num_blocks=5, blocks=(3,)).drop_blocks == [3]
    with pytest.raises(SelectionError, match="for a model of 6 blocks, but this one has 5; score"):
        fixed(Scores(num_blocks=5), num_blocks=6, blocks=(3,))


def test_lowest_and_fixed_of_sublayers() -> None:
    table = Scores(
        num_blocks=4,
        attention={"cos": [0.4, 0.1, 0.3, 0.1]},
        ffn={"cos": [0.5, 0.05, 0.2, 0.6]},
    )
    found = lowest(table, n=2, score="cos", part="attention", protect=(3,))
    assert (found.drop_attention, found.drop_ffn, found.drop_blocks) == ([1, 2], [], [])
    assert lowest(table, n=2, score="cos", part="ffn", protect=()).drop_ffn == [1, 2]
    with pytest.raises(SelectionError, match="n = 4 is more than the 3 attentions"):
        lowest(table, n=4, score="cos", part="attention", protect=())
    with pytest.raises(SelectionError, match="block: no score 'cos'"):
        lowest(table, n=1, score="cos", protect=())
    given = fixed(table, blocks=(0,), attention=(-1, 1, 0), ffn=(1, 2))
    assert given.drop_blocks == [0, 1]
    assert (given.drop_attention, given.drop_ffn) == ([3], [2])
    with pytest.raises(SelectionError, match="ffn: a block is listed twice"):
        fixed(table, blocks=(), ffn=(1, -3))
    with pytest.raises(SelectionError, match="n = 4 is more than the 3 blocks"):
        fixed(table, blocks=(), attention=(0, 1, 2, 3), ffn=(0, 1, 2, 3))


def test_fixed_takes_sublayers_to_share() -> None:
    table = Scores(num_blocks=4)
    given = fixed(table, blocks=(0,), ffn=(1,), reuse_attention={1: 2}, reuse_ffn={3: 2})
    assert (given.reuse_attention, given.reuse_ffn) == ({1: 2}, {3: 2})
    assert (given.drop_blocks, given.drop_ffn) == ([0], [1])
    for giver in (0, 1, 4):
        with pytest.raises(SelectionError, match=f"ffn 3 cannot run with the weights of {giver}"):
            fixed(table, blocks=(0,), ffn=(1,), reuse_ffn={3: giver})


def test_joint_takes_the_lowest_of_both_lists() -> None:
    table = Scores(
        num_blocks=4,
        attention={"cos": [0.4, 0.1, 0.3, 0.1]},
        ffn={"cos": [0.5, 0.05, 0.2, 0.6]},
    )
    found = joint(table, n=3, score="cos", protect=())
    assert (found.drop_blocks, found.drop_attention, found.drop_ffn) == ([1], [3], [])
    found = joint(table, n=4, score="cos", protect=(1,))
    assert (found.drop_blocks, found.drop_attention, found.drop_ffn) == ([2], [0, 3], [])
    with pytest.raises(SelectionError, match="n = 8 is more than the 7 sublayers"):
        joint(table, n=8, score="cos", protect=())
    with pytest.raises(SelectionError, match=r"^attention: no score 'bi'$"):
        joint(scores(), n=1, score="bi", protect=())


def kept(depth: int, **asked: float | None) -> list[int]:
    drop = even(Scores(num_blocks=depth), **{"n": None, "speedup": None} | asked).drop_blocks
    return [i for i in range(depth) if i not in drop]


@pytest.mark.parametrize("depth", [12, 30, 32, 33])
@pytest.mark.parametrize("speedup", [1, 1.1, 4 / 3, 1.5, 2, 3, 5])
def test_even_keeps_both_ends_and_spaces_the_rest(depth: int, speedup: float) -> None:
    found = kept(depth, speedup=speedup)
    count = int(depth / speedup + 1e-9)
    assert found == [round(Fraction(i * (depth - 1), count - 1)) for i in range(count)]
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert (len(found), found[0], found[-1]) == (count, 0, depth - 1)
    assert max(gaps) - min(gaps) <= 1
    assert kept(depth, n=depth - count) == found


def test_even_is_not_the_stride_of_the_authors_code() -> None:
    """T12 is their rule: a stride, then the last block; it degenerates below a speed-up of 2."""

    def strided(depth: int, speedup: float) -> list[int]:
        count = int(depth / speedup)
        return [*[*range(0, depth, int(depth / (count - 1)))][: count - 1], depth - 1]

    assert strided(30, 5) == [0, 6, 12, 18, 24, 29]
    assert kept(30, speedup=5) == [0, 6, 12, 17, 23, 29]
    assert strided(32, 4 / 3) == [*range(23), 31]
    found = kept(32, speedup=4 / 3)
    assert len(found) == 24
    assert max(b - a for a, b in itertools.pairwise(found)) == 2


def test_even_asks_for_exactly_one_budget() -> None:
    for asked in ({}, {"n": 3, "speedup": 2.0}):
        with pytest.raises(SelectionError, match="give exactly one of n"):
            kept(8, **asked)
    with pytest.raises(SelectionError, match="one block is too few"):
        kept(8, n=7)
    with pytest.raises(SelectionError, match="n = 8 is more than the 7 blocks"):
        kept(8, speedup=20)


@pytest.mark.parametrize("seed", range(3))
def test_lowest_leaves_nothing_lower_behind(seed: int) -> None:
    saliency = scores(seed).block["bi"]
    drop = lowest(scores(seed), n=3, score="bi", protect=(2,)).drop_blocks
    left = [i for i in range(L) if i not in drop and i != 2]
    assert len(drop) == 3
    assert max(saliency[i] for i in drop) < min(saliency[i] for i in left)


def test_nothing_can_be_asked_for() -> None:
    bare = Scores(num_blocks=L, block={"bi": [0.0] * L})
    assert contiguous(bare, n=0, protect=(-1,)).drop_blocks == []
    assert simple(bare, n=0).drop_blocks == []
    assert lowest(bare, n=0, score="bi", protect=()).drop_blocks == []
    assert fixed(bare, blocks=()).drop_blocks == []


def test_all_but_one_can_go() -> None:
    table = scores()
    assert simple(table, n=L - 1).drop_blocks == list(range(L - 1))
    assert len(contiguous(table, n=L - 1, protect=()).drop_blocks) == L - 1
    assert len(lowest(table, n=L - 1, score="bi", protect=()).drop_blocks) == L - 1
    for ask in (
        lambda: contiguous(table, n=L, protect=()),
        lambda: lowest(table, n=L, score="bi", protect=()),
        lambda: fixed(table, blocks=tuple(range(L))),
    ):
        with pytest.raises(SelectionError, match=r"n = 7 is more than the 6 .* \(0 protected\)"):
            ask()


def test_impossible_requests_are_explained() -> None:
    table = scores()
    with pytest.raises(SelectionError, match="n = 7 is more than the 6 blocks"):
        contiguous(table, n=7, protect=(-1,))
    with pytest.raises(SelectionError, match="no 4 neighbouring blocks are free"):
        contiguous(table, n=4, protect=(3,))
    with pytest.raises(SelectionError, match="add angular_distance"):
        contiguous(Scores(num_blocks=4), n=1, protect=())
    with pytest.raises(SelectionError, match="n = 7 is more than the 6"):
        simple(table, n=7)
    with pytest.raises(SelectionError, match=r"n = 6 is more than the 5 .*\(2 protected"):
        lowest(table, n=6, score="bi", protect=(0, -1))
    with pytest.raises(SelectionError, match="did you mean 'bi'"):
        lowest(table, n=1, score="b", protect=())
    with pytest.raises(SelectionError, match="no score 'lamp'; known: bi"):
        lowest(table, n=1, score="lamp", protect=())
    for wrong in (7, -8):
        said = rf"^blocks \[{wrong}\] do not exist in a model of 7 blocks$"
        with pytest.raises(SelectionError, match=said):
            contiguous(table, n=1, protect=(0, wrong))
        with pytest.raises(SelectionError, match=said):
            lowest(table, n=1, score="bi", protect=(wrong, 0))
        with pytest.raises(SelectionError, match=said):
            fixed(table, blocks=(wrong,))
    with pytest.raises(SelectionError, match="listed twice"):
        fixed(table, blocks=(6, -1))


def test_scores_round_trip_bit_for_bit(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    scores().save(first)
    assert Scores.load(first) == scores()
    Scores.load(first).save(second)
    assert first.read_bytes() == second.read_bytes()
    first.write_text('{"num_blocks": 0}')
    with pytest.raises(SelectionError, match=r"a\.json: num_blocks: .* greater than 0"):
        Scores.load(first)
    for edited, said in (
        ({"block": {"bi": [0.1]}}, r"block\.bi: 1 numbers for 2 blocks"),
        ({"ffn": {"cos": [0.1] * 3}}, r"ffn\.cos: 3 numbers for 2 blocks"),
        ({"distances": [[0.1, 0.2]]}, r"distances: expected rows of 2 to 1 numbers, got \[2\]"),
    ):
        first.write_text(json.dumps({"num_blocks": 2, **edited}))
        with pytest.raises(SelectionError, match=rf"a\.json: .*{said}"):
            Scores.load(first)


def test_selections_round_trip_and_refuse_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    selection = Selection(num_blocks=4, drop_blocks=[1, 2], reason="why")
    selection.save(path)
    assert Selection.load(path) == selection
    for text, said in [
        ('{"num_blocks": 4, "drop_blocks": [4]}', r"blocks \[4\] do not exist"),
        ('{"num_blocks": 4, "drop_blocks": [1, 1]}', "listed twice"),
        ('{"num_blocks": 4, "drop_blocks": [2, 1]}', "ascending"),
        ('{"num_blocks": 2, "drop_blocks": [0, 1]}', "cannot remove all 2"),
        ('{"num_blocks": 4, "drop": [1]}', "drop"),
        ("{", "not valid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(SelectionError, match=said):
            Selection.load(path)
    with pytest.raises(SelectionError, match="no such file"):
        Selection.load(tmp_path / "none.json")
