"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from threading import get_ident


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path`, whose folder is made when missing, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
