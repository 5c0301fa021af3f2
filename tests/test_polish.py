"""Re-solved scales and coordinate descent against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.quantize import polish
from compressor.quantize.gptq import gptq
from compressor.quantize.grid import Grid
from compressor.quantize.polish import descend, refit_scales
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


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_scales_are_a_minimum(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polish, "_HOLD", 0.0)
    grid, weight, hessian, levels, scale, _ = problem(symmetric)
    found = refit_scales(weight, hessian, levels, scale, grid)
    least = loss(weight, product(levels, found), hessian)
    assert (least < loss(weight, product(levels, scale), hessian)).all()
    for group in range(3):
        for factor in (0.999, 1.001):
            moved = found.clone()
            moved[:, group] *= factor
            assert (loss(weight, product(levels, moved), hessian) > least).all()


def test_scales_in_parts_equal_scales_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, weight, hessian, levels, scale, _ = problem(True)
    whole = refit_scales(weight, hessian, levels, scale, grid)
    monkeypatch.setattr(polish, "_PRODUCTS", 1)
    torch.testing.assert_close(refit_scales(weight, hessian, levels, scale, grid), whole)


def test_groups_of_zeros_and_stored_dtypes_keep_their_scales() -> None:
    _, weight, hessian, levels, scale, _ = problem(True)
    levels[:, 8:16] = 0
    grid = Grid(2, 8, torch.bfloat16)
    scale = scale.bfloat16().double()
    found = refit_scales(weight, hessian, levels, scale, grid)
    assert torch.equal(found, found.bfloat16().double()) and (found != 0).all()
    before, after = (loss(weight, product(levels, s), hessian) for s in (scale, found))
    assert (after <= before).all() and (after < before).any()


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_equals_trying_every_level(
    symmetric: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polish, "_BLOCK", block)
    grid, weight, hessian, levels, scale, zero = problem(symmetric)
    found = descend(weight, hessian, levels, scale, zero, grid)
    expected = levels.clone()
    for row in range(6):
        for column in range(24):
            offset = zero[row, column // 8]
            tries = torch.arange(grid.low, grid.high + 1).double() - offset
            options = expected[row].repeat(len(tries), 1)
            options[:, column] = tries
            losses = loss(weight[row], product(options, scale[row].repeat(4, 1)), hessian)
            expected[row, column] = tries[losses.argmin()]
    assert torch.equal(found, expected) and not torch.equal(found, levels)


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


def test_a_round_of_polish_is_a_refit_and_a_descent_under_the_damped_gram() -> None:
    grid, weight, hessian, *_ = problem(True)
    plain, polished = (
        gptq(weight, hessian, grid, damp=0.5, act_order=True, polish=rounds) for rounds in (0, 1)
    )
    damped = hessian + 0.5 * hessian.diagonal().mean() * torch.eye(24)
    levels, zero = plain.integers.double(), torch.zeros(6, 3)
    scale = refit_scales(weight, damped, levels, plain.scale, grid)
    torch.testing.assert_close(polished.scale, scale)
    expected = descend(weight, damped, levels, scale, zero, grid)
    assert torch.equal(polished.integers.double(), expected)
    other = descend(weight, hessian, levels, scale, zero, grid)
    assert not torch.equal(other, expected)  # the ridge matters here
