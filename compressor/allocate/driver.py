"""From costs and a budget to the width of every unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.allocate import METHODS, AllocateParams
from compressor.allocate.measured import Measured
from compressor.allocate.probe import Costs, Probe
from compressor.allocate.refine import MixedModel, Refined, refine
from compressor.allocate.rule import greedy
from compressor.errors import CompressError, SelectionError
from compressor.units import Unit


@dataclass(frozen=True)
class Allocation:
    """Which unit gets what.

    Attributes:
        bits: the width of each unit.
        average_bits: over all weights of the units, codes only.
        bits_per_weight: the same with scales and zero points.
        size_bytes: what the weight files will have at most.
        predicted: sum of the costs, in the method's own terms.
        refined: what the swaps came to, where they were asked for.
    """

    bits: list[int]
    average_bits: float
    bits_per_weight: float
    size_bytes: int
    predicted: float
    refined: Refined | None = None


def measure(probe: Probe, method: str, params: AllocateParams, dense_bytes: int) -> Measured:
    """What every width of every unit costs; of the budget, only whether it can be met counts.

    Raises `SelectionError` with the reachable range when no width meets the budget, before
    anything is measured, and `CompressError` for a cost that is not finite.
    """
    check_budget(params, probe.units, probe.widths, dense_bytes)
    own = params.model_dump(exclude={*AllocateParams.model_fields})
    costs: Costs = METHODS[method].load()(probe, **own)
    for unit, cost in zip(probe.units, costs, strict=True):
        if not all(map(math.isfinite, cost.values())):
            raise CompressError(
                f"{unit.names[0]}: {method} gives {cost}; a gradient or a score is not finite: "
                "compute in float32 (device: cpu), or check the checkpoint for damage"
            )
    return Measured(method, costs, {u.names[0]: probe.energies[u.names[0]] for u in probe.units})


def spend(costs: Costs, probe: Probe, params: AllocateParams, dense_bytes: int) -> Allocation:
    """Widths of least cost within the budget; dense_bytes: what is not in the units.

    Raises `SelectionError` with the reachable range when no width meets the budget.
    """
    check_budget(params, probe.units, probe.widths, dense_bytes)
    units, refined = probe.units, None
    weights = sum(unit.weights for unit in units)
    sizes: list[Mapping[int, int]] = [unit.sizes for unit in units]
    budget = (params.max_bytes or 0) - dense_bytes
    if params.average_bits is not None:
        sizes = [{bits: unit.weights * bits for bits in probe.widths} for unit in units]
        budget = math.floor(params.average_bits * weights + 1e-6)
    bits = greedy(sizes, costs, budget)
    if params.refine:
        model = MixedModel(probe, probe.tokens)
        refined = refine(bits, sizes, costs, budget, loss=model.loss, evaluations=params.refine)
        bits = refined.bits
    packed = sum(unit.sizes[each] for unit, each in zip(units, bits, strict=True))
    return Allocation(
        bits=bits,
        average_bits=sum(u.weights * each for u, each in zip(units, bits, strict=True)) / weights,
        bits_per_weight=8 * packed / weights,
        size_bytes=dense_bytes + packed,
        predicted=math.fsum(cost[each] for cost, each in zip(costs, bits, strict=True)),
        refined=refined,
    )


def check_budget(
    params: AllocateParams, units: Sequence[Unit], widths: Sequence[int], dense_bytes: int
) -> None:
    """Raise `SelectionError` when no choice of widths meets the budget."""
    low, high = min(widths), max(widths)
    if params.average_bits is not None and not low <= params.average_bits <= high:
        raise SelectionError(
            f"average_bits {params.average_bits:g}: the widths {', '.join(map(str, widths))} reach "
            f"{low} to {high}; give more of them with `widths`"
        )
    least = dense_bytes + sum(unit.sizes[low] for unit in units)
    if params.max_bytes is not None and params.max_bytes < least:
        most = dense_bytes + sum(unit.sizes[high] for unit in units)
        raise SelectionError(
            f"max_bytes {params.max_bytes:,}: {low} to {high} bits make files of {least:,} to "
            f"{most:,} bytes, of which {dense_bytes:,} are not in the quantized linears"
        )
