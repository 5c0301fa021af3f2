"""The losses of distillation against the sums that define them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax

from compressor.heal import distillation
from compressor.heal.distillation import (
    chunked,
    distribution_loss,
    divergence,
    hidden_loss,
)
from compressor.inputs import outputs_of
from compressor.targets import Targets, buckets, normalised
from tests.tiny import tokens


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(p_logits: Tensor, q_logits: Tensor, tau: float = 1.0) -> Tensor:
    """KL of one pair of distributions, by the sum that defines it, in float64."""
    p, q = (softmax(z.double() / tau, -1) for z in (p_logits, q_logits))
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(p, q, strict=True):
        total = total + a * (a.log() - b.log())
    return total


# The divergence


def test_the_vector() -> None:
    """T4: KL of (2, 1, 0) to (1, 1, 0.5), and not of (1, 1, 0.5) to (2, 1, 0)."""
    full, cut = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.5])
    assert divergence(cut, full).item() == pytest.approx(0.170640, abs=1e-6)
    assert divergence(full, cut).item() == pytest.approx(0.182282, abs=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_divergence_is_the_sum(tau: float) -> None:
    q, p = noise(5, 40), noise(5, 40, seed=1)
    expected = torch.stack([tau**2 * naive(a, b, tau) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(divergence(q, p, tau).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_its_gradient_is_that_of_the_sum(tau: float) -> None:
    q, p = noise(3, 20).double().requires_grad_(), noise(3, 20, seed=1).double()
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    summed = torch.stack([tau**2 * naive(a, b, tau) for a, b in zip(p, q, strict=True)])
    (expected,) = torch.autograd.grad(weights @ summed, q)
    (found,) = torch.autograd.grad(weights @ divergence(q, p, tau), q)
    torch.testing.assert_close(found, expected)


def test_a_high_temperature_compares_logits() -> None:
    """tau^2 KL -> half the variance of the difference of the logits over the V tokens."""
    q, p = noise(30), noise(30, seed=1)
    limit = (p - q).double().var(correction=0) / 2
    assert divergence(q.double(), p.double(), 1e4).item() == pytest.approx(limit.item(), rel=1e-3)


@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_nothing_to_learn_is_exactly_nothing(tau: float) -> None:
    z = noise(7, 50).requires_grad_()
    shifted = (z - z.amax(-1, keepdim=True)).detach()
    loss = divergence(z, shifted, tau)
    assert torch.equal(loss, torch.zeros(7))
    assert not torch.autograd.grad(loss.sum(), z)[0].any()


# Top k and the rest


def test_buckets_are_probabilities() -> None:
    z = noise(4, 30)
    chosen = z.topk(5).indices
    kept = softmax(buckets(z, chosen), -1)
    p = softmax(z, -1)
    torch.testing.assert_close(kept[:, :5], p.gather(-1, chosen))
    torch.testing.assert_close(kept[:, 5], 1 - p.gather(-1, chosen).sum(-1))


def test_fewer_buckets_tell_less() -> None:
    """The data-processing inequality, from one bucket, which tells nothing, to all tokens."""
    q, p = noise(4, 30).double(), noise(4, 30, seed=1).double()
    exact = divergence(q, p)
    told = []
    for k in range(1, 31):
        chosen = p.topk(k).indices
        told.append(divergence(buckets(q, chosen), buckets(p, chosen)))
    for less, more in zip(told, [*told[1:], exact], strict=True):
        assert (less <= more + 1e-12).all()
    assert (told[0] < exact - 1e-3).all()
    torch.testing.assert_close(told[-1], exact)


def test_the_gradient_goes_through_the_rest() -> None:
    q, p = noise(3, 12).double().requires_grad_(), noise(3, 12, seed=1).double()
    chosen = p.topk(4).indices

    def by_hand(z: Tensor) -> Tensor:
        a, b = (softmax(x, -1) for x in (p, z))
        a_k, b_k = a.gather(-1, chosen), b.gather(-1, chosen)
        a_r, b_r = 1 - a_k.sum(-1), 1 - b_k.sum(-1)
        return ((a_k * (a_k / b_k).log()).sum(-1) + a_r * (a_r / b_r).log()).sum()

    (expected,) = torch.autograd.grad(by_hand(q), q)
    loss = divergence(buckets(q, chosen), buckets(p, chosen)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected)


# The loss of a micro batch


def example(k: int | None = None) -> tuple[Tensor, Targets, Tensor]:
    logits = noise(2, 9, 30).requires_grad_()
    said = noise(2, 9, 30, seed=1)
    chosen = None if k is None else said.topk(k).indices
    return logits, Targets(buckets(said, chosen), chosen, {}), tokens(2, 9).remainder(30)


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_chunks_change_nothing(
    k: int | None, ce_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets, text = example(k)
    apart = divergence(buckets(logits, targets.indices), targets.logits).mean()
    entropy = cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    whole = (1 - ce_weight) * apart + ce_weight * entropy
    (expected,) = torch.autograd.grad(3 * whole, logits)
    for rows in (1, 5, 100):
        monkeypatch.setattr(distillation, "CHUNK_BYTES", 4 * 30 * rows)
        loss = distribution_loss(logits, targets, text, tau=1.0, ce_weight=ce_weight)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(torch.autograd.grad(3 * loss, logits)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(
            distribution_loss(logits, targets, text, tau=1.0, ce_weight=ce_weight), whole
        )


def test_chunks_are_as_small_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK_BYTES", 4 * 30 * 2)
    seen: list[int] = []

    def part(z: Tensor, rows: slice) -> Tensor:
        assert z.dtype == torch.float32
        seen.append(len(z))
        return z.square().sum()

    logits = noise(5, 30).bfloat16().requires_grad_()
    loss = chunked(logits, part)
    assert seen == [2, 2, 1]
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.bfloat16


def test_hidden_states_are_compared_behind_a_norm() -> None:
    x, y = noise(2, 3, 8), noise(2, 3, 8, seed=1)

    def mean_square(a: Tensor, b: Tensor) -> Tensor:
        a, b = (z / z.square().mean(-1, keepdim=True).sqrt() for z in (a, b))
        return (a - b).square().mean()

    targets = Targets(x, None, {1: normalised(y), 3: normalised(x)})
    expected = (mean_square(x, y) + mean_square(5 * x, x)) / 2
    torch.testing.assert_close(hidden_loss({1: x, 3: 5 * x}, targets, {}), expected)
    turn = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        turn.weight.copy_(-torch.eye(8))
    targets = Targets(x, None, {1: -normalised(x)})
    assert hidden_loss({1: x}, targets, {1: turn}) == 0


def test_outputs_are_seen_while_asked_for_only() -> None:
    block = nn.Linear(3, 3)
    seen: dict[int, torch.Tensor] = {}
    with outputs_of({5: block}, seen.__setitem__):
        y = block(torch.ones(1, 3))
        assert seen[5] is y
    block(torch.zeros(1, 3))
    assert seen[5] is y
    assert not math.isnan(y.sum().item())
