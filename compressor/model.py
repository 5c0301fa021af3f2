"""Models in: a Hugging Face folder, a hub id, a GGUF file, a file inside a package."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from compressor.blocks import Blocks
from compressor.checkpoint import Checkpoint, code_files
from compressor.decoder import skeleton
from compressor.errors import CheckpointError, SourceError
from compressor.families import native_config
from compressor.fetch import locate_model, model_files
from compressor.sources import ModelSource


def materialise(source: ModelSource, out: Path) -> dict[str, Any]:
    """Put the source into `out` as a Hugging Face folder and return what it is.

    A folder becomes links to its files; a .gguf file is de-quantized to
    `source.dtype`, its tokenizer and chat template included.
    Raises `UnsupportedArchitecture` and `CheckpointError` before any long work.
    """
    path = locate_model(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"{path}: expected a Hugging Face folder or a .gguf file")
        _from_gguf(path, out, getattr(torch, source.dtype))
    else:
        for code in code_files(Checkpoint(path).config):
            shutil.copyfile(code, out / code.name)
        for file in model_files(path):
            (out / file.name).symlink_to(file.resolve())
    checkpoint = Checkpoint(out)
    blocks = Blocks(skeleton(out))
    _check_tokenizer(out, checkpoint)
    return {
        "family": native_config(checkpoint.config).get("model_type"),
        "blocks": len(blocks),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
    }


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder; raises `CheckpointError` when there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: no tokenizer can be loaded ({reason})") from error
    return tokenizer


def _check_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer that knows more tokens than the embedding has rows."""
    size = native_config(checkpoint.config).get("vocab_size")
    highest = max(load_tokenizer(folder).get_vocab().values(), default=0)
    if size is not None and highest >= size:
        raise CheckpointError(
            f"{folder}: the tokenizer's highest id is {highest}, but config.vocab_size is {size}; "
            "the tokenizer belongs to another model"
        )


def _from_gguf(path: Path, out: Path, dtype: torch.dtype) -> None:
    from transformers import GgufConfig

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, LookupError, NotImplementedError, OSError, struct.error) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"{path}: this GGUF file cannot be read ({reason})") from error
    model.config.__dict__.pop("quantization_config", None)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{path}: {name} does not fit into {dtype}; set model.dtype to bfloat16 or float32"
            )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
