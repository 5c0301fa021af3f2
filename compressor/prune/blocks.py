"""Removing whole blocks from a checkpoint, streaming from shard to shard."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from compressor import progress
from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint, CheckpointWriter, write_json
from compressor.decoder import skeleton
from compressor.errors import CheckpointError, SelectionError, UnsupportedArchitecture
from compressor.families import DEPTH_DEPENDENT, NOT_PER_LAYER, native_config
from compressor.records import Selection


def prune(source: Path, selection: Selection, out: Path) -> None:
    """Write `source` without the selected blocks; every other tensor is carried bitwise.

    Blocks are renumbered densely (which renumbers the KV cache), `num_hidden_layers` and
    every per-layer list of the config are cut, side files are copied. No model gets weights;
    memory is bounded by one shard. Raises `SelectionError` for a selection made for another
    depth and `UnsupportedArchitecture` for a model whose arithmetic depends on depth.
    """
    checkpoint, model, blocks = opened(source, selection)
    kept = [i for i in range(len(blocks)) if i not in set(selection.drop_blocks)]
    config = pruned_config(source, checkpoint.config, kept)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    check(model.config, blocks.layers, skeleton(out), kept)
    renumbered = {old: new for new, old in enumerate(kept)}
    with CheckpointWriter(out) as writer:
        for name in progress.track(checkpoint.names, "prune", len(checkpoint.names)):
            renamed = _rename(name, blocks.prefix, renumbered)
            if renamed:
                writer.add(renamed, checkpoint.tensor(name))
        writer.finish(config, checkpoint.side_files)


def opened(source: Path, selection: Selection) -> tuple[Checkpoint, nn.Module, Blocks]:
    """The checkpoint to cut, its model without weights and the view of its blocks."""
    checkpoint = Checkpoint(source)
    if checkpoint.quantized:
        raise CheckpointError(f"{source}: already quantized; prune the dense checkpoint before")
    model = skeleton(source)
    blocks = Blocks(model)
    if len(blocks) != selection.num_blocks:
        raise SelectionError(
            f"the selection is for a model of {selection.num_blocks} blocks, but {source} has "
            f"{len(blocks)}; score and select again on this model"
        )
    return checkpoint, model, blocks


def pruned_config(source: Path, raw: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The raw config with its depth and every per-layer list cut to the kept blocks.

    Lists that transformers derives from the depth (`layer_types`) are written out, since
    deriving them anew from the smaller depth would give other values.
    """
    parsed = AutoConfig.from_pretrained(source)
    for switch in DEPTH_DEPENDENT:
        if getattr(parsed, switch, False):
            raise UnsupportedArchitecture(
                f"{source}: config.{switch} ties a block's arithmetic to its index, so its blocks "
                "cannot be removed"
            )
    if "per_layer_config" in raw:
        raise UnsupportedArchitecture(
            f"{source}: config.per_layer_config gives some blocks settings of their own, which "
            "cannot be cut yet"
        )
    config = copy.deepcopy(raw)
    depth_key = parsed.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    config[depth_key] = len(kept)
    for name, values in _per_layer(parsed).items():
        config[name] = [values[i] for i in kept]
    return config


def _per_layer(config: Any) -> dict[str, list[Any]]:
    return {
        name: values
        for name, values in native_config(config.to_dict()).items()
        if isinstance(values, list)
        and len(values) == config.num_hidden_layers
        and name not in NOT_PER_LAYER
    }


def check(before: Any, layers: nn.ModuleList, after: nn.Module, kept: list[int]) -> None:
    """Compare a model with the config and blocks it is made of: those kept, and nothing else."""
    config: Any = after.config
    for name, values in _per_layer(before).items():
        if getattr(config, name) != [values[i] for i in kept]:
            raise UnsupportedArchitecture(
                f"{config.model_type}: config.{name} cannot be cut; transformers computes it from "
                "other keys"
            )
    for (new, block), old in zip(enumerate(Blocks(after)), kept, strict=True):
        was, now = _facts(layers[old]), _facts(block)
        for name in sorted(was.keys() | now.keys()):
            pair = was.get(name), now.get(name)
            if pair[0] != pair[1] and pair != (repr(old), repr(new)):
                raise UnsupportedArchitecture(
                    f"{config.model_type}: block {old} cannot become block {new}: its {name} would "
                    f"turn from {pair[0]} to {pair[1]}; transformers makes it from the index"
                )


def _facts(block: nn.Module) -> dict[str, str]:
    """Shapes of a block's parameters and plain settings of its modules, by dotted name.

    Without `layer_idx`, the place in the KV cache, which is not that of the block once an
    attention is gone.
    """
    return {name: str(tuple(p.shape)) for name, p in block.named_parameters()} | {
        f"{path}.{name}".lstrip("."): repr(value)
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name != "layer_idx"
    }


def _rename(name: str, prefix: str, renumbered: dict[int, int]) -> str | None:
    """New name of a tensor, or None when its block goes; `prefix` may lack its first part."""
    for path in (prefix, prefix.partition(".")[2]):
        if path and name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            new = renumbered.get(int(index))
            return None if new is None else f"{path}.{new}.{rest}"
    return name
