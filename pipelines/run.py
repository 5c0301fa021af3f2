"""Run a plan: skip what is cached, build what is not, commit each stage whole."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compressor.artifact import Manifest, Store
from compressor.errors import ArtifactError, CompressError, ConfigError, did_you_mean
from compressor.fetch import fingerprint_model, fingerprint_text
from compressor.files import write_whole
from compressor.memory import import_for_good, peak, release, reset_peak
from pipelines import ranks
from pipelines.config import RunConfig
from pipelines.job import Job
from pipelines.plan import ROLES, Stage, plan, text_source

RECORD_FORMAT = 1
LIBRARIES = ("torch", "transformers", "safetensors", "peft", "bitsandbytes", "compressed-tensors")
Event = Literal["cached", "start", "done", "damaged"]
OnEvent = Callable[[Event, Stage], None]


@dataclass(frozen=True)
class Options:
    """What part of a plan to run.

    Attributes:
        first, last: verbs (or labels) to start from and to stop after.
        force: build again what is cached, within that range.
        on_event: told of every stage; draws nothing by default.
    """

    first: str | None = None
    last: str | None = None
    force: bool = False
    on_event: OnEvent = field(default=lambda event, stage: None)


def make_plan(config: RunConfig) -> list[Stage]:
    """Pin the sources by content and plan; imports no torch."""
    return plan(config, pin(config))


def pin(config: RunConfig) -> dict[str, str]:
    """What pins each model and text role by content."""
    pins = {key: fingerprint_model(source) for key, source in config.head.models.items()}
    for role in ROLES:
        source = text_source(config, role)
        if source:
            pins[role] = fingerprint_text(source)
    return pins


def run(config: RunConfig, store: Store, options: Options) -> dict[str, Any]:
    """Run the plan and return the run's record, also written to `runs/<name>.json`.

    Raises whatever a stage raises; finished stages stay, and a stage that resumes
    goes on from its work folder when the same command runs again.
    """
    stages = make_plan(config)
    if options.force and "WORLD_SIZE" in os.environ:
        raise ConfigError("--force: not with several processes; build again in one")
    start, stop = _span(stages, options)
    for index, stage in enumerate(stages[:stop]):
        again = options.force and index >= start and stage.verb not in ("model", "text")
        there = store.status(stage.verb, stage.key) == "cached"
        if index < start and not there and stage.verb not in ("model", "text", "evaluate"):
            raise ArtifactError(
                f"--from {options.first} needs the result of {stage.label!r}, which is not stored; "
                "run without --from"
            )
        ensure(stage, config, store, options.on_event, again=again)
    return _record(config, stages[:stop], store)


def ensure(
    stage: Stage, config: RunConfig, store: Store, on_event: OnEvent, *, again: bool = False
) -> None:
    """Build a stage unless it is stored in full; what is damaged is set aside first."""
    there = store.status(stage.verb, stage.key) == "cached"
    if ranks.rank():
        if not there and stage.verb in ranks.SHARED:
            with ranks.scratch() as draft:
                _build(stage, config, store, draft)
        ranks.wait_until(lambda: store.status(stage.verb, stage.key) == "cached")
        return
    if there and not again:
        on_event("cached", stage)
        return
    with store.draft(stage.verb, stage.key) as draft:
        status = store.status(stage.verb, stage.key)  # another process may have been quicker
        if status == "cached" and not again:
            on_event("cached", stage)
            return
        if status == "damaged":
            on_event("damaged", stage)
            store.set_aside(stage.verb, stage.key)
        on_event("start", stage)
        _build(stage, config, store, draft)
    on_event("done", stage)


def _span(stages: list[Stage], options: Options) -> tuple[int, int]:
    """Indices of the first stage to run and of the one after the last."""
    start, stop = 0, len(stages)
    if options.first:
        start = _find(stages, options.first, "--from")[0]
    if options.last:
        stop = _find(stages, options.last, "--to")[-1] + 1
        name = f"evaluate {stages[stop - 1].label}"
        stop += stop < len(stages) and stages[stop].label == name
    return start, stop


def _find(stages: list[Stage], name: str, flag: str) -> list[int]:
    found = [i for i, s in enumerate(stages) if name in (s.verb, s.label)]
    if not found:
        labels = [s.label for s in stages]
        raise ConfigError(f"{flag} {name}: no such stage{did_you_mean(name, labels)}")
    return found


def _build(stage: Stage, config: RunConfig, store: Store, draft: Path) -> None:
    """Make a stage in `draft` and commit it, in the first process only."""
    import_for_good("pipelines.stages")
    import torch
    from safetensors import SafetensorError

    from pipelines.quiet import silence_libraries
    from pipelines.stages import STAGES

    silence_libraries()
    device = _device(config.head.device)
    torch.manual_seed(config.head.seed)
    reset_peak()
    began = time.monotonic()
    read = {**stage.inputs, **stage.beside}
    inputs = {role: store.folder(s.verb, s.key) for role, s in read.items()}
    work = store.work(stage.verb, stage.key)
    try:
        metrics = STAGES[stage.verb](Job(stage, config, inputs, draft, work, device))
        if ranks.rank():
            return
        manifest = Manifest(
            stage=stage.verb,
            method=stage.method,
            version=stage.version,
            key=stage.key,
            params=dict(stage.params),
            parents=stage.parents,
            libraries=_versions(LIBRARIES),
            device=device,
            threads=torch.get_num_threads(),
            metrics=metrics,
            seconds=round(time.monotonic() - began, 3),
            peak_bytes=peak(),
        )
        store.commit(draft, manifest)
        release()
    except CompressError as error:
        raise type(error)(_as_given(str(error), read, config, store)) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        free = shutil.disk_usage(store.root).free / 2**30
        raise ArtifactError(
            f"{store.root}: the disk is full ({free:.1f} GiB free); finished stages are kept; "
            "make room, or give another folder with --store, and run the same command again"
        ) from error


def _as_given(text: str, read: Mapping[str, Stage], config: RunConfig, store: Store) -> str:
    """An error with the model's path as the user gave it, not that of its import."""
    for stage in read.values():
        if stage.label == "model" and config.head.model.path:
            text = text.replace(str(store.folder(stage.verb, stage.key)), config.head.model.path)
    return text


