"""The small JSON files that pass between stages, made to be read and edited by a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.errors import SelectionError


class Record(BaseModel):
    """A JSON record: unknown keys are refused, equal values give equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def save(self, path: Path) -> None:
        """Write the record as indented JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record; raises `SelectionError` naming the file and the first fault."""
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise SelectionError(f"{path}: no such file") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise SelectionError(f"{path}: {where}: {first['msg']}") from error
        except ValueError as error:
            raise SelectionError(f"{path}: not valid JSON ({error})") from error


class Scores(Record):
    """How much each block matters, by every method that was asked.

    Attributes:
        num_blocks: L.
        block: per method, L saliencies; higher means keep.
        distances: angular distance d(l, n) in units of pi, in [0, 1], as
            distances[n - 1][l] for l = 0..L-n; empty when not asked for.
    """

    num_blocks: int = Field(gt=0)
    block: dict[str, list[float]] = {}
    distances: list[list[float]] = []


class Selection(Record):
    """Which blocks go.

    Attributes:
        num_blocks: L of the model the selection was made for.
        drop_blocks: sorted 0-based indices to remove.
        reason: one sentence on how they were chosen.
    """

    num_blocks: int = Field(gt=0)
    drop_blocks: list[int]
    reason: str = ""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        wrong = [i for i in self.drop_blocks if not 0 <= i < self.num_blocks]
        if wrong:
            raise ValueError(f"blocks {wrong} do not exist in a model of {self.num_blocks} blocks")
        if len(set(self.drop_blocks)) != len(self.drop_blocks):
            raise ValueError(f"a block is listed twice in {self.drop_blocks}")
        if self.drop_blocks != sorted(self.drop_blocks):
            raise ValueError(f"blocks must be in ascending order, got {self.drop_blocks}")
        if len(self.drop_blocks) >= self.num_blocks:
            raise ValueError(f"cannot remove all {self.num_blocks} blocks")
        return self
