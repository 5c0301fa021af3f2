"""One function per verb: from a job's folders to a call of the library and back; glue only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compressor import text
from compressor.checkpoint import Checkpoint
from compressor.model import load_tokenizer, materialise
from compressor.records import Scores, Selection
from pipelines.plan import ROLES, text_source
from pipelines.run import Job

SCORES = "scores.json"
SELECTION = "selection.json"
