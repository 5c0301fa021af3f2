"""What every selection shares: the parts that may go, the budget, and the record of a choice."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from compressor.errors import SelectionError
from compressor.records import Scores, Selection

Part = Literal["block", "attention", "ffn", "sublayers"]
"""What a budget counts; `sublayers` is attention and feed-forward in one list of 2L."""

Unit = tuple[str, int]
"""One part that may go: `block`, `attention` or `ffn`, and the index of its block."""

_KINDS = {"sublayers": ("attention", "ffn")}


def protected(num_blocks: int, protect: Collection[int]) -> set[int]:
    """Absolute indices of the protected blocks; raises `SelectionError` outside the model."""
    wrong = [i for i in protect if not -num_blocks <= i < num_blocks]
    if wrong:
        raise SelectionError(f"blocks {wrong} do not exist in a model of {num_blocks} blocks")
    return {i % num_blocks for i in protect}


def all_units(num_blocks: int, part: Part) -> list[Unit]:
    """Every unit of a model: attention of blocks 0..L-1 before feed-forward of 0..L-1."""
    return [(kind, i) for kind in _KINDS.get(part, (part,)) for i in range(num_blocks)]


def free_units(scores: Scores, n: int, part: Part, protect: Collection[int]) -> list[Unit]:
    """The units that may go: those that are there, of unprotected blocks.

    Raises `SelectionError` when n cannot go; one unit at least always stays.
    """
    kept = protected(scores.num_blocks, protect)
    units = [(kind, i) for kind in _KINDS.get(part, (part,)) for i in scores.having(kind)]
    free = [unit for unit in units if unit[1] not in kept]
    most = min(len(free), len(units) - 1)
    if n > most:
        names = {"block": "blocks", "attention": "attentions", "ffn": "feed-forwards"}
        raise SelectionError(
            f"n = {n} is more than the {most} {names.get(part, part)} that can be removed from "
            f"this model of {scores.num_blocks} blocks ({len(kept)} protected)"
        )
    return free


def cut(
    num_blocks: int, units: Iterable[Unit], reason: str = "", evaluations: float = 0.0
) -> Selection:
    """The selection that removes `units`; a block that loses both sublayers goes whole."""
    gone: dict[str, set[int]] = {"block": set(), "attention": set(), "ffn": set()}
    for kind, index in units:
        gone[kind].add(index)
    blocks = gone["block"] | (gone["attention"] & gone["ffn"])
    return Selection(
        num_blocks=num_blocks,
        drop_blocks=sorted(blocks),
        drop_attention=sorted(gone["attention"] - blocks),
        drop_ffn=sorted(gone["ffn"] - blocks),
        reason=reason,
        evaluations=evaluations,
    )
