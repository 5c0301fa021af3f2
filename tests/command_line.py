"""The command line as a process of its own: run to its end, or killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CODE = "from pipelines.cli import main; main()"
ROOT = Path(__file__).parents[1]
PYTHON = (sys.executable, "-c", CODE)


def compress(
    folder: Path, *args: str, python: Sequence[str] = PYTHON
) -> subprocess.CompletedProcess[str]:
    """Run the command line in `folder` and wait for it."""
    child = start(folder, *args, python=python)
    stdout, stderr = child.communicate()
    return subprocess.CompletedProcess(args, child.returncode, stdout, stderr)


def start(folder: Path, *args: str, python: Sequence[str] = PYTHON) -> subprocess.Popen[str]:
    """Begin it; Ctrl-C reaches it also where these tests run in the background of a shell."""
    return subprocess.Popen(
        [*python, *args],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(folder: Path, sign: str, *args: str, python: Sequence[str] = PYTHON) -> None:
    """Run it and kill it (-9) as soon as a file in `folder` matches `sign`."""
    child = start(folder, *args, python=python)
    deadline = time.monotonic() + 120
    while not list(folder.glob(sign)):
        assert time.monotonic() < deadline
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    child.kill()
    child.communicate()


def hashes(folder: Path) -> dict[str, str]:
    """Path -> sha256 of everything in an artifact, from its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {f["path"]: f["sha256"] for f in manifest["files"]}
