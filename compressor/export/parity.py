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

TOLERANCE = {("float32", 0): 2e-3, ("float16", 0): 5e-2, ("float32", 4): 2.0, ("float16", 4): 2.0}
"""Largest accepted difference by dtype and accuracy level, in standard deviations of the logits:
about 100 times what sums in float32 differ by and ten times what they do in float16. Rounding
every activation to 8 bits moves single logits by half a deviation on text that makes no sense,
so level 4 is only kept from breaking: that the graph is right is shown with level 0."""

LENGTHS = (24, 17, 9)
_LONGEST_PROMPT = 512
_WINDOWS, _WINDOW = 2, 256


@dataclass(frozen=True)
class Answers:
    """What a model says to fixed questions.

    Attributes:
        prompts: token ids (S,) of unequal lengths.
        logits: (S, V) per prompt.
        greedy: (count,) tokens per prompt, each the likeliest after those before.
        steps: (count, V) per prompt, the logits that the tokens were chosen by.
        windows: (N, T) held-out tokens; nll: their mean negative log-likelihood, None without.
    """

    prompts: list[np.ndarray]
    logits: list[np.ndarray]
    greedy: list[np.ndarray]
    steps: list[np.ndarray]
    windows: np.ndarray
    nll: float | None

    @property
    def unit(self) -> float:
        """Standard deviation of the logits."""
        return float(np.std(np.concatenate(self.logits)))


def questions(config: Any, tokens: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Prompts of unequal lengths and held-out windows, from `tokens` (N, T) or at random.

    Where the model has a sliding window, one prompt is longer than it.
    """
    lengths = list(LENGTHS)
    window = getattr(config, "sliding_window", None) or 0
    if 0 < window < _LONGEST_PROMPT:
        lengths[0] = max(lengths[0], min(window + 16, config.max_position_embeddings - 64))
    if tokens is None or len(tokens) < len(lengths) or tokens.shape[1] < max(lengths):
        generator = torch.Generator().manual_seed(0)
        shape = (len(lengths), max(lengths))
        rows = torch.randint(config.vocab_size, shape, generator=generator)
        return [row[:n] for row, n in zip(rows, lengths, strict=True)], rows[:0]
    rows = tokens[: len(lengths)]
    prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    return prompts, tokens[-_WINDOWS:, :_WINDOW]


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
def ask(model: Any, prompts: list[Tensor], windows: Tensor, count: int) -> Answers:
    """What torch says, each prompt on its own, `count` greedy tokens with its cache."""
    logits, greedy, steps = [], [], []
    for prompt in prompts:
        cache = DynamicCache(config=model.config)
        ids, chosen = prompt[None], []
        scores: list[np.ndarray] = []
        for _ in range(count):
            out = model(ids, past_key_values=cache, use_cache=True).logits[0].float()
            if not scores:
                logits.append(out.numpy())
            scores.append(out[-1].numpy())
            ids = out[-1:].argmax(-1)[None]
            chosen.append(int(ids))
        greedy.append(np.array(chosen, np.int64))
        steps.append(np.stack(scores))
    losses = [_nll(model(row[None]).logits[0].float().numpy(), row.numpy()) for row in windows]
    nll = float(np.mean(losses)) if losses else None
    arrays = [prompt.numpy() for prompt in prompts]
    return Answers(arrays, logits, greedy, steps, windows.numpy(), nll)


def differences(session: Session, answers: Answers) -> tuple[dict[str, float], int]:
    """Largest difference of each kind, in standard deviations of the logits; equal tokens.

    `prefill` of each prompt alone, `chunked` in two parts through the cache, `padded` all
    prompts in one batch and one more token each, `decode` token by token; `greedy` is how far
    below the likeliest token the graph's own choice ever was; `nll` in nats per token. Equal
    greedy tokens are counted up to the first that is not: until there, being fed torch's tokens
    and running free are the same.
    """
    found, equal = dict.fromkeys(("prefill", "chunked", "decode", "greedy"), 0.0), 0
    for prompt, logits, tokens, steps in zip(
        answers.prompts, answers.logits, answers.greedy, answers.steps, strict=True
    ):
        whole, cache = session.run(prompt[None])
        half = len(prompt) // 2
        first, part = session.run(prompt[None, :half])
        second, _ = session.run(prompt[None, half:], part)
        decoded = [whole[:, -1]]
        for token in tokens[:-1]:
            out, cache = session.run(token.reshape(1, 1), cache)
            decoded.append(out[:, -1])
        own = np.concatenate(decoded)
        equal += int(np.cumprod(own.argmax(-1) == tokens).sum())
        margin = steps.max(-1) - np.take_along_axis(steps, own.argmax(-1)[:, None], 1)[:, 0]
        pairs = {
            "prefill": (whole[0], logits),
            "chunked": (np.concatenate([first[0], second[0]]), logits),
            "decode": (own, steps),
            "greedy": (margin, np.zeros_like(margin)),
        }
        found = {kind: _worst(found[kind], *pair) for kind, pair in pairs.items()}
    found["padded"] = _padded(session, answers)
    found = {kind: value / answers.unit for kind, value in found.items()}
    if answers.nll is not None:
        rows = answers.windows
        losses = [_nll(session.run(row[None])[0][0].astype(np.float32), row) for row in rows]
        found["nll"] = abs(float(np.mean(losses)) - answers.nll)
    return found, equal


def _padded(session: Session, answers: Answers) -> float:
    """Prompts of unequal lengths in one batch, padded on the right, and one token more."""
    lengths = np.array([len(prompt) for prompt in answers.prompts])
    ids = np.zeros((len(lengths), lengths.max()), np.int64)
    for row, prompt in zip(ids, answers.prompts, strict=True):
        row[: len(prompt)] = prompt
    columns = np.arange(lengths.max() + 1)
    mask = (columns[:-1] < lengths[:, None]).astype(np.int64)
    logits, cache = session.run(ids, mask=mask)
    longer = (columns <= lengths[:, None]).astype(np.int64)
    if session.appends:
        longer = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    first = np.array([tokens[:1] for tokens in answers.greedy])
    steps, _ = session.run(first, cache, longer)
    worst = 0.0
    for row, n in enumerate(lengths):
        worst = _worst(worst, logits[row, :n], answers.logits[row])
        if len(answers.steps[row]) > 1:
            worst = _worst(worst, steps[row, 0], answers.steps[row][1])
    return worst


def _worst(before: float, a: np.ndarray, b: np.ndarray) -> float:
    """The larger of `before` and max |a - b|; NaN stays NaN."""
    return float(np.maximum(before, np.abs(a.astype(np.float32) - b).max()))


def _nll(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood of tokens (T,) by logits (T, V)."""
    logits = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
    return float(np.mean(np.log(np.exp(logits).sum(-1)) - chosen))
