"""`compress draft`: a shallow model as the draft of its parent, measured where it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click

from compressor import progress
from compressor.errors import ConfigError, SourceError
from compressor.fetch import fingerprint_folder, locate_model
from compressor.files import write_whole
from compressor.sources import ModelSource, TextRole
from pipelines import display
from pipelines.commands import JSON, QUIET, STORE
from pipelines.verbs import TEXT, model_source, role_source

DRAFTS = "drafts"


@click.command()
@click.argument("shallow")
@click.argument("parent")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="File of prompts, one on every line."
)
@TEXT[0]
@TEXT[1]
@click.option("--windows", default=4, show_default=True, help="Prompts to cut from --text.")
@click.option("--length", default=64, show_default=True, help="Tokens of such a prompt.")
@click.option(
    "--draft-tokens", type=click.IntRange(min=1), default=4, show_default=True,
    help="Tokens drafted in a round.",
)  # fmt: skip
@click.option(
    "--new-tokens", type=click.IntRange(min=2), default=64, show_default=True,
    help="Tokens generated after every prompt.",
)  # fmt: skip
@STORE
@JSON
@QUIET
def draft(
    shallow: str,
    parent: str,
    prompts: Path | None,
    text: str | None,
    field: str | None,
    windows: int,
    length: int,
    draft_tokens: int,
    new_tokens: int,
    store: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure SHALLOW (a checkpoint, or an export) as the draft of PARENT, greedily.

    The text must be the parent's own, token by token, or the command fails. The figures are
    kept with the hashes of both, and compress publish writes them on the card of what was made
    from that PARENT.

    \b
    compress draft exported PARENT --prompts prompts.txt
    compress draft exported PARENT --text heldout.txt --draft-tokens 6
    """
    import torch

    from compressor.evaluate.draft import load, measure
    from compressor.model import load_tokenizer
    from compressor.text import windows as cut
    from pipelines.quiet import silence_libraries

    if (prompts is None) == (text is None):
        raise ConfigError("give either --prompts or --text")
    silence_libraries()
    if not quiet:
        progress.install(display.Bars())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, original = checkpoint(shallow), _folder(parent)
    models = load(folder, original, device)
    tokenizer = load_tokenizer(original)
    if prompts:
        rows = _lines(prompts, tokenizer)
    else:
        role = TextRole.model_validate(role_source(str(text), field, windows, length))
        assert role.source
        rows = list(cut(role.source, tokenizer, role, seed=0).tokens)
    measured = measure(*models, rows, draft_tokens=draft_tokens, new_tokens=new_tokens)
    told = hashlib.sha256(json.dumps([row.tolist() for row in rows]).encode()).hexdigest()
    names = {"parent": fingerprint_folder(original), "text": f"sha256:{told}"}
    measured = {"format": 1, "device": device, **names, **measured}
    write_whole(record_path(folder, original, store), json.dumps(measured, indent=1) + "\n")
    click.echo(json.dumps(measured, indent=1) if as_json else in_words(measured))


def checkpoint(name: str) -> Path:
    """The checkpoint that `name` means; of an export, its safetensors."""
    folder = _folder(name)
    return folder / "safetensors" if (folder / "safetensors").is_dir() else folder


def record_path(folder: Path, parent: Path, store: Path) -> Path:
    """Where the figures of a draft and its parent are kept, by the hashes of their files."""
    digests = [fingerprint_folder(each).removeprefix("sha256:")[:16] for each in (folder, parent)]
    return store / DRAFTS / f"{'-'.join(digests)}.json"


def in_words(measured: dict[str, Any]) -> str:
    """The figures as a paragraph, for the terminal and the card."""
    rates = {
        name: f"{rate['all']:.1f} ({rate['min']:.1f} to {rate['max']:.1f} by prompt)"
        for name, rate in measured["tokens_per_second"].items()
    }
    return (
        f"Greedy text equal to the parent's own, {measured['new_tokens']} new tokens after "
        f"{measured['prompts']} prompts, {measured['draft_tokens']} draft tokens a round. "
        f"{measured['accepted']} of {measured['drafted']} drafted tokens accepted "
        f"({100 * measured['acceptance']:.1f} %), {measured['mean_accepted']:.2f} a round; a token "
        f"is accepted after accepted ones with chance {measured['chance']:.3f}. Tokens/s: assisted "
        f"{rates['assisted']}, parent alone {rates['parent']}, draft alone {rates['draft']}; "
        f"speed-up {measured['speedup']:.2f}, predicted {measured['predicted_speedup']:.2f} at a "
        f"draft's cost of {measured['cost']:.2f} parent tokens ({measured['device']}, "
        f"{measured['threads']} threads, transformers, batch 1)."
    )


def _folder(name: str) -> Path:
    found = locate_model(ModelSource.model_validate(model_source(name)))
    if not found.is_dir():
        raise SourceError(f"{found}: expected a Hugging Face folder; run: compress export {name}")
    return found


def _lines(path: Path, tokenizer: Any) -> list[Any]:
    """A prompt's tokens (S,) per line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts {path}: no line with a prompt")
    return [tokenizer(line, return_tensors="pt")["input_ids"][0] for line in lines]
