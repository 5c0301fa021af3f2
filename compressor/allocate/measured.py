"""What a method measured, kept apart from budgets: it serves all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.allocate.probe import Costs
from compressor.records import Record

COSTS, ENERGIES = "costs.json", "energies.safetensors"


class CostTable(Record):
    """costs.json: per unit, under its first linear, what each width costs by `method`."""

    method: str
    costs: dict[str, dict[int, float]]


@dataclass(frozen=True)
class Measured:
    """What choosing widths starts from.

    Attributes:
        method: whose costs these are.
        costs: per unit, what each width costs.
        energies: mean square of each input (I,) of every unit, by first linear.
    """

    method: str
    costs: Costs
    energies: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write costs.json and energies.safetensors."""
        table = dict(zip(self.energies, self.costs, strict=True))
        CostTable(method=self.method, costs=table).save(folder / COSTS)
        save_file(self.energies, folder / ENERGIES)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read both again; raises `SelectionError` for a table that is none."""
        table, energies = CostTable.load(folder / COSTS), load_file(folder / ENERGIES)
        named = {name: energies[name] for name in table.costs}
        return cls(table.method, list(table.costs.values()), named)
