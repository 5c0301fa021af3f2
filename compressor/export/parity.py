"""The gate of every export: torch, the reloaded safetensors and the ONNX graph say the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from compressor.export.nbits import round_to_nearest
from compressor.runtimes.session import Session
from compressor.runtimes.torch_runtime import load_model

TOLERANCE = {
    ("float32", 0): 2e-3,
    ("float16", 0): 0.1,
    ("bfloat16", 0): 0.8,
    ("float32", 4): 2.0,
    ("float16", 4): 2.0,
    ("bfloat16", 4): 2.0,
}
"""Largest accepted difference by dtype and accuracy level, in standard deviations of the logits:
about 100 times what sums in float32 differ by and four times what they do in float16 on text that
makes no sense; bfloat16 has three bits less. Rounding every activation to 8 bits moves single
logits of such text by half a deviation, so level 4 is only kept from breaking: that the graph is
right is shown with level 0."""

LENGTHS = (24, 17, 9)
_LONGEST_PROMPT = 512
_WINDOW = 256


@dataclass(frozen=True)
class Answers:
    """What a model says to fixed questions.

    Attributes:
        prompts: token ids (N, S); logits: of all of them (N, S, V).
        greedy: (N, count) tokens behind each prompt, each the likeliest after those before.
        steps: (N, count, V), the logits that the tokens were chosen by.
        window: (1, T) held-out tokens, or (0, T); nll: their mean negative log-likelihood.
    """

    prompts: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray
    steps: np.ndarray
    window: np.ndarray
    nll: float | None

    @property
    def unit(self) -> float:
        """Standard deviation of the logits."""
        return float(np.std(self.logits))


def questions(config: Any, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts (3, S) and a held-out window (1, T), from `tokens` (N, T) or at random without one.

    Where the model has a sliding window, the prompts are longer than it.
    """
    length, window = max(LENGTHS), getattr(config, "sliding_window", None) or 0
    if 0 < window < _LONGEST_PROMPT:
        length = max(length, min(window + 16, config.max_position_embeddings - 64))
    if tokens is None or len(tokens) < len(LENGTHS) or tokens.shape[1] < length:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(config.vocab_size, (len(LENGTHS), length), generator=generator)
        return rows, rows[:0]
    return tokens[: len(LENGTHS), :length], tokens[-1:, :_WINDOW]


def reference(folder: Path, head_bits: int | None = None) -> Any:
    """The checkpoint in transformers, float32; integers are read by our own reader.

    `head_bits` rounds the head, and with it a tied embedding, as the export does.
    """
    model = load_model(folder)
    if head_bits:
        weight = model.get_output_embeddings().weight
        weight.data = round_to_nearest(weight.data, head_bits).dequantize()
    return model


@torch.inference_mode()
def ask(model: Any, prompts: Tensor, window: Tensor, count: int) -> Answers:
    """What torch says, `count` greedy tokens with its cache, all prompts at once."""
    cache = DynamicCache(config=model.config)
    logits = model(prompts, past_key_values=cache, use_cache=True).logits.float()
    steps = [logits[:, -1]]
    while len(steps) < count:
        ids = steps[-1].argmax(-1, keepdim=True)
        out = model(ids, past_key_values=cache, use_cache=True).logits
        steps.append(out[:, -1].float())
    scores = torch.stack(steps, 1)
    losses = [_nll(model(row[None]).logits[0].float().numpy(), row.numpy()) for row in window]
    return Answers(
        prompts.numpy(),
        logits.numpy(),
        scores.argmax(-1).numpy(),
        scores.numpy(),
        window.numpy(),
        losses[0] if losses else None,
    )


def differences(session: Session, answers: Answers) -> tuple[dict[str, float], int]:
    """Largest difference of each kind, in standard deviations of the logits; equal tokens.

    The first prompt runs alone, the others as a batch: `prefill`, and `decode` token by token;
    `greedy` is how far below the likeliest token the graph's own choice ever was. `chunked` is the
    first prompt in two parts through the cache, `padded` all prompts cut to unequal lengths in one
    batch and one token more; `nll` in nats per token. Equal greedy tokens are counted up to the
    first that is not: until there, being fed torch's tokens and running free are the same.
    """
    found, equal = dict.fromkeys(("prefill", "decode", "greedy"), 0.0), 0
    for rows in (slice(0, 1), slice(1, None)):
        tokens, steps = answers.greedy[rows], answers.steps[rows]
        whole, cache = session.run(answers.prompts[rows])
        decoded = [whole[:, -1]]
        for column in tokens.T[:-1]:
            out, cache = session.run(column[:, None], cache)
            decoded.append(out[:, -1])
        own = np.stack(decoded, 1)
        chosen = own.argmax(-1)
        equal += int(np.cumprod(chosen == tokens, axis=1).sum())
        margin = steps.max(-1) - np.take_along_axis(steps, chosen[..., None], 2)[..., 0]
        pairs = {
            "prefill": (whole, answers.logits[rows]),
            "decode": (own, steps),
            "greedy": (margin, np.zeros_like(margin)),
        }
        found = {kind: _worst(found[kind], *pair) for kind, pair in pairs.items()}
    found |= {"chunked": _chunked(session, answers), "padded": _padded(session, answers)}
    found = {kind: value / answers.unit for kind, value in found.items()}
    if answers.nll is not None:
        logits, _ = session.run(answers.window)
        found["nll"] = abs(_nll(logits[0], answers.window[0]) - answers.nll)
    return found, equal


def _chunked(session: Session, answers: Answers) -> float:
    """The first prompt in two parts."""
    prompt = answers.prompts[:1]
    half = prompt.shape[1] // 2
    first, cache = session.run(prompt[:, :half])
    second, _ = session.run(prompt[:, half:], cache)
    return _worst(0.0, np.concatenate([first, second], 1), answers.logits[:1])


def _padded(session: Session, answers: Answers) -> float:
    """Prompts cut to unequal lengths in one batch, padded on the right, and one token more."""
    width = answers.prompts.shape[1]
    lengths = np.array([width, *LENGTHS[1:]])
    columns = np.arange(width + 1)
    mask = (columns[:-1] < lengths[:, None]).astype(np.int64)
    logits, cache = session.run(answers.prompts * mask, mask=mask)
    longer = (columns <= lengths[:, None]).astype(np.int64)
    if session.appends:
        longer = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    known = np.concatenate([answers.prompts, answers.greedy[:, :1]], axis=1)
    after = np.take_along_axis(known, lengths[:, None], 1)
    steps, _ = session.run(after, cache, longer)
    worst = 0.0
    for row, n in enumerate(lengths):
        worst = _worst(worst, logits[row, :n], answers.logits[row, :n])
        expected = np.concatenate([answers.logits[row], answers.steps[row, 1:2]])
        worst = _worst(worst, steps[row], expected[n : n + 1])
    return worst


def _worst(before: float, a: np.ndarray, b: np.ndarray) -> float:
    """The larger of `before` and max |a - b|; NaN stays NaN."""
    return float(np.maximum(before, np.abs(a - b).max(initial=0.0)))


def _nll(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood of tokens (T,) by logits (T, V), which it overwrites."""
    logits = logits[:-1]
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
    return float(np.mean(np.log(np.exp(logits, out=logits).sum(-1)) - chosen))
