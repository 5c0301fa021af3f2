"""The gate of every export: torch, the reloaded safetensors and the ONNX graph say the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor import progress
from compressor.checkpoint import Checkpoint
from compressor.decoder import Decoder
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
class Questions:
    """What torch and every session are asked.

    Attributes:
        prompts: token ids (N, S).
        window: (1, T) held-out tokens, or (0, T) without any.
        count: greedy tokens behind each prompt.
    """

    prompts: np.ndarray
    window: np.ndarray
    count: int


@dataclass(frozen=True)
class Replies:
    """What a session says, every logit of it as float32.

    Attributes:
        prompts: of the prompts (N, S, V), the first alone, the others as a batch.
        steps: (N, count, V) behind each prompt, token by token through the cache.
        tokens: (N, count) that it was fed there: its own greedy ones, or those given.
        chunked: of the first prompt in two parts through the cache (1, S, V).
        padded: of all prompts, cut to unequal lengths in one batch that is padded on the right,
            each (n + 1, V): n tokens at once, and one more.
        nll: mean negative log-likelihood of the window.
    """

    prompts: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray
    chunked: np.ndarray
    padded: list[np.ndarray]
    nll: float | None


@dataclass(frozen=True)
class Answers:
    """What torch says in one forward, without a cache.

    Attributes:
        tokens: (N, S + count), the prompts and what a session chose behind them.
        logits: of all of them (N, S + count, V).
        unit: standard deviation of the logits of the prompts.
        nll: mean negative log-likelihood of the window.
    """

    tokens: np.ndarray
    logits: np.ndarray
    unit: float
    nll: float | None


def questions(config: Any, tokens: Tensor | None, count: int) -> Questions:
    """Prompts (3, S) and a held-out window (1, T), from `tokens` (N, T) or at random without one.

    Where the model has a sliding window, the prompts are longer than it.
    """
    length, window = max(LENGTHS), getattr(config, "sliding_window", None) or 0
    if 0 < window < _LONGEST_PROMPT:
        length = max(length, min(window + 16, config.max_position_embeddings - 64))
    if tokens is None or len(tokens) < len(LENGTHS) or tokens.shape[1] < length:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(config.vocab_size, (len(LENGTHS), length), generator=generator)
        return Questions(rows.numpy(), rows[:0].numpy(), count)
    prompts, held_out = tokens[: len(LENGTHS), :length], tokens[-1:, :_WINDOW]
    return Questions(prompts.numpy(), held_out.numpy(), count)


def reference(folder: Path, head_bits: int | None = None) -> Any:
    """The checkpoint in transformers, float32; integers are read by our own reader.

    `head_bits` rounds the head, and with it a tied embedding, as the export does.
    """
    model = load_model(folder)
    _round_head(model, head_bits)
    return model


def ask(session: Session, asked: Questions, tokens: np.ndarray | None = None) -> Replies:
    """What a session says; behind prompts it reads its own greedy tokens or `tokens` (N, count)."""
    prompts, steps = [], []
    with progress.task("onnxruntime", 2 * asked.count + 4) as bar:
        for rows in (slice(0, 1), slice(1, None)):
            whole, cache = session.run(asked.prompts[rows])
            prompts.append(whole)
            said = [whole[:, -1]]
            while len(said) < asked.count:
                bar.advance()
                column = said[-1].argmax(-1) if tokens is None else tokens[rows, len(said) - 1]
                out, cache = session.run(column[:, None], cache)
                said.append(out[:, -1])
            bar.advance()
            steps.append(np.stack(said, 1))
        decoded = np.concatenate(steps)
        tokens = decoded.argmax(-1) if tokens is None else tokens
        chunked = _chunked(session, asked)
        bar.advance(2)
        padded = _padded(session, asked, tokens)
        bar.advance()
        losses = [_nll(session.run(row[None])[0][0], row) for row in asked.window]
        bar.advance()
    nll = losses[0] if losses else None
    return Replies(np.concatenate(prompts), decoded, tokens, chunked, padded, nll)


@torch.inference_mode()
def answer(folder: Path, head_bits: int | None, asked: Questions, tokens: np.ndarray) -> Answers:
    """What torch says of the prompts with the `tokens` (N, count) behind them, and of the window.

    A dense checkpoint is loaded by transformers alone, so that a fault of our reader shows; the
    integers of others nothing else reads as they are, and one block of them is in memory at a time.
    """
    known = np.concatenate([asked.prompts, tokens], 1)
    rows = [torch.from_numpy(each) for each in (known, asked.window) if len(each)]
    if Checkpoint(folder).quantized:
        said = _streamed(folder, head_bits, rows)
    else:
        model = reference(folder, head_bits)
        calls = progress.track(rows, "torch", len(rows))
        said = (model(each, use_cache=False).logits for each in calls)
    logits = next(said).float().numpy()
    losses = [_nll(each[0].float().numpy(), asked.window[0]) for each in said]
    unit = float(np.std(logits[:, : asked.prompts.shape[1]]))
    return Answers(known, logits, unit, losses[0] if losses else None)


def _streamed(folder: Path, head_bits: int | None, rows: list[Tensor]) -> Iterator[Tensor]:
    """Logits (B, T, V) of each of `rows` (B, T), block by block."""
    decoder = Decoder(folder)
    _round_head(decoder.model, head_bits)
    streams = [decoder.embed(each) for each in rows]
    for index in progress.track(range(len(decoder.blocks)), "torch", len(decoder.blocks)):
        with decoder.resident(index):
            streams = [decoder.run(index, x) for x in streams]
    return map(decoder.logits, streams)


def _round_head(model: Any, head_bits: int | None) -> None:
    if head_bits:
        weight = model.get_output_embeddings().weight
        weight.data = round_to_nearest(weight.data, head_bits).dequantize()


def differences(said: Replies, answers: Answers) -> tuple[dict[str, float], int]:
    """Largest difference of each kind, in standard deviations of the logits; equal tokens.

    `prefill`, `decode`, `chunked` and `padded` are the parts of `Replies`; `greedy` is how far
    below the likeliest token the graph's own choice ever was; `nll` in nats per token. Equal greedy
    tokens are counted up to the first that is not: until there the graph, running free, and torch
    read the same tokens.
    """
    length, count = said.prompts.shape[1], said.steps.shape[1]
    steps = answers.logits[:, length - 1 : -1]
    chosen, likeliest = said.steps.argmax(-1), steps.argmax(-1)
    right = (chosen == likeliest) & np.insert(said.tokens == likeliest, 0, True, 1)[:, :count]
    margin = steps.max(-1) - np.take_along_axis(steps, chosen[..., None], 2)[..., 0]
    padded = [
        _worst(own, known[: len(own)])
        for own, known in zip(said.padded, answers.logits, strict=True)
    ]
    found = {
        "prefill": _worst(said.prompts, answers.logits[:, :length]),
        "decode": _worst(said.steps, steps),
        "greedy": _worst(margin, np.zeros_like(margin)),
        "chunked": _worst(said.chunked, answers.logits[:1, :length]),
        "padded": float(np.max(padded)),
    }
    found = {kind: value / answers.unit for kind, value in found.items()}
    if said.nll is not None and answers.nll is not None:
        found["nll"] = abs(said.nll - answers.nll)
    return found, int(np.cumprod(right, axis=1).sum())


def _chunked(session: Session, asked: Questions) -> np.ndarray:
    prompt = asked.prompts[:1]
    half = prompt.shape[1] // 2
    first, cache = session.run(prompt[:, :half])
    second, _ = session.run(prompt[:, half:], cache)
    return np.concatenate([first, second], 1)


def _padded(session: Session, asked: Questions, tokens: np.ndarray) -> list[np.ndarray]:
    width = asked.prompts.shape[1]
    lengths = np.array([width, *LENGTHS[1:]])
    columns = np.arange(width + 1)
    mask = (columns[:-1] < lengths[:, None]).astype(np.int64)
    logits, cache = session.run(asked.prompts * mask, mask=mask)
    longer = (columns <= lengths[:, None]).astype(np.int64)
    if session.appends:
        longer = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    known = np.concatenate([asked.prompts, tokens[:, :1]], axis=1)
    after, _ = session.run(np.take_along_axis(known, lengths[:, None], 1), cache, longer)
    return [np.concatenate([logits[row, :n], after[row]]) for row, n in enumerate(lengths)]


def _worst(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b|; NaN stays NaN."""
    return float(np.abs(a - b).max())


def _nll(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood of tokens (T,) by logits (T, V), which it overwrites."""
    logits = logits[:-1]
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
    return float(np.mean(np.log(np.exp(logits, out=logits).sum(-1)) - chosen))