def _device(asked: str) -> str:
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    if found == "cuda":
        torch.cuda.set_device(ranks.local_rank())
    if asked == "cuda" and found == "cpu":
        raise ConfigError("device: cuda, but torch sees no CUDA device; see: compress doctor")
    return found if asked == "auto" else asked


def _disk_is_full(error: Exception) -> bool:
    """Whether a library, each in its own way, ran out of disk."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _record(config: RunConfig, stages: list[Stage], store: Store) -> dict[str, Any]:
    """The stable record of a run (docs/formats.md), for people and other programs."""
    rows: list[dict[str, Any]] = []
    for stage in stages:
        manifest = store.manifest(stage.verb, stage.key)
        rows.append(
            {
                "verb": stage.verb,
                "label": stage.label,
                "method": stage.method,
                "key": stage.key,
                "folder": str(store.folder(stage.verb, stage.key).resolve()),
                "metrics": manifest.metrics,
                "seconds": manifest.seconds,
                "peak_bytes": manifest.peak_bytes,
            }
        )
    exports = {
        name: str(Path(row["folder"]) / name)
        for row in rows
        if row["verb"] == "export"
        for name in row["metrics"]["formats"]
    }
    head = config.head.model_dump(mode="json")
    methods = [
        {s.verb: {n: p.model_dump(mode="json") for n, p in s.methods.items()}}
        for s in config.stages
    ]
    record = {
        "format": RECORD_FORMAT,
        "name": config.head.name,
        "config": head | {"stages": methods},
        "stages": rows,
        "exports": exports,
    }
    if ranks.rank():
        return record
    path = store.root.parent / "runs" / f"{config.head.name}.json"
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return record


def _versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}
