"""What a score may see of the walk, and how scores share what they see."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import Tensor

from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.records import Scores
from compressor.walk import Step


class Watcher:
    """Statistics that several scores read: made once per walk with (decoder, tokens, *shared).

    Every method does nothing unless overridden.

    Attributes:
        shares: the watchers it reads, handed to it in this order and called before it.
    """

    shares: ClassVar[tuple[type[Watcher], ...]] = ()

    def watching(self, step: Step) -> AbstractContextManager[None]:
        """Hooks on the resident block while the walk pushes one batch through it.

        They are off again when `update` is called, so a score that runs the block itself is not
        seen by the others.
        """
        return nullcontext()

    def update(self, step: Step, rows: slice, x_in: Tensor, x_out: Tensor) -> None:
        """See one batch pass one block."""


class Collector(Watcher):
    """A score that watches the walk: made with (decoder, tokens, *shared, **parameters).

    A score of the weights alone is made with (decoder, **parameters), and only `leave` is called.
    Any method but `watching` may raise `NotApplicable`: this score then ends, the others go on.
    """

    def leave(self, index: int) -> None:
        """See a block after its last batch, while its weights are still resident."""

    def result(self) -> Scores:
        """The scores, once every block was seen."""
        raise NotImplementedError


def refuse_shared(decoder: Decoder) -> None:
    """Raise `NotApplicable` where a branch is run with the weights of another block's."""
    for index, givers in decoder.blocks.reused.items():
        for kind, giver in givers.items():
            raise NotApplicable(
                f"{decoder.blocks.prefix}.{index} runs with the {kind} weights of block {giver}, "
                "and such a branch has no score of its own; score whole blocks"
            )
