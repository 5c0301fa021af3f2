"""Exporting a checkpoint: folders written, loaded back and compared before they count."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.checkpoint import Checkpoint, write_json
from compressor.dense import DenseReader
from compressor.errors import ExportError, NotEmitted
from compressor.export import ExportParams
from compressor.export.decoder_graph import Built, build
from compressor.export.genai import write_config
from compressor.export.nbits import CONTAINER, check_widths
from compressor.export.parity import (
    TOLERANCE,
    Answers,
    ask,
    differences,
    questions,
    reference,
)
from compressor.export.probe import first_difference, probed
from compressor.export.traced import trace
from compressor.families import legacy_rope
from compressor.layouts import Packed
from compressor.runtimes.session import Session

log = logging.getLogger(__name__)


def export(
    source: Path, out: Path, params: ExportParams, tokens: Tensor | None = None
) -> dict[str, Any]:
    """Write the asked formats into `out` and prove that they are the same model.

    `safetensors/` is the checkpoint as it is, tensors in their own dtype; `onnx/` holds the
    graph with the tokenizer, generation config, config and `genai_config.json` beside it.
    Both configs give rotary parameters by their old names too.
    `tokens` (N, T) are held-out windows; without them prompts are random.
    Raises `ExportError` when torch, the safetensors and the graph disagree, naming the place.
    """
    metrics: dict[str, Any] = {"formats": list(params.formats)}
    checkpoint = Checkpoint(source)
    raw = checkpoint.config | legacy_rope(checkpoint.config)
    if "onnx" in params.formats and checkpoint.shares:
        raise ExportError(
            f"{source}: some sublayers run with another block's weights, which the graph does not "
            "hold yet; export safetensors only, or prune without re-use"
        )
    if "onnx" in params.formats:
        folder = out / "onnx"
        folder.mkdir()
        graph, built = _graph(source, folder, params)
        for path in checkpoint.side_files:
            shutil.copyfile(path, folder / path.name)
        write_json(folder / "config.json", raw)
        config = AutoConfig.from_pretrained(source).get_text_config()
        write_config(folder, config, built.caches, in_place=graph == "emitted")
        metrics["onnx"] = {
            "bytes": sum(p.stat().st_size for p in folder.iterdir()),
            "graph": graph,
            "blocks": config.num_hidden_layers,
            "container_bytes": built.container_bytes,
            "nominal_bytes": built.nominal_bytes,
        }
    if "safetensors" in params.formats:
        shutil.copytree(source, out / "safetensors", ignore=shutil.ignore_patterns("manifest.json"))
        write_json(out / "safetensors/config.json", raw)
    if "onnx" in params.formats:
        metrics["onnx"]["parity"] = compare(source, out, params, tokens)
    return metrics


def _graph(source: Path, folder: Path, params: ExportParams) -> tuple[str, Built]:
    """Emit the graph where the family allows it, else trace it."""
    check_widths({CONTAINER[layout.bits] for _, layout in DenseReader(source).layouts})
    dtype, level = getattr(torch, params.onnx_dtype), params.accuracy_level
    if params.graph != "traced":
        try:
            return "emitted", build(source, folder, dtype, level, params.head_bits)
        except NotEmitted as reason:
            if params.graph == "emitted":
                raise
            log.warning("%s; it is traced instead, which takes minutes", reason)
    if params.head_bits:
        raise ExportError("head_bits: only in an emitted graph; set export.head_bits to null")
    return "traced", trace(reference(source), source, folder, dtype, level)


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
    if params.accuracy_level:
        with probed(folder) as session:
            report["accuracy_level_0"], _ = differences(session, answers)
    session = Session(folder)
    report[f"accuracy_level_{params.accuracy_level}"], equal = differences(session, answers)
    for level in sorted({0, params.accuracy_level}):
        tolerance = TOLERANCE[params.onnx_dtype, level]
        found = report[f"accuracy_level_{level}"]
        failed = {kind: value for kind, value in found.items() if not value <= tolerance}
        if failed:
            raise ExportError(_failure(source, folder, params, level, failed, prompts[-1]))
    total = sum(map(len, answers.greedy))
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
