"""One row of a verb's method table: where the function is and what a user should know of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict


class Params(BaseModel):
    """Base of every method's parameters: frozen, unknown keys refused, defaults only here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def needs(self) -> tuple[str, ...]:
        """Roles that are read beside the method's own because of what is asked for here."""
        return ()


@dataclass(frozen=True)
class Method:
    """A method of a verb.

    Attributes:
        target: `module:function`, imported only when the method runs.
        params: its parameter class; the fields are the function's keyword arguments.
        summary: what it does, in one line.
        source: paper and section, or where it comes from.
        cost: what it takes, in forward passes or in words.
        needs: the roles it reads beside the checkpoint: a text (`calibration`, `healing`,
            `evaluation`), `selection`, `parent`, the model that the last prune cut, or `teacher`,
            the outputs over the healing text of the model that the first prune cut.
        version: rises whenever its numbers change, so that caches are not trusted.
    """

    target: str
    params: type[Params]
    summary: str
    source: str
    cost: str
    needs: tuple[str, ...] = ()
    version: int = 1

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, _, name = self.target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function
