"""One function per verb: from a job's folders to a call of the library and back; glue only."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from compressor.allocate import AllocateParams
from compressor.blocks import Blocks
from compressor.checkpoint import write_json
from compressor.decoder import Decoder, skeleton
from compressor.heal import TEACHER, TrainingParams
from compressor.prune.sublayers import blocks_left
from compressor.quantize import GridParams
from compressor.quantize.teacher import Teacher
from compressor.records import BitPlan, Scores, Selection
from compressor.trial import Trial
from pipelines import material
from pipelines.config import methods
from pipelines.job import Job
from pipelines.material import WINDOWS

SCORES, SELECTION, BITS = "scores.json", "selection.json", "bits.json"


def score(job: Job) -> dict[str, Any]:
    """All asked scores from one walk."""
    from compressor.score.collect import score as collect

    scores = collect(
        job.inputs["checkpoint"],
        _tokens(job, "calibration"),
        job.stage.methods,
        device=job.device,
        batch_size=job.config.head.batch_size,
    )
    scores.save(job.out / SCORES)
    figures: dict[str, Any] = {"blocks": scores.num_blocks, "lowest": _lowest(scores)}
    return figures | ({"unavailable": scores.unavailable} if scores.unavailable else {})


def _lowest(scores: Scores, count: int = 8) -> dict[str, list[int]]:
    """What each score would give up first, the first foremost."""
    tables = {"block": scores.block, "attention": scores.attention, "ffn": scores.ffn}
    return {
        f"{kind} by {name}": sorted(scores.having(kind), key=values.__getitem__)[:count]
        for kind, table in tables.items()
        for name, values in table.items()
    }


def select(job: Job) -> dict[str, Any]:
    """Choose the blocks and sublayers that go."""
    name, params = job.method
    if "scores" in job.inputs:
        scores = Scores.load(job.inputs["scores"] / SCORES)
    else:
        blocks = Blocks(skeleton(job.inputs["checkpoint"]))
        scores = Scores.model_validate({"num_blocks": len(blocks), "absent": blocks.absent})
    row = methods("select")[name]
    inputs = (scores, _trial(job)) if row.needs else (scores,)
    selection: Selection = row.load()(*inputs, **dict(params))
    selection.save(job.out / SELECTION)
    chosen = selection.model_dump(mode="json", exclude={"num_blocks"}, exclude_defaults=True)
    return {"drop_blocks": [], **chosen}


def prune(job: Job) -> dict[str, Any]:
    """Remove what a selection names, or what the method finds by itself."""
    if "selection" not in job.inputs:
        return _pruned_without_selection(job)
    _, params = job.method
    selection = Selection.load(job.inputs["selection"] / SELECTION)
    _method(job)(job.inputs["checkpoint"], selection, job.out, **dict(params))
    return _dropped(selection)


def teacher(job: Job) -> dict[str, Any]:
    """Store what the parent says of the healing windows."""
    cache: Callable[..., dict[str, Any]] = TEACHER.load()
    return cache(
        job.inputs["parent"],
        job.out,
        job.work,
        _tokens(job, "healing"),
        student=job.inputs["student"],
        device=job.device,
        batch_size=job.config.head.batch_size,
        **dict(job.method[1]),
    )


def heal(job: Job) -> dict[str, Any]:
    """Train what pruning damaged."""
    from compressor.heal.healer import Healing

    _, params = job.method
    assert isinstance(params, TrainingParams)
    tokens = _tokens(job, "healing")
    assert tokens is not None
    healing = Healing(
        source=job.inputs["checkpoint"],
        out=job.out,
        work=job.work,
        tokens=tokens,
        params=params,
        seed=job.config.head.seed,
        device=job.device,
        teacher=job.inputs.get("teacher"),
        parent=job.inputs.get("unpruned"),
    )
    result: dict[str, Any] = _method(job)(healing)
    return result


def costs(job: Job) -> dict[str, Any]:
    """Measure what every width of every linear costs."""
    from pipelines.allocation import measure_costs

    name, params = job.method
    assert isinstance(params, AllocateParams)
    tokens = _tokens(job, "calibration")
    assert tokens is not None
    measured = measure_costs(
        Decoder(job.inputs["checkpoint"], job.device),
        tokens,
        name,
        params,
        scores=Scores.load(job.inputs["scores"] / SCORES) if "scores" in job.inputs else None,
        batch_size=job.config.head.batch_size,
    )
    measured.save(job.out)
    return {"units": len(measured.costs), "widths": [*measured.costs[0]]}


def allocate(job: Job) -> dict[str, Any]:
    """Choose the width of every linear."""
    from compressor.allocate.measured import Measured
    from pipelines.allocation import choose_widths

    _, params = job.method
    assert isinstance(params, AllocateParams)
    tokens = _tokens(job, "calibration")
    assert tokens is not None
    plan, figures = choose_widths(
        Decoder(job.inputs["checkpoint"], job.device),
        tokens,
        Measured.load(job.inputs["costs"]),
        params,
        job.config.head.batch_size,
    )
    plan.save(job.out / BITS)
    return figures


def quantize(job: Job) -> dict[str, Any]:
    """Store the linears in few bits."""
    from compressor.quantize.driver import quantize as drive

    name, params = job.method
    assert isinstance(params, GridParams)
    if "bits" in job.inputs:
        params = params.model_copy(update={"scheme": BitPlan.load(job.inputs["bits"] / BITS)})
    return drive(
        job.inputs["checkpoint"],
        job.out,
        _tokens(job, "calibration"),
        name,
        params,
        work=job.work,
        teacher=_teacher(job, params.needs),
        device=job.device,
        batch_size=job.config.head.batch_size,
    )


def _teacher(job: Job, roles: tuple[str, ...]) -> Teacher | None:
    """The model to be corrected towards, and which of its blocks the selections since then left."""
    if not roles:
        return None
    folder = job.inputs[roles[0]]
    cuts = [made for role, made in job.inputs.items() if role.startswith("cut ")]
    return Teacher(folder, blocks_left(folder, (Selection.load(c / SELECTION) for c in cuts)))


def export(job: Job) -> dict[str, Any]:
    """Write and compare the deployable folders; time the ONNX graph."""
    _, params = job.method
    result: dict[str, Any] = _method(job)(
        job.inputs["checkpoint"], job.out, params, _tokens(job, "evaluation")
    )
    if job.config.head.evaluate.speed and "onnx" in result:
        os.sync()  # or writing back the files just made would be timed too
        result["onnx"]["speed"] = _speed(job, job.out / "onnx", "onnxruntime")
    return result


def evaluate(job: Job) -> dict[str, Any]:
    """Quality, bytes and, where asked for, speed of a checkpoint."""
    from compressor.evaluate.quality import Reference
    from compressor.evaluate.quality import evaluate as measure_quality

    reference = None
    if "reference" in job.inputs:
        reference = Reference(job.inputs["original"], job.inputs["reference"])
    tokens = _tokens(job, "evaluation")
    assert tokens is not None
    metrics = measure_quality(
        job.inputs["checkpoint"],
        tokens,
        job.out,
        reference=reference,
        device=job.device,
        batch_size=job.config.head.batch_size,
    )
    write_json(job.out / "metrics.json", metrics)
    if job.config.head.evaluate.speed:
        metrics["speed"] = _speed(job, job.inputs["checkpoint"], "torch")
    return metrics


def _speed(job: Job, folder: Path, runtime: str) -> dict[str, Any]:
    """Tokens/s of a folder as the configuration asks for them."""
    from compressor.runtimes import Target
    from compressor.runtimes.measure import measure

    counts = {"prompt_tokens", "new_tokens", "repeats"}
    asked = job.config.head.evaluate.model_dump(include=counts)
    return measure(Target(folder, runtime), device=job.device, **asked)


def trial(job: Job) -> dict[str, Any]:
    """Quality on held-out text of the model with parts removed, without removing them."""
    selection = Selection.model_validate(dict(job.stage.params))
    windows_file = job.inputs["evaluation"] / WINDOWS
    batch_size = job.config.head.batch_size
    tried = _opened(job.inputs["checkpoint"], windows_file, job.device, batch_size)
    return dataclasses.asdict(tried.compare(selection))


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, windows_file: Path, device: str, batch_size: int) -> Trial:
    """One trial for all selections of a comparison: the original's outputs are computed once."""
    tokens = load_file(windows_file)["tokens"]
    return Trial(Decoder(folder, device), tokens, batch_size=batch_size)


