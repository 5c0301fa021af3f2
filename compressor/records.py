"""The small JSON files that pass between stages, made to be read and edited by a person."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, Self

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
    """How much each part matters, by every method that was asked; higher means keep.

    Attributes:
        num_blocks: L.
        block, attention, ffn: per method, L saliencies of blocks or sublayers.
        linear: per method, the saliency of each linear by full name.
        depth: diagnostics of the residual stream by depth, to be read, not selected by.
        distances: angular distance d(l, n) in units of pi, in [0, 1], as
            distances[n - 1][l] for l = 0..L-n; empty when not asked for.
        unavailable: per method that this model cannot give, why.
        absent: per kind of sublayer, the blocks that have none of their own; it scores 0 there.
    """

    num_blocks: int = Field(gt=0)
    block: dict[str, list[float]] = {}
    attention: dict[str, list[float]] = {}
    ffn: dict[str, list[float]] = {}
    linear: dict[str, dict[str, float]] = {}
    depth: dict[str, list[float]] = {}
    distances: list[list[float]] = []
    unavailable: dict[str, str] = {}
    absent: dict[Literal["attention", "ffn"], list[int]] = {}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        depth = self.num_blocks
        tables = {"block": self.block, "attention": self.attention, "ffn": self.ffn}
        for kind, table in tables.items():
            for name, values in table.items():
                if len(values) != depth:
                    raise ValueError(f"{kind}.{name}: {len(values)} numbers for {depth} blocks")
        lengths = [len(row) for row in self.distances]
        if lengths and lengths != [*range(depth, 0, -1)]:
            raise ValueError(f"distances: expected rows of {depth} to 1 numbers, got {lengths}")
        return self

    def having(self, kind: str) -> list[int]:
        """The blocks that have a part of this kind: `block`, `attention` or `ffn`."""
        absent = {i for name, gone in self.absent.items() if name == kind for i in gone}
        return [i for i in range(self.num_blocks) if i not in absent]


class Selection(Record):
    """Which blocks and sublayers go.

    Attributes:
        num_blocks: L of the model the selection was made for.
        drop_blocks, drop_attention, drop_ffn: sorted 0-based indices of what is removed; a
            block whose two sublayers both go is listed as a block.
        reuse_attention, reuse_ffn: kept sublayers that run with another block's weights,
            as {index: index of the block whose weights they share}.
        reason: one sentence on how they were chosen.
        evaluations: forward passes over the text that the choice took, in units of the full
            model's.
    """

    num_blocks: int = Field(gt=0)
    drop_blocks: list[int] = []
    drop_attention: list[int] = []
    drop_ffn: list[int] = []
    reuse_attention: dict[int, int] = {}
    reuse_ffn: dict[int, int] = {}
    reason: str = ""
    evaluations: float = 0.0

    @property
    def sublayers(self) -> bool:
        """Whether anything but whole blocks is touched."""
        return bool(self.drop_attention or self.drop_ffn or self.reuse_attention or self.reuse_ffn)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self._check("blocks", self.drop_blocks)
        self._check("attention sublayers", self.drop_attention)
        self._check("feed-forward sublayers", self.drop_ffn)
        twice = set(self.drop_attention) & set(self.drop_ffn)
        twice |= set(self.drop_blocks) & {*self.drop_attention, *self.drop_ffn}
        if twice:
            raise ValueError(f"blocks {sorted(twice)} lose both sublayers: list them as blocks")
        for kind in ("attention", "ffn"):
            gone = {*self.drop_blocks, *getattr(self, f"drop_{kind}")}
            reuse: dict[int, int] = getattr(self, f"reuse_{kind}")
            for taker, giver in reuse.items():
                known = 0 <= taker < self.num_blocks and 0 <= giver < self.num_blocks
                if not known or giver in gone or giver in reuse or taker in gone:
                    raise ValueError(f"{kind} {taker} cannot run with the weights of {giver}")
        if len(self.drop_blocks) >= self.num_blocks:
            raise ValueError(f"cannot remove all {self.num_blocks} blocks")
        return self

    def _check(self, what: str, indices: list[int]) -> None:
        wrong = [i for i in indices if not 0 <= i < self.num_blocks]
        if wrong:
            raise ValueError(f"{what} {wrong} do not exist in a model of {self.num_blocks} blocks")
        if len(set(indices)) != len(indices):
            raise ValueError(f"{what}: one is listed twice in {indices}")
        if indices != sorted(indices):
            raise ValueError(f"{what} must be in ascending order, got {indices}")


Bits = Literal[2, 3, 4, 5, 6, 8]


class Width(Record):
    """How fine a linear's grid is; a bare number stands for its bits.

    Attributes:
        bits: bits per weight.
        group_size: inputs that share a scale, 0 for whole rows; None: as the stage says.
        symmetric: whether there are no zero points; None: as the stage says.
    """

    bits: Bits
    group_size: int | None = Field(None, ge=0)
    symmetric: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"bits": value} if isinstance(value, int) else value


class BitPlan(Record):
    """Which linears get which width; what no pattern matches is as the stage says.

    Attributes:
        linears: pattern to width; the first that matches a linear's full name counts. A
            pattern is a name as shells match it (* for anything, ? for a character, [..] for
            one of several), or `re:` and a regular expression for the whole name.
        reason: one sentence on how it was chosen.
    """

    linears: dict[str, Width] = {}
    reason: str = ""

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for pattern in self.linears:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return self
