"""Writing what was trained into the source's own tensors; all others are carried bitwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compressor import progress
from compressor.checkpoint import Checkpoint, CheckpointWriter
from compressor.dense import DenseReader
from compressor.errors import HealingError
from compressor.heal.healer import Healing, Weights


def rewrite(source: Path, out: Path, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Write `source` into `out`, each tensor named in `changes` passed through its function.

    Names are those on disk. Without changes the tensors are those of `source`, bit by bit.
    """
    checkpoint = Checkpoint(source)
    with CheckpointWriter(out) as writer:
        for name in progress.track(checkpoint.names, "write", len(checkpoint.names)):
            tensor = checkpoint.tensor(name)
            writer.add(name, changes[name](tensor) if name in changes else tensor)
        writer.finish(checkpoint.config, checkpoint.side_files)


def whole(healing: Healing) -> tuple[Any, Callable[[Weights, Path], None]]:
    """The model to heal in float32, and what writes the weights of it that trained."""
    model = AutoModelForCausalLM.from_pretrained(
        healing.source, dtype="float32", device_map={"": healing.device}
    )
    return model, lambda weights, folder: replace(model, weights, healing.source, folder)


def replace(model: nn.Module, weights: Weights, source: Path, out: Path) -> None:
    """Write `source` with the weights of `model` that trained, in the dtypes of `source`.

    Weights that are tied are one parameter; where the file holds both, both are replaced.
    Raises `HealingError` when the file has no tensor for one.
    """
    reader = DenseReader(source)
    tied: Any = model.all_tied_weights_keys
    aliases = {alias: weights[name] for alias, name in tied.items() if name in weights}
    present = {alias: weight for alias, weight in aliases.items() if reader.has(alias)}
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, weight in (weights | present).items():
        stored = reader.locate(name)
        if stored is None:
            raise HealingError(f"{source}: no tensor for the trained weight {name}")
        changes[stored] = _cast(weight)
    rewrite(source, out, changes)


def _cast(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda old: weight.to("cpu", old.dtype, copy=True)  # tied tensors share no memory
