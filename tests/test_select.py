"""Selections are argmins over what is allowed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from compressor.errors import SelectionError
from compressor.records import Scores, Selection
from compressor.select.contiguous import contiguous, simple
from compressor.select.lowest import fixed, lowest

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


@pytest.mark.parametrize("n", [0])
def test_nothing_can_be_asked_for(n: int) -> None:
    table = scores()
    assert contiguous(table, n=n, protect=(-1,)).drop_blocks == []
    assert simple(table, n=n).drop_blocks == []
    assert lowest(table, n=n, score="bi", protect=()).drop_blocks == []


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
    with pytest.raises(SelectionError, match="did you mean 'bi'"):
        lowest(table, n=1, score="b", protect=())
    with pytest.raises(SelectionError, match=r"blocks \[9\] do not exist in a model of 7"):
        lowest(table, n=1, score="bi", protect=(9,))
    with pytest.raises(SelectionError, match="listed twice"):
        fixed(table, blocks=(6, -1))


def test_records_round_trip_and_refuse_nonsense(tmp_path: Path) -> None:
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
