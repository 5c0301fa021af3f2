"""Publish: an export that passed its gate, described by a card, put where others load it from."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compressor.errors import PublishError, did_you_mean


@dataclass(frozen=True)
class Item:
    """One file to publish.

    Attributes:
        path: its path there, with forward slashes.
        source: the file here, or its bytes.
        sha256: of its bytes, as hex.
    """

    path: str
    source: Path | bytes
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Request:
    """How to publish.

    Attributes:
        private: for a place that is made by this; one that exists must agree.
        revision: the branch, made when it is not there.
        tag: a name for the result, given only once everything was read back.
        replace: delete what else the branch holds, in the same commit.
    """

    private: bool = True
    revision: str = "main"
    tag: str | None = None
    replace: bool = False


@dataclass(frozen=True)
class Receipt:
    """Where the files are: a page, and the commit that was read back and compared."""

    url: str
    commit: str


class Destination(Protocol):
    """A place that files can be put to.

    Attributes:
        name: what others load the model by.
    """

    name: str

    def put(self, items: Sequence[Item], request: Request) -> Receipt:
        """Upload, read back and compare; raises `PublishError`."""


DESTINATIONS = {"hf": "compressor.publish.hub:Hub"}
"""URL scheme -> `module:class`, which takes what stands behind `://`."""


def destination(url: str) -> Destination:
    """The place that `url` means, such as `hf://org/name`; raises `PublishError`."""
    scheme, separator, place = url.partition("://")
    if not separator or scheme not in DESTINATIONS:
        known = [f"{each}://org/name" for each in DESTINATIONS]
        raise PublishError(f"--to {url}: no such destination{did_you_mean(url, known)}")
    module, _, name = DESTINATIONS[scheme].partition(":")
    found: Destination = getattr(importlib.import_module(module), name)(place)
    return found
