"""What each group of linears does in its block."""

from __future__ import annotations

from compressor.blocks import Blocks
from compressor.quantize import Kind


def kind_of(leader: str, leaders: list[str], blocks: Blocks, index: int) -> Kind:
    """The kind of the group led by a linear of block `index`.

    The first group of a sublayer reads it in (qkv, gate_up), every later one writes it out
    (o, down). `leaders` are the first linears of all groups in the order they run.
    """
    attention = tuple(f"{name}." for name in blocks.attention(index))
    mine = leader.startswith(attention)
    first = leader == next(name for name in leaders if name.startswith(attention) == mine)
    if mine:
        return "qkv" if first else "o"
    return "gate_up" if first else "down"
