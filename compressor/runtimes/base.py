"""What every runtime does: read tokens, give the next token's logits, remember."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import InferenceError
from compressor.families import native_config

CHUNK = 512
"""Tokens read at once: a graph gives the logits of all of them, so this bounds its memory."""

_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class Facts:
    """What a folder says of its model, whatever runs it.

    Attributes:
        vocabulary: how many tokens there are.
        context: the most tokens it reads, None where the folder does not say.
        eos: the tokens that end an answer.
        shared_cache: whether a graph writes new keys and values into the buffer of the old ones.
    """

    vocabulary: int
    context: int | None
    eos: frozenset[int]
    shared_cache: bool = False

    @classmethod
    def of(cls, folder: Path) -> Facts:
        """Read `config.json`, `generation_config.json` and `genai_config.json`, those there are."""
        config = native_config(_json(folder / "config.json"))
        genai = _json(folder / "genai_config.json")
        model = genai.get("model", {})
        ends = [c.get("eos_token_id") for c in (config, _json(folder / "generation_config.json"))]
        ends.append(model.get("eos_token_id"))
        flat = [e for end in ends for e in (end if isinstance(end, list) else [end])]
        vocabulary = config.get("vocab_size") or model.get("vocab_size")
        if not vocabulary:
            raise InferenceError(
                f"{folder}: neither config.json nor genai_config.json, or no "
                "vocab_size in them; give the folder that holds the model"
            )
        lengths = [config[name] for name in _CONTEXT if name in config]
        return cls(
            vocabulary,
            next(iter(lengths), model.get("context_length")),
            frozenset(int(end) for end in flat if end is not None),
            bool(genai.get("search", {}).get("past_present_share_buffer")),
        )


class Runtime(ABC):
    """A loaded model that reads one sequence and keeps its keys and values (KV cache).

    Attributes:
        name: `torch`, `onnxruntime` or `genai`.
        device: what it really runs on.
        facts: what the folder says of the model.
        tokens: the tokens that the cache holds.
    """

    name: str

    def __init__(self, facts: Facts) -> None:
        """Begin with an empty cache."""
        self.facts = facts
        self.device = "cpu"
        self.tokens: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Read tokens after those in the cache; float32 logits (V,) of what comes next.

        Raises `InferenceError` when they do not fit into the model's context.
        """
        limit, total = self.facts.context, len(self.tokens) + len(tokens)
        if limit and total > limit:
            raise InferenceError(
                f"{total} tokens, but the model's context is {limit}; shorten the prompt"
            )
        if not tokens:
            raise InferenceError("the prompt has no tokens; give some text")
        for begin in range(0, len(tokens), CHUNK):
            chunk = list(tokens[begin : begin + CHUNK])
            logits = self._forward(chunk)
            self.tokens += chunk
        return logits

    def step(self, token: int) -> np.ndarray:
        """Read one token more; float32 logits (V,) of what comes next."""
        return self.prefill([token])

    def keep(self, tokens: Sequence[int]) -> int:
        """Rewind to what the cache has in common with the beginning of `tokens`; its length.

        At least one token is left to read, since only reading gives logits.
        """
        pairs = enumerate(zip(self.tokens, tokens, strict=False))
        differ = (i for i, (ours, asked) in pairs if ours != asked)
        self.rewind(next(differ, min(len(self.tokens), max(len(tokens) - 1, 0))))
        return len(self.tokens)

    def rewind(self, length: int) -> None:
        """Forget what stands behind the first `length` tokens; all, where the cache cannot be cut.

        A sliding window that has moved on no longer holds what a shorter sequence would see.
        """
        if length < len(self.tokens):
            self.tokens = self.tokens[: length if self._cut(length) else 0]

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of keys and values that a step reads."""

    @abstractmethod
    def _forward(self, tokens: list[int]) -> np.ndarray:
        """Append tokens to the cache; float32 logits (V,) after the last."""

    @abstractmethod
    def _cut(self, length: int) -> bool:
        """Keep the first `length` tokens of the cache, or empty it and return False."""


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty without a file. Imports no torch, as `checkpoint.read_json` does."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InferenceError(f"{path}: not valid JSON ({error})") from error
    return value if isinstance(value, dict) else {}
