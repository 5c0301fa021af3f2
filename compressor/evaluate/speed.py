"""Speed by plain transformers, the runtime that every checkpoint here must load in."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from compressor.shallow import register
from compressor.timing import speed

register()


def measure(
    folder: Path, *, prompt_tokens: int, new_tokens: int, repeats: int, device: str
) -> dict[str, Any]:
    """Prefill and decode tokens/s of a checkpoint with its KV cache, batch 1, and seconds to load.

    Computes in float32 on the CPU and in the checkpoint's own dtype on a GPU.
    """
    dtype = torch.float32 if device == "cpu" else "auto"
    began = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    load_seconds = time.perf_counter() - began
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(device)
    cache = DynamicCache(config=model.config)

    def prefill() -> None:
        model(prompt, use_cache=True, logits_to_keep=1)
        _synchronize(device)

    def decode() -> None:
        past, token = copy.deepcopy(cache), prompt[:, -1:]
        for _ in range(new_tokens):
            token = model(token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
        _synchronize(device)

    with torch.inference_mode():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        rates = speed(
            prefill,
            decode,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
        )
    return rates | {"load_seconds": load_seconds}


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
