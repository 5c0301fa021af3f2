"""Moments wider than what is multiplied at once, against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from compressor.moments import Cross, Gram, energies

CPU = torch.device("cpu")
WIDTHS = pytest.mark.parametrize("width", [8, 144, 145, 300])


def drawn(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@WIDTHS
def test_a_gram_is_the_whole_mean_of_products(width: int) -> None:
    gram, x = Gram(width, CPU), drawn(2500, width, 0)  # more tokens than are taken at once
    gram.add(x[:1700].view(2, 850, width))
    gram.add(x[1700:])
    expected = (x.double().T @ x.double() / len(x)).float()
    torch.testing.assert_close(gram.mean, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(gram.mean, gram.mean.T)


@WIDTHS
def test_a_cross_is_the_mean_of_what_lacks_times_what_is_read(width: int) -> None:
    cross, lacking, x = Cross(6, width, CPU), drawn(90, 6, 1), drawn(90, width, 2)
    cross.add(lacking, x)
    expected = (lacking.double().T @ x.double() / len(x)).float()
    torch.testing.assert_close(cross.mean, expected, rtol=1e-4, atol=1e-6)


@WIDTHS
def test_energies_are_those_of_the_outputs(width: int) -> None:
    weight, x = drawn(5, width, 3), drawn(400, width, 4)
    gram = x.double().T @ x.double() / len(x)
    expected = (x.double() @ weight.double().T).square().mean(0)
    torch.testing.assert_close(energies(weight.double(), gram), expected)
    torch.testing.assert_close(energies(weight, gram.float()), expected.float(), rtol=1e-4, atol=0)
    nothing = energies(weight, -torch.eye(width))
    assert torch.equal(nothing, torch.zeros(5))
