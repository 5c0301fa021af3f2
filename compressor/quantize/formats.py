"""The two formats of a quantized checkpoint: the layout of a linear and the config beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import compressed_tensors
import torch

from compressor import __version__
from compressor.blocks import Blocks
from compressor.dense import GPTQ_VERSIONS
from compressor.families import FUSED
from compressor.layouts import Gptq, Packed
from compressor.quantize.grid import Grid

Grids = Mapping[str, Grid]
"""The grid of every linear that is quantized, by full name."""


class Format(NamedTuple):
    """What a writer must know of a format.

    Attributes:
        scale_dtype: what it stores scales in; None for the checkpoint's own.
        layout: for a file of `grids`, what gives the layout of a linear on a grid.
        config: `quantization_config` for `grids`; the last argument names the linears left dense.
    """

    scale_dtype: torch.dtype | None
    layout: Callable[[Grids], Callable[[Grid], Packed | Gptq]]
    config: Callable[[Grids, Blocks, list[str]], dict[str, Any]]


def patterns(names: Iterable[str], blocks: Blocks) -> list[str]:
    """Regular expressions that match the linears `names` and no other, as few as possible.

    Linears that occur in the same blocks share one; all of the blocks are `[0-9]+`.
    """
    where: dict[str, list[int]] = {}
    for name in names:
        index, _, tail = name.removeprefix(f"{blocks.prefix}.").partition(".")
        where.setdefault(tail, []).append(int(index))
    tails: dict[tuple[int, ...], list[str]] = {}
    for tail, indices in where.items():
        tails.setdefault(tuple(sorted(indices)), []).append(tail)
    found = []
    for these, inside in tails.items():
        every = len(these) == len(blocks)
        numbers = "[0-9]+" if every else f"({'|'.join(map(str, these))})"
        path = f"^{blocks.prefix}.".replace(".", "[.]")
        found.append(f"{path}{numbers}[.]({'|'.join(inside).replace('.', '[.]')})$")
    return found


def _packed_config(grids: Grids, blocks: Blocks, dense: list[str]) -> dict[str, Any]:
    """One group per width, group size and symmetry, with disjoint targets.

    `dequantize` makes transformers unpack while it reads. It takes the first group for all,
    so it may only stand where there is one; there it is what lets an asymmetric file load
    with compressed-tensors 0.18 to 0.20 (docs/formats.md).
    """
    groups = {}
    for index, (grid, names) in enumerate(_by_grid(grids).items()):
        weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric}
        shape = {"strategy": "group", "group_size": grid.group_size}
        weights |= shape if grid.group_size else {"strategy": "channel"}
        groups[f"group_{index}"] = {
            "targets": [f"re:{pattern}" for pattern in patterns(names, blocks)],
            "format": "pack-quantized",
            "weights": weights | {"dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": compressed_tensors.__version__,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": dense,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": groups,
    }
    alone = len(groups) == 1 and not next(iter(grids.values())).symmetric
    return config | {"dequantize": True} if alone else config


def _gptq_config(grids: Grids, blocks: Blocks, dense: list[str]) -> dict[str, Any]:
    """The commonest grid for the file and a rule for every other.

    Servers look rules up by the name of the fused linear, so those match as well.
    """
    (common, _), *_ = Counter(grids.values()).most_common(1)
    form = next(f for f, version in GPTQ_VERSIONS.items() if version == _version(grids))
    rules = {
        f"+:{pattern}": _gptq_width(grid)
        for grid, names in _by_grid(grids).items()
        if grid != common
        for pattern in patterns([*names, *_fused(names)], blocks)
    }
    config = {
        "quant_method": "gptq",
        **_gptq_width(common),
        "lm_head": False,
        "checkpoint_format": form,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"compress:{__version__}"]},
    }
    return config | {"dynamic": rules} if rules else config


def _gptq_width(grid: Grid) -> dict[str, Any]:
    size = grid.group_size or -1
    return {"bits": grid.bits, "group_size": size, "sym": grid.symmetric, "desc_act": False}


def _fused(names: list[str]) -> Iterable[str]:
    """What a server calls the linears among `names` that it loads as one."""
    known = set(names)
    for name in names:
        parent, _, last = name.rpartition(".")
        for fused, (first, *others) in FUSED.items():
            if last == first and known.issuperset(f"{parent}.{other}" for other in others):
                yield f"{parent}.{fused}"


def _by_grid(grids: Grids) -> dict[Grid, list[str]]:
    groups: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        groups.setdefault(grid, []).append(name)
    return groups


def _version(grids: Grids) -> int:
    """1, which all know, unless a zero point could be 0: version 1 has no code for it."""
    return 1 if all(grid.symmetric for grid in grids.values()) else 2


def _packed_layout(grids: Grids) -> Callable[[Grid], Packed]:
    return lambda grid: Packed(grid.bits, grid.symmetric)


def _gptq_layout(grids: Grids) -> Callable[[Grid], Gptq]:
    version = _version(grids)
    return lambda grid: Gptq(grid.bits, version)


FORMATS = {
    "compressed-tensors": Format(None, _packed_layout, _packed_config),
    "gptq": Format(torch.float16, _gptq_layout, _gptq_config),
}
"""What `format` of the quantize methods may say."""
