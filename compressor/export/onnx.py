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

from compressor import progress
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
    Questions,
    Replies,
    answer,
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
from compressor.memory import release
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
        built = _graph(source, folder, params, way)
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
        asked = questions(config, tokens, params.check_tokens)
        metrics["onnx"]["parity"] = compare(
            source, out, params, asked, prepack=built.container_bytes > 0
        )
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


def _graph(source: Path, folder: Path, params: ExportParams, way: str) -> Built:
    dtype, level = getattr(torch, params.onnx_dtype), params.accuracy_level
    if way == "emitted":
        return build(source, folder, dtype, level, params.head_bits)
    return trace(reference(source), source, folder, dtype, level)


def compare(
    source: Path, out: Path, params: ExportParams, asked: Questions, *, prepack: bool
) -> dict[str, Any]:
    """The graph in onnxruntime, then the reloaded safetensors, against torch in float32.

    One of the three is in memory at a time. The graph is compared in its own arithmetic
    (accuracy_level 0) by a tight tolerance, then as it is shipped by that of its accuracy level.
    `prepack` as in `Session`. Raises `ExportError` naming the check that failed and the first
    module that differs.
    """
    said, providers = _replies(out / "onnx", params.accuracy_level, asked, prepack)
    tokens = said[0].tokens
    answers = answer(source, params.head_bits, asked, tokens)
    report: dict[str, Any] = {"unit": answers.unit}
    for level in sorted(said):
        found, equal = differences(said.pop(level), answers)
        report[f"accuracy_level_{level}"] = found
        tolerance = TOLERANCE[params.onnx_dtype, level]
        failed = {kind: value for kind, value in found.items() if not value <= tolerance}
        if failed:
            raise ExportError(_failure(source, out / "onnx", params, level, failed, asked))
    if "safetensors" in params.formats and not params.head_bits:
        report["safetensors"] = _reloaded(out / "safetensors", answers)
    largest = max(report["accuracy_level_0"].values())
    return report | {
        "greedy_equal": equal,
        "greedy_tokens": tokens.size,
        "providers": providers,
        "summary": f"largest logit difference {largest:.1e} standard deviations, "
        f"{equal} of {tokens.size} greedy tokens same",
    }


def _replies(
    folder: Path, level: int, asked: Questions, prepack: bool
) -> tuple[dict[int, Replies], list[str]]:
    """What the graph says by accuracy level, 0 and its own, and the providers that computed it."""
    said: dict[int, Replies] = {}
    if level:
        with probed(folder) as session:
            said[0] = ask(session, asked)
        del session  # before there is another
    session = Session(folder, prepack=prepack)
    said[level] = ask(session, asked, said[0].tokens if level else None)
    providers = session.providers
    del session
    release()
    return said, providers


def _reloaded(folder: Path, answers: Answers) -> float | str:
    """Largest difference of the folder in plain transformers, in standard deviations."""
    layouts = [layout for _, layout in DenseReader(folder).layouts]
    if not all(isinstance(layout, Packed) and layout.symmetric for layout in layouts):
        return "not compared: transformers rounds asymmetric integers anew, or needs gptqmodel"
    release()
    with progress.task("safetensors", 1) as bar, torch.inference_mode():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits = model(torch.from_numpy(answers.tokens), use_cache=False).logits.numpy()
        bar.advance()
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
    asked: Questions,
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
    place = first_difference(model, folder, torch.from_numpy(asked.prompts[:1]), tolerance)
    return f"{said}; first at {place}; please report this model's config.json"
