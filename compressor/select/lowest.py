"""Removing the least important parts, wherever they are, or just those asked for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import ValidationError

from compressor.errors import SelectionError, did_you_mean
from compressor.records import Scores, Selection
from compressor.select.protect import Part, Unit, all_units, cut, free_units, protected


def lowest(
    scores: Scores, *, n: int, score: str, protect: tuple[int, ...], part: Part = "block"
) -> Selection:
    """Remove the n unprotected parts with the lowest saliency; of equals, the deeper goes.

    Raises `SelectionError` for a score that was not computed or a budget that does not fit.
    """
    units = lowest_units(scores, n, score, part, protect)
    return cut(scores.num_blocks, units, f"the {n} lowest by {score}")


def joint(scores: Scores, *, n: int, score: str, protect: tuple[int, ...]) -> Selection:
    """Remove the n lowest sublayers of attention and feed-forward taken as one list of 2L.

    LLM-Drop's joint layer drop (arXiv:2406.15786 section 3.3), where saliency is one minus the
    cosine across the sublayer with its residual. Raises `SelectionError` as `lowest` does.
    """
    units = lowest_units(scores, n, score, "sublayers", protect)
    return cut(scores.num_blocks, units, f"the {n} lowest sublayers by {score}")


def lowest_units(
    scores: Scores, n: int, score: str, part: Part, protect: tuple[int, ...]
) -> list[Unit]:
    """The n lowest units by a score, the lowest first; raises `SelectionError`."""
    free = free_units(scores, n, part, protect)
    for kind in sorted({kind for kind, _ in all_units(1, part)}):
        known = getattr(scores, kind)
        if score not in known:
            raise SelectionError(f"{kind}: no score {score!r}{did_you_mean(score, known)}")
    saliency: dict[Unit, float] = {u: getattr(scores, u[0])[score][u[1]] for u in free}
    return sorted(free, key=lambda unit: (saliency[unit], -unit[1]))[:n]


def fixed(
    scores: Scores,
    *,
    num_blocks: int | None = None,
    blocks: tuple[int, ...],
    attention: tuple[int, ...] = (),
    ffn: tuple[int, ...] = (),
    reuse_attention: Mapping[int, int] = MappingProxyType({}),
    reuse_ffn: Mapping[int, int] = MappingProxyType({}),
) -> Selection:
    """Remove exactly the listed blocks and sublayers; negative indices count from the end.

    A block that loses both sublayers goes whole; `reuse_*` let blocks run with the weights of
    others' sublayers. Raises `SelectionError` for a list made for another `num_blocks`, for one
    listed twice and for such pairs of which one is gone.
    """
    if num_blocks not in (None, scores.num_blocks):
        raise SelectionError(
            f"the selection is for a model of {num_blocks} blocks, but this one has "
            f"{scores.num_blocks}; score and select again on this model"
        )
    lists = {"blocks": blocks, "attention": attention, "ffn": ffn}
    gone = {kind: protected(scores.num_blocks, listed) for kind, listed in lists.items()}
    for kind, listed in lists.items():
        if len(gone[kind]) != len(listed):
            raise SelectionError(f"{kind}: a block is listed twice in {list(listed)}")
    whole = gone["blocks"] | (gone["attention"] & gone["ffn"])
    free_units(scores, len(whole), "block", ())
    units = [("block", i) for i in whole]
    units += [(kind, i) for kind in ("attention", "ffn") for i in gone[kind] - whole]
    dropped = cut(scores.num_blocks, units, "the list that was given").model_dump()
    shared = {"reuse_attention": dict(reuse_attention), "reuse_ffn": dict(reuse_ffn)}
    try:
        return Selection.model_validate(dropped | shared)
    except ValidationError as error:
        raise SelectionError(error.errors()[0]["msg"]) from error
