"""Published healing settings by model, for `heal.preset`; what is given explicitly wins."""

from __future__ import annotations

from typing import Any

_GROMOV = {"dropout": 0.05, "targets": "ffn", "steps": 5000, "batch_size": 16, "warmup_steps": 100}

PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {**_GROMOV, "learning_rate": 3e-4, "rank": 2},
    "llama-2-13b": {**_GROMOV, "learning_rate": 3e-4, "rank": 64},
    "llama-2-70b": {**_GROMOV, "learning_rate": 3e-5, "rank": 8},
    "qwen-7b": {**_GROMOV, "learning_rate": 3e-4, "rank": 64},
    "qwen-14b": {**_GROMOV, "learning_rate": 3e-4, "rank": 64},
    "mistral-7b": {**_GROMOV, "learning_rate": 3e-6, "rank": 4},
    "phi-2": {**_GROMOV, "learning_rate": 2e-4, "rank": 64},
    "shortened-llama": {
        "learning_rate": 1e-4, "rank": 8, "alpha": 16.0, "targets": "all", "batch_size": 64,
    },
}  # fmt: skip
"""The first seven are arXiv:2403.17887 appendix A.1 (windows of 2048 tokens; 4096 for
llama-2-13b, llama-2-70b and qwen-14b), the last is Shortened LLaMA's script (arXiv:2402.02834;
two passes over Alpaca)."""
