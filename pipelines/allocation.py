"""Between the two verbs that share a budget of bits: options from one, widths from the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compressor.allocate import AllocateParams
from compressor.allocate.driver import measure, spend
from compressor.allocate.measured import Measured
from compressor.allocate.probe import Probe
from compressor.decoder import Decoder
from compressor.quantize import GridParams
from compressor.quantize.options import Options
from compressor.records import BitPlan, Scores


def measure_costs(
    decoder: Decoder,
    tokens: Tensor,
    method: str,
    params: AllocateParams,
    *,
    scores: Scores | None,
    batch_size: int,
) -> Measured:
    """What each width of each unit costs by a method, whatever the budget."""
    probe, options = _probe(decoder, tokens, params, batch_size, scores=scores)
    return measure(probe, method, params, options.dense_bytes)


def choose_widths(
    decoder: Decoder, tokens: Tensor, measured: Measured, params: AllocateParams, batch_size: int
) -> tuple[BitPlan, dict[str, Any]]:
    """The plan that a budget buys at measured costs, and its figures for the summary."""
    probe, options = _probe(decoder, tokens, params, batch_size, energies=measured.energies)
    chosen = spend(measured.costs, probe, params, options.dense_bytes)
    figures: dict[str, Any] = {
        "average_bits": chosen.average_bits,
        "bits_per_weight": chosen.bits_per_weight,
        "bytes": chosen.size_bytes,
        "predicted": chosen.predicted,
        "widths": options.by_block(chosen.bits),
    }
    if chosen.refined:
        before, after = chosen.refined.losses
        figures["refined"] = (
            f"{before:.4f} to {after:.4f} nats in {chosen.refined.evaluations} tries"
        )
    if options.left_out:
        figures["left_out"] = options.left_out
    reason = f"{measured.method}: {chosen.average_bits:.4g} bits on average"
    return options.plan(chosen.bits, reason), figures


def _probe(
    decoder: Decoder, tokens: Tensor, params: AllocateParams, batch_size: int, **known: Any
) -> tuple[Probe, Options]:
    grid = GridParams(**params.model_dump(include=set(GridParams.model_fields)))
    options = Options(decoder, grid, params.widths)
    probe = Probe(
        decoder=decoder,
        tokens=tokens[: params.max_windows],
        units=options.units,
        widths=options.widths,
        quantize=options.quantize,
        nearest=options.nearest,
        batch_size=batch_size,
        **known,
    )
    return probe, options
