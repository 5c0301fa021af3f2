"""Evaluate: what a checkpoint costs in quality, bytes and time."""

from __future__ import annotations

from pydantic import Field

from compressor.methods import Method, Params


class EvaluateParams(Params):
    """What is measured of every checkpoint of a run."""

    speed: bool = Field(True, description="time prefill and decode with plain transformers")
    prompt_tokens: int = Field(128, gt=1, description="tokens of the timed prompt")
    new_tokens: int = Field(32, gt=1, description="tokens of the timed generation")
    repeats: int = Field(3, gt=0, description="timed repetitions after one warm-up")


METHODS = {
    "quality": Method(
        "compressor.evaluate.quality:evaluate",
        EvaluateParams,
        "perplexity, KL, top-1 agreement and added loss by window, bytes, tokens/s",
        "perplexity as exp of the mean next-token loss over disjoint full windows",
        "1 forward, and a timed generation",
        ("evaluation",),
        version=3,
    ),
}
