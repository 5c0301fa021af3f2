"""The losses of distillation, in float32: the parent's distributions and its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

from compressor.targets import Targets, buckets, normalised

CHUNK_BYTES = 2**24
"""Size of one of the temporaries that have an element per token and word of the vocabulary."""
_TEMPORARIES = 8


def divergence(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), (...) from logits (..., V).

    Nats. The factor keeps the gradient's size whatever tau (arXiv:1503.02531 section 2). That
    gradient is tau (q - p): exactly zero where both agree, which the chain through a logarithm
    is not, and Adam would make whole steps of the rest.
    """
    loss: Tensor = _Divergence.apply(student, teacher, tau)  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
        p, q = (
            log_softmax((z - z.amax(-1, keepdim=True)) / tau, dim=-1) for z in (teacher, student)
        )
        ctx.save_for_backward(tau * (q.exp() - p.exp()))
        return tau**2 * kl_div(q, p, reduction="none", log_target=True).sum(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return upstream[..., None] * gradient, None, None


def distribution_loss(
    logits: Tensor, targets: Targets, tokens: Tensor, *, tau: float, ce_weight: float
) -> Tensor:
    """(1 - w) mean of `divergence` + w mean next-token loss, a scalar.

    logits (B, T, V) of the student, tokens (B, T). The divergence is over all B T positions; with
    top-k targets it is that of the k + 1 `buckets`, which is never above that of all tokens.
    """
    following = tokens.roll(-1, -1)
    following[:, -1] = -100  # nothing follows the last token
    labels = following.flatten()
    predicted = labels.numel() - len(tokens)
    teacher = targets.logits.flatten(0, 1)
    indices = None if targets.indices is None else targets.indices.flatten(0, 1)

    def part(z: Tensor, rows: slice) -> Tensor:
        kept = buckets(z, None if indices is None else indices[rows])
        apart = divergence(kept, teacher[rows].float(), tau).sum() / len(labels)
        if not ce_weight:
            return apart
        entropy = cross_entropy(z, labels[rows], reduction="sum") / predicted
        return (1 - ce_weight) * apart + ce_weight * entropy

    return chunked(logits.flatten(0, 1), part)


def distribution_bytes(tokens: int, vocabulary: int) -> int:
    """Memory of a `distribution_loss` at its peak: logits and gradient, float32, and a chunk's."""
    logits = 4 * tokens * vocabulary
    return 2 * logits + _TEMPORARIES * min(CHUNK_BYTES, logits)


def chunked(logits: Tensor, part: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Sum of `part(logits[rows], rows)` over chunks of the rows of logits (M, V), in float32.

    The gradient is made chunk by chunk on the way forward, so that beside the logits only it, in
    their dtype, has their size.
    """
    loss: Tensor = _Chunked.apply(logits, part)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, part: Callable[[Tensor, slice], Tensor]) -> Tensor:
        step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits if wanted else logits[:0])
        total = torch.zeros((), device=logits.device)
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            with torch.set_grad_enabled(wanted):
                z = logits[rows].detach().float().requires_grad_(wanted)
                loss = part(z, rows)
            if wanted:
                gradient[rows] = torch.autograd.grad(loss, z)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None


def hidden_loss(
    states: Mapping[int, Tensor], targets: Targets, filters: Mapping[int, nn.Module]
) -> Tensor:
    """Mean over matched blocks of MSE(F x / rms(x), y / rms(y)), a scalar.

    x (B, T, D) is the student's stream behind a block, y the parent's behind the same one, F its
    filter, where there is one (TED, arXiv:2210.01351 section 3). Both are taken behind a norm
    without gains (arXiv:2407.14679 section 3), or the few tokens of huge norm would be the loss.
    """
    gaps = []
    for block, target in targets.hidden.items():
        x = normalised(states[block])
        gaps.append(mse_loss(filters[block](x) if block in filters else x, target.float()))
    return torch.stack(gaps).mean()
