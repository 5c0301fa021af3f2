"""The stream a quantized model is corrected towards: its own before, or that of another model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from compressor.blocks import weight_of
from compressor.decoder import Decoder
from compressor.errors import NotApplicable
from compressor.walk import Step, Stream


class Teacher(NamedTuple):
    """A deeper model that a checkpoint was cut from.

    Attributes:
        folder: its checkpoint.
        kept: of each block of the cut one, its index in the teacher, ascending.
    """

    folder: Path
    kept: Sequence[int]


class Twin:
    """The same blocks with the weights they had, on a `stream` of their own."""

    def __init__(self, stream: Stream) -> None:
        """Stand where `stream` does."""
        self.stream = stream.twin()

    @contextmanager
    def beside(self, step: Step) -> Iterator[Step]:
        """The original's step beside one whose weights were not touched yet."""
        yield Step(self.stream, step.index, copy.deepcopy(step.block))


class Guide:
    """The teacher's `stream`, which runs all of its blocks and stops at those that were kept.

    So the cut model's block i reads beside what block kept[i] reads in the teacher, and is
    corrected for what cutting cost as well as for what quantizing does.
    """

    def __init__(self, teacher: Teacher, stream: Stream) -> None:
        """Embed the tokens of `stream` by the teacher.

        Raises `NotApplicable` when its blocks cannot be the ones that `kept` says.
        """
        student = stream.decoder
        self._decoder, self._kept = Decoder(teacher.folder, str(student.device)), teacher.kept
        if len(teacher.kept) != len(student.blocks):
            raise NotApplicable(
                f"{teacher.folder}: {len(teacher.kept)} of its blocks were kept, but the "
                f"checkpoint has {len(student.blocks)}; it was not cut from this teacher"
            )
        batch_size = stream.batches[0].stop
        self.stream = Stream(self._decoder, stream.tokens, batch_size)
        self._decoder.drop_shell()

    @contextmanager
    def beside(self, step: Step) -> Iterator[Step]:
        """The teacher's step beside one of the cut model, in order."""
        index = self._kept[step.index]
        passed = self._kept[step.index - 1] + 1 if step.index else 0
        for gone in range(passed, index):
            with self._decoder.resident(gone) as block:
                for _ in Step(self.stream, gone, block).advance():
                    pass
        self._check(step, index)
        with self._decoder.resident(index) as block:
            yield Step(self.stream, index, block)

    def _check(self, step: Step, index: int) -> None:
        """Raise `NotApplicable` for a linear whose inputs the teacher does not have."""
        blocks, own = step.stream.decoder.blocks, self._decoder.blocks
        known, prefix = own.linears(index), f"{blocks.prefix}.{step.index}."
        for name, linear in blocks.linears(step.index).items():
            twin = known.get(f"{own.prefix}.{index}.{name.removeprefix(prefix)}")
            got = weight_of(linear).shape[1]
            expected = weight_of(twin).shape[1] if twin else None
            if got != expected:
                raise NotApplicable(
                    f"{name} reads {got} inputs, in the teacher's block {index} "
                    f"{expected or 'there is no such linear'}; a model pruned in width cannot be "
                    "corrected towards its teacher: set teacher: checkpoint"
                )
