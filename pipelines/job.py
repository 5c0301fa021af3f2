"""What a stage function gets to work with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compressor.methods import Params
from pipelines.config import RunConfig
from pipelines.plan import Stage


@dataclass(frozen=True)
class Job:
    """What a stage function gets.

    Attributes:
        methods: method -> parameters.
        inputs: role -> folder.
        out: an empty folder to write into.
        work: a folder for resuming; it survives a crash (not created yet).
    """

    stage: Stage
    config: RunConfig
    inputs: dict[str, Path]
    out: Path
    work: Path
    device: str

    @property
    def method(self) -> tuple[str, Params]:
        """The only method and its parameters."""
        ((name, params),) = self.stage.methods.items()
        return name, params
