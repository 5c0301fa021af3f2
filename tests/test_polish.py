"""Descent on scales and integers against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.quantize import polish as module
from compressor.quantize.gptq import gptq
from compressor.quantize.grid import Grid
from compressor.quantize.polish import descend, polish, rescale
from compressor.quantize.rtn import rtn


def problem(symmetric: bool) -> tuple[Grid, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A grid, W (6, 24), H, and levels, scales and zero points of W rounded to nearest."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 24, generator=draw, dtype=torch.float64)
    x = torch.randn(60, 24, generator=draw, dtype=torch.float64) @ torch.randn(
        24, 24, generator=draw, dtype=torch.float64
    )
    grid = Grid(2, 8, torch.float64, symmetric=symmetric)
    found = rtn(weight.float(), None, grid)
    zero = torch.zeros(6, 3) if found.zero_point is None else found.zero_point
    levels = found.integers.unflatten(1, (3, -1)) - zero.unsqueeze(-1)
    scale = found.scale.double()
    return grid, weight, x.T @ x / 60, levels.flatten(1).double(), scale, zero.double()


def product(levels: Tensor, scale: Tensor) -> Tensor:
    return (levels.unflatten(1, (3, -1)) * scale.unsqueeze(-1)).flatten(1)


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    off = weight - rounded
    return ((off @ hessian) * off).sum(-1)


@pytest.mark.parametrize("group", range(3))
def test_a_rescaled_group_is_at_its_minimum(group: int) -> None:
    grid, weight, hessian, levels, scale, _ = problem(True)
    columns = slice(8 * group, 8 * group + 8)
    slope = hessian[columns] @ (product(levels, scale) - weight).T
    own = levels[:, columns].T
    change = rescale(slope, hessian[columns, columns] @ own, own, scale[:, group], grid)
    assert change.all()

    def losses(factor: float) -> Tensor:
        moved = scale.clone()
        moved[:, group] += factor * change
        return loss(weight, product(levels, moved), hessian)

    for factor in (0.0, 0.99, 1.01):
        assert (losses(factor) > losses(1.0)).all()


def test_groups_of_zeros_and_stored_dtypes_keep_their_scales() -> None:
    _, weight, hessian, levels, scale, zero = problem(True)
    grid = Grid(2, 8, torch.bfloat16)
    scale = scale.bfloat16().double()
    gram = hessian[8:16, 8:16]
    slope = hessian[8:16] @ (product(levels, scale) - weight).T
    own, step = levels[:, 8:16].T, scale[:, 1]
    change = rescale(slope, gram @ own, own, step, grid)
    new = step + change
    assert torch.equal(new, new.bfloat16().double()) and change.any()
    nothing = torch.zeros(8, 6).double()
    assert not rescale(slope, nothing, nothing, step, grid).any()
    assert not rescale(gram @ (2 * own * step), gram @ own, own, step, grid).any()  # best is -step
    before = loss(weight, product(levels, scale), hessian)
    after = loss(weight, product(*polish(weight, hessian, levels, scale, zero, grid)), hessian)
    assert (after <= before).all() and (after < before).any()


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_equals_trying_every_level(
    symmetric: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    grid, weight, hessian, levels, scale, zero = problem(symmetric)
    levels, changed = levels.clone(), 0
    for group in range(3):
        columns = slice(8 * group, 8 * group + 8)
        slope = hessian[columns] @ (product(levels, scale) - weight).T / scale[:, group]
        low, high = (bound[:, group] for bound in grid.bounds(zero))
        own = levels[:, columns].T
        found = descend(slope, hessian[columns, columns], own, low, high).T
        expected = levels.clone()
        for row in range(6):
            for column in range(columns.start, columns.stop):
                tries = torch.arange(grid.low, grid.high + 1).double() - zero[row, group]
                options = expected[row].repeat(len(tries), 1)
                options[:, column] = tries
                losses = loss(weight[row], product(options, scale[row].repeat(4, 1)), hessian)
                expected[row, column] = tries[losses.argmin()]
        changed += int((found != own.T).sum())
        levels[:, columns] = found
        assert torch.equal(levels, expected)
    assert changed > 10


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_round_goes_over_the_groups_in_turn(symmetric: bool) -> None:
    """Each group's scale, then its levels, by forming the slope anew every time."""
    grid, weight, hessian, levels, scale, zero = problem(symmetric)
    found = polish(weight, hessian, levels, scale, zero, grid)
    levels, scale = levels.clone(), scale.clone()
    for group in range(3):
        columns = slice(8 * group, 8 * group + 8)
        gram, own = hessian[columns, columns], levels[:, columns]

        def slope(columns: slice = columns) -> Tensor:
            return hessian[columns] @ (product(levels, scale) - weight).T

        scale[:, group] += rescale(slope(), gram @ own.T, own.T, scale[:, group], grid)
        low, high = (bound[:, group] for bound in grid.bounds(zero))
        own.copy_(descend(slope() / scale[:, group], gram, own.T, low, high).T)
    assert torch.equal(found[0], levels)
    torch.testing.assert_close(found[1], scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_polish_lowers_what_gptq_minimises(symmetric: bool) -> None:
    _, weight, hessian, *_ = problem(symmetric)
    grid = Grid(2, 8, torch.float16, symmetric=symmetric)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(24)
    losses = []
    for rounds in range(3):
        found = gptq(weight, hessian, grid, damp=0.1, act_order=True, polish=rounds)
        losses.append(float(loss(weight, found.dequantize().double(), damped).sum()))
    assert losses[2] <= losses[1] < 0.99 * losses[0]


def test_a_round_of_polish_is_under_the_damped_gram() -> None:
    grid, weight, hessian, *_ = problem(True)
    plain, polished = (
        gptq(weight, hessian, grid, damp=0.5, act_order=True, polish=rounds) for rounds in (0, 1)
    )
    levels, zero = plain.integers.double(), torch.zeros(6, 3)
    damped = hessian + 0.5 * hessian.diagonal().mean() * torch.eye(24)
    expected, scale = polish(weight, damped, levels, plain.scale, zero, grid)
    torch.testing.assert_close(polished.scale, scale)
    assert torch.equal(polished.integers.double(), expected)
    other, _ = polish(weight, hessian, levels, plain.scale, zero, grid)
    assert not torch.equal(other, expected)  # the ridge matters here
