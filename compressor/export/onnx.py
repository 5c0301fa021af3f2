"""Exporting a checkpoint: folders written, loaded back and compared before they count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from compressor.checkpoint import Checkpoint
from compressor.dense import DenseReader
from compressor.errors import ExportError
from compressor.export import ExportParams
from compressor.export.decoder_graph import build
from compressor.export.session import Session

_PROMPTS, _LENGTH = 2, 24
_TOLERANCE = {"float32": 2e-3, "float16": 0.25}
"""Largest accepted logit difference: about 100 times what float32 and float16 sums differ by."""


def export(source: Path, out: Path, params: ExportParams) -> dict[str, Any]:
    """Write the asked formats into `out` and prove that they are the same model.

    `safetensors/` is the checkpoint as it is, tensors in their own dtype; `onnx/` holds the
    graph with the tokenizer, generation config and config beside it.
    Raises `ExportError` when torch and onnxruntime disagree.
    """
    metrics: dict[str, Any] = {"formats": list(params.formats)}
    if "safetensors" in params.formats:
        shutil.copytree(source, out / "safetensors", ignore=shutil.ignore_patterns("manifest.json"))
    if "onnx" in params.formats:
        folder = out / "onnx"
        folder.mkdir()
        dtype = torch.float16 if params.onnx_dtype == "float16" else torch.float32
        build(source, DenseReader(source), folder, dtype)
        checkpoint = Checkpoint(source)
        for path in [*checkpoint.side_files, source / "config.json"]:
            shutil.copyfile(path, folder / path.name)
        size = sum(p.stat().st_size for p in folder.iterdir())
        parity = compare(source, folder, params)
        blocks = checkpoint.config["num_hidden_layers"]
        metrics["onnx"] = {"bytes": size, "blocks": blocks, "parity": parity}
    return metrics


def compare(source: Path, folder: Path, params: ExportParams) -> dict[str, Any]:
    """Torch against onnxruntime on seeded prompts, both in the graph's dtype (torch in float32).

    Checks the logits of a prompt at once, of the same prompt in two chunks through the
    cache, and greedy tokens. Raises `ExportError` naming the check that failed.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # compare every token, also behind an end of text
    session = Session(folder)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (_PROMPTS, _LENGTH), generator=generator)
    with torch.inference_mode():
        expected = model(prompts).logits.numpy()
        greedy = [
            model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=params.check_tokens,
                do_sample=False,
            )[0, _LENGTH:].tolist()
            for prompt in prompts
        ]
    ids = prompts.numpy()
    whole, _ = session.run(ids)
    chunked = np.concatenate([_in_chunks(session, row[None]) for row in ids])
    differences = {"prefill": _largest(whole, expected), "chunked": _largest(chunked, expected)}
    tolerance = _TOLERANCE[params.onnx_dtype]
    for name, difference in differences.items():
        if not difference <= tolerance:
            raise ExportError(
                f"ONNX and torch disagree on {name} logits by {difference:.2e} (tolerance "
                f"{tolerance:.0e}); please report this model's config.json"
            )
    ours = [session.generate(row[None], params.check_tokens) for row in ids]
    equal = sum(
        a == b for x, y in zip(ours, greedy, strict=True) for a, b in zip(x, y, strict=True)
    )
    total = _PROMPTS * params.check_tokens
    if params.onnx_dtype == "float32" and equal < total:
        raise ExportError(f"only {equal} of {total} greedy tokens of ONNX equal those of torch")
    largest = max(differences.values())
    return {
        "logit_difference": differences,
        "greedy_equal": equal,
        "greedy_tokens": total,
        "providers": session.providers,
        "summary": f"largest logit difference {largest:.1e}, {equal} of {total} greedy tokens same",
    }


def _in_chunks(session: Session, ids: np.ndarray) -> np.ndarray:
    """Logits of a prompt in two parts; GroupQueryAttention continues only a batch of one."""
    first, cache = session.run(ids[:, : _LENGTH // 2])
    second, _ = session.run(ids[:, _LENGTH // 2 :], cache)
    return np.concatenate([first, second], axis=1)


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float32) - b).max())
