"""What a run starts from: the model's folder, and the windows of text of each role."""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import save_file

from compressor.checkpoint import write_json
from compressor.errors import ConfigError
from compressor.fetch import pinned
from compressor.model import load_tokenizer, materialise
from compressor.runtimes.base import Facts
from compressor.text import windows
from pipelines.job import Job
from pipelines.plan import ROLES, text_source

WINDOWS, TEXT = "windows.safetensors", "text.json"


def model(job: Job) -> dict[str, Any]:
    """Import a source as a Hugging Face folder."""
    source = job.config.head.models[job.stage.label]
    return materialise(pinned(source, job.stage.params["fingerprint"]), job.out)


def text(job: Job) -> dict[str, Any]:
    """Cut one role's windows, apart from those of the roles before it."""
    role = job.stage.params["role"]
    source, spec = text_source(job.config, role), getattr(job.config.head.text, role)
    assert source is not None
    context = Facts.of(job.inputs["tokenizer"]).context
    if context is not None and spec.length > context:
        raise ConfigError(
            f"text.{role}.length: {spec.length} tokens, but the model reads at most {context}; "
            f"set it (--length) to {context} or less"
        )
    used: dict[str, int] = {}
    hashes: frozenset[str] = frozenset()
    for earlier in (r for r in ROLES if r in job.inputs):
        record = json.loads((job.inputs[earlier] / TEXT).read_text())
        used, hashes = record["used"], frozenset(record["hashes"])
    found = windows(
        pinned(source, job.stage.params["fingerprint"]),
        load_tokenizer(job.inputs["tokenizer"]),
        spec,
        seed=job.config.head.seed,
        used=used,
        hashes=hashes,
    )
    save_file({"tokens": found.tokens}, job.out / WINDOWS)
    write_json(job.out / TEXT, {"used": found.used, "hashes": sorted(found.hashes)})
    return {
        "windows": len(found.tokens),
        "length": found.tokens.shape[1],
        "documents": found.documents,
        "repeated": found.repeated,
        "sha256": found.digest,
    }
