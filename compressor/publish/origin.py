"""Where a model comes from: its hub name and its licence, as far as its source says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compressor.fetch import locate_model
from compressor.sources import ModelSource


@dataclass(frozen=True)
class Origin:
    """What a source says of itself.

    Attributes:
        words: what it is called where it has no hub name; never a path of this machine.
        base_model: its hub name.
        license: its licence, as the hub spells it.
    """

    words: str
    base_model: str | None = None
    license: str | None = None


def origin(source: ModelSource) -> Origin:
    """What is known of a source; the hub is asked only for a source that is on it."""
    if source.hub:
        return Origin(source.hub, source.hub, _of_hub(source.hub, source.revision))
    path = locate_model(source)
    words = f"{source.file or path.name} of the Python package {source.package}"
    return Origin(words if source.package else path.name, None, _of_file(path))


def _of_hub(name: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        card = HfApi().model_info(name, revision=revision).card_data
    except (HTTPError, OSError):  # an unknown licence is asked for
        return None
    return card.license if card else None


def _of_file(path: Path) -> str | None:
    """The licence in a .gguf file's header, or in the metadata of a folder's README.md."""
    if path.is_file():
        from gguf import GGUFReader

        field = GGUFReader(path).get_field("general.license")
        return str(field.contents()) if field else None
    if (path / "README.md").is_file():
        from huggingface_hub import ModelCard

        return ModelCard.load(path / "README.md").data.license
    return None
