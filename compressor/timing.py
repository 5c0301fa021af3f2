"""Time a prompt and a generation, whatever runs them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def tokens_per_second(
    run: Callable[[], object], tokens: int, repeats: int
) -> dict[str, float | int]:
    """Median, least and most tokens/s of `run`, which handles `tokens` tokens; one warm-up."""
    run()
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        rates.append(tokens / (time.perf_counter() - began))
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def speed(
    prefill: Callable[[], object],
    decode: Callable[[], object],
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Prefill and decode rates; `decode` generates `new_tokens` after a cached prompt."""
    return {
        "prefill": tokens_per_second(prefill, prompt_tokens, repeats),
        "decode": tokens_per_second(decode, new_tokens, repeats),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
