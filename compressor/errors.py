"""Every error a user can meet, and the words for them.

CompressError
├── ConfigError              a key, value or method in the YAML or on the command line
├── SourceError              a model or text that cannot be found or fetched
│   └── TextError            too little text, or text that cannot be read
├── CheckpointError          a folder that is not a sound checkpoint
├── UnsupportedArchitecture  a model family this tool does not handle
├── NotApplicable            a method that this model, unlike others, cannot be given
├── SelectionError           a budget or list that does not fit the model
├── QuantizationError        a grid, group size or calibration that cannot work
├── HealingError             training that diverged or cannot start
├── ExportError              a graph that cannot be built, or differs from the model
├── InferenceError           a folder that no runtime runs, or a prompt that does not fit
├── PublishError             an export that may not be published, or a place that refuses it
├── DraftError               a draft that does not fit its parent, or changes its text
├── ArtifactError            a stored result that is damaged or in use
└── MissingDependency        an optional package; the message holds the command

A message says what, where, what was got, what was expected and what to do.
The command line prints it on one line and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(CompressError):
    """A key, value or method in the configuration is wrong."""


class SourceError(CompressError):
    """A model or a text source cannot be found, read or fetched."""


class TextError(SourceError):
    """The text is empty, too short or in a shape that cannot be read."""


class CheckpointError(CompressError):
    """A folder is not a sound checkpoint."""


class UnsupportedArchitecture(CompressError):
    """The model's family is outside what this tool handles."""


class NotApplicable(CompressError):
    """A method cannot be applied to this model, though others can."""


class SelectionError(CompressError):
    """A selection or a budget does not fit the model."""


class QuantizationError(CompressError):
    """A quantization grid cannot be applied."""


class HealingError(CompressError):
    """Training cannot start or has diverged."""


class ExportError(CompressError):
    """An export cannot be built, or does not agree with the model."""


class NotEmitted(ExportError):
    """A model whose ONNX nodes are not emitted from its weights; it may still be traced."""


class InferenceError(CompressError):
    """A runtime cannot run a folder, or the model cannot read a prompt."""


class PublishError(CompressError):
    """An export may not be published, or its destination refuses it."""


class DraftError(CompressError):
    """A draft does not fit its parent, or its parent's text is not reproduced."""


class ArtifactError(CompressError):
    """A stored artifact is damaged, missing or in use."""


class MissingDependency(CompressError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """Name the package, the extra that brings it and what it is for."""
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"run: pip install 'compress-llm[{extra}]'"
        )


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest option, else the options, if any."""
    known = sorted(options)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f"; known: {', '.join(known)}" if known else ""