def _pruned_without_selection(job: Job) -> dict[str, Any]:
    source, params = job.inputs["checkpoint"], dict(job.method[1])
    tokens = _tokens(job, "calibration")
    prune: Callable[..., dict[str, Any]] = _method(job)
    if tokens is None:
        return prune(source, job.out, **params)
    batch_size = job.config.head.batch_size
    return prune(source, job.out, tokens, device=job.device, batch_size=batch_size, **params)


def _dropped(selection: Selection) -> dict[str, Any]:
    """What goes or is shared, by kind; of sublayers only where some are."""
    kinds = {"drop_attention", "drop_ffn", "reuse_attention", "reuse_ffn"}
    sublayers = selection.model_dump(mode="json", include=kinds)
    return {"drop_blocks": selection.drop_blocks} | {k: v for k, v in sublayers.items() if v}


def _trial(job: Job) -> Trial:
    """The checkpoint before the selection, on the calibration windows."""
    tokens = _tokens(job, "calibration")
    assert tokens is not None
    return Trial(
        Decoder(job.inputs["checkpoint"], job.device),
        tokens,
        batch_size=job.config.head.batch_size,
        log=job.work / "measures.jsonl",
    )


def _tokens(job: Job, role: str) -> Tensor | None:
    """Windows (N, T) of a role, or None where the stage reads no text."""
    if role not in job.inputs:
        return None
    return load_file(job.inputs[role] / WINDOWS)["tokens"]


def _method(job: Job) -> Callable[..., Any]:
    return methods(job.stage.verb)[job.method[0]].load()


STAGES: Mapping[str, Callable[[Job], dict[str, Any]]] = {
    "model": material.model, "text": material.text, "score": score, "select": select,
    "prune": prune, "teacher": teacher, "heal": heal, "costs": costs, "allocate": allocate,
    "quantize": quantize, "export": export, "evaluate": evaluate, "trial": trial,
}  # fmt: skip
"""What runs for each verb of a plan."""
