"""An environment for each peer: venv, torch's CPU build, then the peer's own pins."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class NotInstalled(Exception):
    """A peer cannot be installed here; says what pip said."""


def environment(name: str, root: Path) -> Path:
    """The python of the peer's environment below `root`, made when it is not there or outdated.

    peers/NAME.txt pins everything but torch, whose version is constraints.txt's and whose build
    is the one for the CPU: from pip's own sources where they have it, else from PyTorch's index.
    Raises `NotInstalled`.
    """
    pins = HERE / f"{name}.txt"
    folder = root.resolve() / name
    python, mark = folder / "bin/python", folder / "installed"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return python
    constraints = (HERE.parents[1] / "constraints.txt").read_text().splitlines()
    torch = next(line for line in constraints if line.startswith("torch==")) + "+cpu"
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    try:
        _run([*install, torch])
    except NotInstalled:
        _run([*install, "--extra-index-url", TORCH_CPU_INDEX, torch])
    _run([*install, torch, "--requirement", str(pins)])
    mark.write_text(digest)
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled(" ".join(said)[:500] or done.stderr[-300:])
