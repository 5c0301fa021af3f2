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
from compressor.export.traits import traits_of
from compressor.families import legacy_rope
from compressor.layouts import Packed
from compressor.runtimes.session import CUDA, Session, load_onnxruntime

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
    checkpoint = Checkpoint(source)
    raw = checkpoint.config | legacy_rope(checkpoint.config)
    metrics: dict[str, Any] = {"formats": list(params.formats)}
    if "onnx" in params.formats:
        way = _way(checkpoint, params)
        folder = out / "onnx"
        folder.mkdir()
        built, answers = _graph(source, folder, params, way, tokens)
        for path in checkpoint.side_files:
            shutil.copyfile(path, folder / path.name)
        write_json(folder / "config.json", raw)
        config = AutoConfig.from_pretrained(source).get_text_config()
        cuda = params.onnx_dtype == "bfloat16"
        write_config(folder, config, built.caches, in_place=way == "emitted", cuda=cuda)
        metrics["onnx"] = {
            "bytes": sum(p.stat().st_size for p in folder.iterdir()),
            "graph": way,
            "blocks": config.num_hidden_layers,
            "container_bytes": built.container_bytes,
            "nominal_bytes": built.nominal_bytes,
        }
    if "safetensors" in params.formats:
        shutil.copytree(source, out / "safetensors", ignore=shutil.ignore_patterns("manifest.json"))
        write_json(out / "safetensors/config.json", raw)
    if "onnx" in params.formats:
        metrics["onnx"]["parity"] = compare(source, out, params, answers)
    return metrics


def _way(checkpoint: Checkpoint, params: ExportParams) -> str:
    """`emitted` where the family allows it, else `traced`; refuses what cannot become a graph."""
    source = checkpoint.folder
    if checkpoint.shares:
        raise ExportError(
            f"{source}: some sublayers run with another block's weights, which the graph does not "
            "hold yet; export safetensors only, or prune without re-use"
        )
    widths = {CONTAINER[layout.bits] for _, layout in DenseReader(source).layouts}
    widths |= {params.head_bits} if params.head_bits else set()
    check_widths(widths, params.accuracy_level)
    offered = load_onnxruntime().get_available_providers()
    if params.onnx_dtype == "bfloat16" and CUDA not in offered:
        raise ExportError(
            "onnx_dtype bfloat16: onnxruntime computes it on CUDA alone, and here it offers "
            f"{', '.join(offered)}; set export.onnx_dtype to float16, or export on a GPU"
        )
    if params.graph != "traced":
        try:
            traits_of(AutoConfig.from_pretrained(source))
        except NotEmitted as reason:
            if params.graph == "emitted":
                raise
            log.warning("%s; it is traced instead, which takes minutes", reason)
        else:
            return "emitted"
    if params.head_bits:
        raise ExportError("head_bits: only in an emitted graph; set export.head_bits to null")
    return "traced"


def _graph(
    source: Path, folder: Path, params: ExportParams, way: str, tokens: Tensor | None
) -> tuple[Built, Answers]:
    """The graph, and what the model says in torch, which is loaded once."""
    dtype, level = getattr(torch, params.onnx_dtype), params.accuracy_level
    if way == "emitted":
        built = build(source, folder, dtype, level, params.head_bits)
    model = reference(source, params.head_bits)
    prompts, windows = questions(model.config, tokens)
    answers = ask(model, prompts, windows, params.check_tokens)
    if way == "traced":
        built = trace(model, source, folder, dtype, level)
    return built, answers


def compare(source: Path, out: Path, params: ExportParams, answers: Answers) -> dict[str, Any]:
    """Torch's `answers` (float32) against the reloaded safetensors and against onnxruntime.

    The graph is compared in its own arithmetic (accuracy_level 0) by a tight tolerance, then
    as it is shipped by that of its accuracy level. Raises `ExportError` naming the check that
    failed and the first module that differs.
    """
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
            raise ExportError(_failure(source, folder, params, level, failed, answers))
    largest = max(report["accuracy_level_0"].values())
    return report | {
        "greedy_equal": equal,
        "greedy_tokens": answers.greedy.size,
        "providers": session.providers,
        "summary": f"largest logit difference {largest:.1e} standard deviations, "
        f"{equal} of {answers.greedy.size} greedy tokens same",
    }


def _reloaded(folder: Path, answers: Answers) -> float | str:
    """Largest difference of the folder in plain transformers, in standard deviations."""
    layouts = [layout for _, layout in DenseReader(folder).layouts]
    if not all(isinstance(layout, Packed) and layout.symmetric for layout in layouts):
        return "not compared: transformers rounds asymmetric integers anew, or needs gptqmodel"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(answers.prompts)).logits.numpy()
    worst = float(np.abs(logits - answers.logits).max()) / answers.unit
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
    answers: Answers,
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
    place = first_difference(model, folder, torch.from_numpy(answers.prompts[:1]), tolerance)
    return f"{said}; first at {place}; please report this model's config.json"
