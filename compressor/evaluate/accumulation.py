"""How the error of compressed models grows with depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.walk import Step, Stream, walk


def accumulation(
    reference: Path,
    folders: Mapping[str, Path],
    tokens: Tensor,
    *,
    device: str = "cpu",
    batch_size: int = 4,
) -> dict[str, list[float]]:
    """Per model, ||h - h'|| / ||h|| of the residual stream after every block (arXiv:2504.09629).

    h (N, T, D) is the reference's stream on tokens (N, T), norms are over all of it in float64.
    All models walk together, so each costs one forward and holds one block.
    Raises `NotApplicable` for a model whose blocks are not as many, or not as wide.
    """
    stream = Stream(Decoder(reference, device), tokens, batch_size)
    others = {name: Stream(Decoder(f, device), tokens, batch_size) for name, f in folders.items()}
    expected = len(stream.decoder.blocks), stream.x.shape[-1]
    for name, other in others.items():
        got = len(other.decoder.blocks), other.x.shape[-1]
        if got != expected:
            raise NotApplicable(
                f"{folders[name]}: {got[0]} blocks, {got[1]} wide, against {expected[0]}, "
                f"{expected[1]} of {reference}: cannot be compared block by block"
            )
    curves: dict[str, list[float]] = {name: [] for name in folders}
    for step in walk(stream, "accumulation"):
        for _ in step.advance():
            pass
        for name, other in others.items():
            with other.decoder.resident(step.index) as block:
                for _ in Step(other, step.index, block).advance():
                    pass
            curves[name].append(stream.relative_error(other))
    return curves
