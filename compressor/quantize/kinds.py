"""What each group of linears does in its block."""

from __future__ import annotations

from compressor.blocks import Blocks
from compressor.quantize import Kind


def kind_of(leader: str, leaders: list[str], blocks: Blocks, index: int) -> Kind:
    """The kind of the group led by a linear of block `index`.

    The last group of a sublayer writes it out (o, down), every earlier one reads it in (qkv,
    gate_up), as one for both does where they share a norm. `leaders` are the first linears of
    all groups in the order they run.
    """
    attention = tuple(f"{name}." for name in blocks.attention(index))
    mine = leader.startswith(attention)
    last = leader == [name for name in leaders if name.startswith(attention) == mine][-1]
    if mine:
        return "o" if last else "qkv"
    return "down" if last else "gate_up"
