"""Exporting a checkpoint: folders written, loaded back and compared before they count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.checkpoint import Checkpoint
from compressor.dense import DenseReader
from compressor.errors import ExportError
from compressor.export import ExportParams
from compressor.export.decoder_graph import build
from compressor.export.genai import write_config
from compressor.export.parity import (
    TOLERANCE,
    Answers,
    agreement,
    ask,
    differences,
    questions,
    reference,
)
from compressor.export.probe import first_difference, probed
from compressor.export.session import Session
from compressor.families import native_config
from compressor.layouts import Packed


def export(
    source: Path, out: Path, params: ExportParams, tokens: Tensor | None = None
) -> dict[str, Any]:
    """Write the asked formats into `out` and prove that they are the same model.

    `safetensors/` is the checkpoint as it is, tensors in their own dtype; `onnx/` holds the
    graph with the tokenizer, generation config, config and `genai_config.json` beside it.
    `tokens` (N, T) are held-out windows; without them prompts are random.
    Raises `ExportError` when torch, the safetensors and the graph disagree, naming the place.
    """
    metrics: dict[str, Any] = {"formats": list(params.formats)}
    checkpoint = Checkpoint(source)
    if "onnx" in params.formats and checkpoint.shares:
        raise ExportError(
            f"{source}: some sublayers run with another block's weights, which the graph does not "
            "hold yet; export safetensors only, or prune without re-use"
        )
    if "onnx" in params.formats:
        folder = out / "onnx"
        folder.mkdir()
        dtype = getattr(torch, params.onnx_dtype)
        built = build(source, folder, dtype, params.accuracy_level, params.head_bits)
        for path in [*checkpoint.side_files, source / "config.json"]:
            shutil.copyfile(path, folder / path.name)
        write_config(folder, native_config(checkpoint.config), built.caches)
        metrics["onnx"] = {
            "bytes": sum(p.stat().st_size for p in folder.iterdir()),
            "blocks": native_config(checkpoint.config)["num_hidden_layers"],
            "container_bytes": built.container_bytes,
            "nominal_bytes": built.nominal_bytes,
        }
    if "safetensors" in params.formats:
        shutil.copytree(source, out / "safetensors", ignore=shutil.ignore_patterns("manifest.json"))
    if "onnx" in params.formats:
        metrics["onnx"]["parity"] = compare(source, out, params, tokens)
    return metrics


def compare(
    source: Path, out: Path, params: ExportParams, tokens: Tensor | None = None
) -> dict[str, Any]:
    """Torch (float32) against the reloaded safetensors and against onnxruntime, one at a time.

    The graph is compared in its own arithmetic (accuracy_level 0) by a tight tolerance, then
    as it is shipped by that of its accuracy level. Raises `ExportError` naming the check that
    failed and the first module that differs.
    """
    model = reference(source, params.head_bits)
    prompts, windows = questions(model.config, tokens)
    answers = ask(model, prompts, windows, params.check_tokens)
    del model  # one copy of the weights at a time
    report: dict[str, Any] = {"unit": answers.unit}
    if "safetensors" in params.formats and not params.head_bits:
        report["safetensors"] = _reloaded(out / "safetensors", answers)
    folder = out / "onnx"
    levels = [0, params.accuracy_level] if params.accuracy_level else [0]
    for level in levels:
        found = _graph(folder, answers, exact=level == 0)
        report[f"accuracy_level_{level}"] = found
        tolerance = TOLERANCE[params.onnx_dtype, level]
        failed = {kind: value for kind, value in found.items() if not value <= tolerance}
        if failed:
            raise ExportError(_failure(source, folder, params, level, failed, prompts[-1]))
    session = Session(folder)
    equal, total = agreement(session, answers), sum(map(len, answers.greedy))
    largest = max(report["accuracy_level_0"].values())
    return report | {
        "greedy_equal": equal,
        "greedy_tokens": total,
        "providers": session.providers,
        "summary": f"largest logit difference {largest:.1e} standard deviations, "
        f"{equal} of {total} greedy tokens same",
    }


def _reloaded(folder: Path, answers: Answers) -> float | str:
    """Largest difference of the folder in plain transformers, in standard deviations."""
    layouts = [layout for _, layout in DenseReader(folder).layouts]
    if not all(isinstance(layout, Packed) and layout.symmetric for layout in layouts):
        return "not compared: transformers rounds asymmetric integers anew, or needs gptqmodel"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [model(torch.from_numpy(p)[None]).logits[0].numpy() for p in answers.prompts]
    pairs = zip(logits, answers.logits, strict=True)
    worst = max(float(np.abs(a - b).max()) for a, b in pairs) / answers.unit
    tolerance = TOLERANCE["float32", 0]
    if not worst <= tolerance:
        raise ExportError(
            f"{folder}: reloaded by transformers, its logits differ by {worst:.1e} standard "
            f"deviations (tolerance {tolerance:.0e}); please report this model's config.json"
        )
    return worst


def _graph(folder: Path, answers: Answers, *, exact: bool) -> dict[str, float]:
    if not exact:
        return differences(Session(folder), answers)
    with probed(folder) as session:
        return differences(session, answers)


def _failure(
    source: Path,
    folder: Path,
    params: ExportParams,
    level: int,
    failed: dict[str, float],
    prompt: Tensor,
) -> str:
    kind, value = next(iter(failed.items()))
    tolerance = TOLERANCE[params.onnx_dtype, level]
    said = (
        f"ONNX and torch disagree on {kind} by {value:.1e} (tolerance {tolerance:.0e}, in "
        "standard deviations of the logits)"
    )
    if level:
        return f"{said} with accuracy_level {level}, not with 0; set export.accuracy_level to 0"
    model = reference(source, params.head_bits)
    place = first_difference(model, folder, prompt[None], tolerance)
    return f"{said}; first at {place}; please report this model's config.json"
