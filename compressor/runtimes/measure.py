"""Timing a runtime: a prompt and a generation, whatever runs them.

Run as a module it measures one target in a process of its own, so that its peak memory is that
of this model in this runtime and nothing else (`bench.py` starts it).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressError, InferenceError
from compressor.memory import peak
from compressor.runtimes import Target
from compressor.runtimes.base import Facts, Runtime
from compressor.runtimes.counters import joules, seconds_waited

_WARM_STEPS = 4


@dataclass
class Rounds:
    """Seconds of repeated rounds of a prompt and a generation, batch 1.

    Attributes:
        first: from the prompt to its first token, of the first request after loading.
        prefill, decode: of each round after that, the prompt and the `new_tokens` behind it.
        joules: of each decode, where the machine tells.
        waited: seconds of all rounds in which other work had the processor.
        cache_bytes: keys and values at the end of a round.
    """

    prompt_tokens: int
    new_tokens: int
    first: float = 0.0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    waited: float = 0.0
    cache_bytes: int = 0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rates(tokens: int, seconds: Sequence[float]) -> dict[str, float]:
    """Tokens/s: median, least and most of `tokens` over each of `seconds`."""
    return spread([tokens / each for each in seconds])


def check_room(facts: Facts, tokens: int) -> None:
    """Raise `InferenceError` when a round of this many tokens does not fit into the context."""
    if facts.context and tokens > facts.context:
        raise InferenceError(
            f"a round of {tokens} tokens does not fit into the model's context of "
            f"{facts.context}; ask for a shorter prompt or fewer new tokens"
        )


def time_rounds(runtime: Runtime, *, prompt_tokens: int, new_tokens: int, repeats: int) -> Rounds:
    """Time `repeats` rounds on a fixed random prompt, greedy, after the first request warmed up.

    Raises `InferenceError` when prompt and generation do not fit into the context.
    """
    check_room(runtime.facts, prompt_tokens + new_tokens)
    prompt = np.random.default_rng(0).integers(runtime.facts.vocabulary, size=prompt_tokens)
    rounds = Rounds(prompt_tokens, new_tokens)
    rounds.first, _, _ = _round(runtime, prompt.tolist(), min(_WARM_STEPS, new_tokens))
    before = seconds_waited()
    for _ in range(repeats):
        prefill, decode, energy = _round(runtime, prompt.tolist(), new_tokens)
        rounds.prefill.append(prefill)
        rounds.decode.append(decode)
        if energy is not None:
            rounds.joules.append(energy)
    rounds.waited = seconds_waited() - before
    rounds.cache_bytes = runtime.cache_bytes
    return rounds


def measure(
    target: Target, *, device: str, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Prefill and decode tokens/s of a folder in this process, and its seconds to load."""
    began = time.perf_counter()
    runtime = target.open(device)
    load_seconds = time.perf_counter() - began
    settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    rounds = time_rounds(runtime, **settings)
    return {
        "prefill": rates(prompt_tokens, rounds.prefill),
        "decode": rates(new_tokens, rounds.decode),
        "load_seconds": load_seconds,
        **settings,
    }


def _round(
    runtime: Runtime, prompt: list[int], new_tokens: int
) -> tuple[float, float, float | None]:
    """Seconds to the first token of `prompt`; seconds and joules of the `new_tokens` behind it."""
    runtime.rewind(0)
    began = time.perf_counter()
    token = int(runtime.prefill(prompt).argmax())
    middle, before = time.perf_counter(), joules()
    for _ in range(new_tokens):
        token = int(runtime.step(token).argmax())
    ended, after = time.perf_counter(), joules()
    energy = None if before is None or after is None or after < before else after - before
    return middle - began, ended - middle, energy


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """What `bench.py` asks of a fresh process, and its answer."""
    target = Target(Path(asked["folder"]), asked["runtime"])
    began = time.perf_counter()
    runtime = target.open(asked["device"], asked["threads"])
    loaded = time.perf_counter() - began
    rounds = time_rounds(runtime, **asked["rounds"])
    return {
        "device": runtime.device,
        "load_seconds": loaded,
        "peak_bytes": peak(),
        **dataclasses.asdict(rounds),
    }


if __name__ == "__main__":
    try:
        answer = main(json.loads(sys.argv[1]))
    except CompressError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
