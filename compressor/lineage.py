"""Which of its parent's blocks each block of a cut model is, told by their weights."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from compressor.blocks import Blocks
from compressor.decoder import skeleton
from compressor.dense import DenseReader
from compressor.errors import HealingError

SAMPLES = 32
"""Values of a tensor that are looked at: those of two blocks' matrices are apart all the same."""

Sketch = list[dict[str, list[float]]]
"""Per block, by name and shape of each of its tensors, `SAMPLES` of its values."""


def sketch(folder: Path) -> Sketch:
    """Values spread evenly over every tensor of every block; quantized ones as what they mean."""
    reader, blocks = DenseReader(folder), Blocks(skeleton(folder))
    found: Sketch = []
    for index, block in enumerate(blocks):
        found.append({})
        for name, _ in block.named_parameters():
            tensor = reader.read(f"{blocks.prefix}.{index}.{name}")
            found[-1][f"{name} {tuple(tensor.shape)}"] = _samples(tensor)
    return found


def recognise(student: Sketch, parent: Sketch) -> list[int]:
    """The parent's index of each of the student's blocks, the nearest one, in the parent's order.

    Two blocks are as far apart as, on average over the tensors that both have in one shape,
    ||a - b|| / max(||a||, ||b||): 0 where a block was carried, little where it was trained or
    rounded, about 1.4 between the matrices of different ones. Raises `HealingError` unless every
    block is less than half as far from its nearest as from any other, and as from none (1), and
    for blocks in another order.
    """
    found = []
    for block, own in enumerate(student):
        apart = [_distance(own, known) for known in parent]
        nearest = min(range(len(apart)), key=apart.__getitem__)
        next_nearest = min([*apart[:nearest], *apart[nearest + 1 :], 1.0])
        if not apart[nearest] < next_nearest / 2:
            raise HealingError(
                f"block {block} is not known again: it is {apart[nearest]:.2f} of its size from "
                f"block {nearest} of the parent and {next_nearest:.2f} from another or none; give "
                "the parent that it was cut from, or to distill the parent's index of every block "
                "as heal.kept"
            )
        found.append(nearest)
    if any(a >= b for a, b in pairwise(found)):
        raise HealingError(f"the model's blocks are its parent's {found}, not in its order")
    return found


def _samples(tensor: Tensor) -> list[float]:
    values = tensor.flatten()[:: max(1, tensor.numel() // SAMPLES)][:SAMPLES]
    samples: list[float] = values.float().tolist()
    return samples


def _distance(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    apart = [_relative(a[name], b[name]) for name in a.keys() & b.keys()]
    return math.fsum(apart) / len(apart) if apart else math.inf


def _relative(a: list[float], b: list[float]) -> float:
    size = max(math.hypot(*a), math.hypot(*b))
    return math.dist(a, b) / size if size else 0.0
