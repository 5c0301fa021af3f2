"""A shallow model as the draft of its parent: what assisted generation accepts, and its speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from compressor import progress
from compressor.errors import DraftError
from compressor.model import load_tokenizer
from compressor.shallow import register

register()


@dataclass
class Rounds:
    """The rounds of assisted generations: in each the draft proposes and the parent checks.

    Attributes:
        drafted: tokens proposed in each round.
        accepted: how many of them were the parent's own choice.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Accepted over drafted tokens."""
        return sum(self.accepted) / max(sum(self.drafted), 1)

    @property
    def chance(self) -> float:
        """How likely a token is accepted once those before it in its round were.

        The maximum-likelihood estimate of a in `tokens_per_round`: accepted over examined tokens,
        where a round examines what it accepts and the first that it does not. It is higher than
        `acceptance`, which also counts what stood behind a refused token.
        """
        pairs = zip(self.drafted, self.accepted, strict=True)
        refused = sum(accepted < drafted for drafted, accepted in pairs)
        return sum(self.accepted) / max(sum(self.accepted) + refused, 1)


def tokens_per_round(chance: float, draft_tokens: int) -> float:
    """Expected tokens of a round, (1 - a^(g + 1)) / (1 - a), the parent's own one included.

    `chance` is a, the probability that one more token is accepted, the same for all; g is
    `draft_tokens`. Leviathan et al. 2023, arXiv:2211.17192, equation 1.
    """
    if chance == 1.0:
        return draft_tokens + 1.0
    return float((1 - chance ** (draft_tokens + 1)) / (1 - chance))


def predicted_speedup(chance: float, draft_tokens: int, cost: float) -> float:
    """Tokens of a round over its price in parent steps, g c + 1.

    `cost` is c, the time of a draft token in times of a parent token. arXiv:2211.17192,
    theorem 3.8.
    """
    return tokens_per_round(chance, draft_tokens) / (draft_tokens * cost + 1)


def load(folder: Path, parent: Path, device: str) -> tuple[Any, Any]:
    """A draft and its parent in transformers: float32 on the CPU, their own dtype on a GPU.

    Raises `DraftError` when they do not share a vocabulary.
    """
    if load_tokenizer(folder).get_vocab() != load_tokenizer(parent).get_vocab():
        raise DraftError(
            f"{folder}: its tokenizer is not that of {parent}; a draft must be made from its parent"
        )
    dtype = torch.float32 if device == "cpu" else "auto"
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        for path in (folder, parent)
    ]
    return models[0], models[1]


@torch.inference_mode()
def measure(
    draft: Any, parent: Any, prompts: Sequence[Tensor], *, draft_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Greedy assisted generation against the parent alone, prompt by prompt (S,), batch 1.

    Every round drafts `draft_tokens`; the draft is also timed alone, which gives its cost. Each
    of the three generates up to `new_tokens` of every prompt, in turn.
    Raises `DraftError` when the text is not the parent's own, token by token.
    """
    draft.generation_config.num_assistant_tokens = draft_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    rounds = Rounds()
    clock: dict[str, list[tuple[int, float]]] = {"parent": [], "draft": [], "assisted": []}
    _generate(parent, prompts[0], 2, assistant_model=draft)  # warm-up
    for index, prompt in enumerate(progress.track(prompts, "draft", len(prompts))):
        own, seconds = _generate(parent, prompt, new_tokens)
        clock["parent"].append((len(own), seconds))
        alone, seconds = _generate(draft, prompt, new_tokens)
        clock["draft"].append((len(alone), seconds))
        with _watched(draft, rounds) as streamer:
            text, seconds = _generate(
                parent, prompt, new_tokens, assistant_model=draft, streamer=streamer
            )
        clock["assisted"].append((len(text), seconds))
        _check_equal(text, own, index)
    per_token = {name: _per_token(times) for name, times in clock.items()}
    cost = per_token["draft"] / per_token["parent"]
    return {
        "prompts": len(prompts),
        "new_tokens": sum(count for count, _ in clock["parent"]),
        "draft_tokens": draft_tokens,
        "rounds": len(rounds.drafted),
        "drafted": sum(rounds.drafted),
        "accepted": sum(rounds.accepted),
        "acceptance": rounds.acceptance,
        "chance": rounds.chance,
        "mean_accepted": sum(rounds.accepted) / max(len(rounds.accepted), 1),
        "cost": cost,
        "speedup": per_token["parent"] / per_token["assisted"],
        "predicted_speedup": predicted_speedup(rounds.chance, draft_tokens, cost),
        "tokens_per_second": {name: _rates(times) for name, times in clock.items()},
        "threads": torch.get_num_threads(),
    }


class _Streamer(BaseStreamer):
    """Gets the prompt first, then the tokens of every round: what was accepted, and one more."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def put(self, value: Tensor) -> None:
        self.lengths.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


@contextmanager
def _watched(draft: Any, rounds: Rounds) -> Iterator[_Streamer]:
    """Count in the generation itself: a forward of the draft is a drafted token."""
    streamer = _Streamer()
    forwards: list[int] = []  # the round that each belongs to
    handle = draft.register_forward_hook(lambda *_: forwards.append(len(streamer.lengths)))
    try:
        yield streamer
    finally:
        handle.remove()
    for index, length in enumerate(streamer.lengths[1:], start=1):
        rounds.drafted.append(forwards.count(index))
        rounds.accepted.append(length - 1)


def _generate(model: Any, prompt: Tensor, new_tokens: int, **how: Any) -> tuple[list[int], float]:
    """Greedy tokens after a prompt, and the seconds they took, its prefill included."""
    ids = prompt[None].to(model.device)
    began = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        **how,
    )
    tokens = out[0, len(prompt) :].tolist()
    return tokens, time.perf_counter() - began


def _check_equal(text: list[int], own: list[int], prompt: int) -> None:
    if text == own:
        return
    pairs = enumerate(zip(text, own, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(own)))
    raise DraftError(
        f"prompt {prompt + 1}: assisted generation leaves the parent's own text at new token "
        f"{place + 1} (got {text[place : place + 1]}, expected {own[place : place + 1]}); two "
        "tokens are tied there, or the parent computes a batch of tokens differently: use float32"
    )


def _per_token(times: Sequence[tuple[int, float]]) -> float:
    return sum(seconds for _, seconds in times) / sum(count for count, _ in times)


def _rates(times: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Tokens/s over all prompts, and those of the slowest and the fastest prompt."""
    rates = [count / seconds for count, seconds in times]
    return {"all": 1 / _per_token(times), "min": min(rates), "max": max(rates)}
