"""The model card: hub metadata, what was done, what it cost, how to load and to rebuild it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData

from compressor import __version__
from compressor.errors import PublishError
from compressor.publish.bundle import Bundle
from compressor.publish.origin import Origin
from compressor.publish.snippets import readers, snippets

_TAGS = {"prune": "pruned", "heal": "healed", "quantize": "quantized"}
_INSTALL = {
    "transformers": "pip install transformers torch",
    "onnxruntime": "pip install onnxruntime transformers",
    "onnxruntime-genai": "pip install onnxruntime-genai huggingface-hub",
    "vLLM": "pip install vllm",
}
_PACKAGES = {"compressed-tensors": " compressed-tensors", "gptq": " optimum gptqmodel"}
_UNPROVED = ": by what its source says, not run by this project"
_PADDING = (
    "Batches of unequal lengths: the graph takes padding on the right only, with an "
    "`attention_mask` that says so; transformers pads on either side."
)


@dataclass(frozen=True)
class Step:
    """One stage: its verb, its method, the method's source and what came of it."""

    verb: str
    method: str
    source: str
    outcome: str


@dataclass(frozen=True)
class Story:
    """What the records of the runs say of an export.

    Attributes:
        name, revision: where it is published.
        steps: the stages that made it, the first first.
        table: the price of every stage, as Markdown; notes: what it rests on, a sentence each.
        rebuild: {file name: its YAML}, the first to run first.
        draft: how it does as a draft of its parent, where that was measured.
    """

    name: str
    revision: str
    origin: Origin
    steps: Sequence[Step]
    table: str
    notes: Sequence[str]
    rebuild: Mapping[str, str]
    draft: str = ""


def card(bundle: Bundle, story: Story) -> str:
    """The README.md of a published export; raises `PublishError` when its metadata is refused."""
    sections = {
        "What it costs": _cost(bundle, story),
        "Loading": _loading(bundle, story),
        "As a draft of its parent": plain(story.draft),
        "How it was made": _made(bundle, story),
        "Files": _files(bundle),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    head = f"# {story.name.partition('/')[2]}\n\n{_summary(story)}"
    text = f"---\n{_metadata(story).to_yaml()}\n---\n\n{head}\n\n{body}\n"
    try:
        return str(ModelCard(text))
    except ValueError as error:
        raise PublishError(f"the card's metadata is not valid: {error}") from error


def _metadata(story: Story) -> ModelCardData:
    verbs = [step.verb for step in story.steps]
    relation = "quantized" if "quantize" in verbs else "finetune"
    base = story.origin.base_model
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        license=story.origin.license or "other",
        license_name=None if story.origin.license else "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["compress", "onnx", *(tag for verb, tag in _TAGS.items() if verb in verbs)],
    )


def _summary(story: Story) -> str:
    base = story.origin.base_model
    source = (
        f"[{plain(base)}](https://huggingface.co/{base})" if base else plain(story.origin.words)
    )
    unknown = (
        ""
        if story.origin.license
        else " The licence of the source is not known to whoever made this card: find it out "
        "before you use or pass on the weights."
    )
    return f"{source}, compressed by `compress` {__version__}.{unknown}"


def _cost(bundle: Bundle, story: Story) -> str:
    made = bundle.manifest
    notes = [
        *story.notes,
        f"ONNX against torch: {bundle.parity['summary']}",
        f"rates were measured on {made.device} with {made.threads} thread(s), batch 1",
    ]
    listed = "\n".join(f"- {plain(note)}" for note in notes)
    return f"{story.table}\n\n{listed}" if story.table else listed


def _loading(bundle: Bundle, story: Story) -> str:
    parts = []
    for runtime, (language, code) in snippets(bundle, story.name, story.revision).items():
        needs = _INSTALL[runtime]
        if runtime == "transformers" and readers(bundle):
            needs += _PACKAGES[bundle.config["quantization_config"]["quant_method"]]
        unproved = _UNPROVED if runtime == "vLLM" else ""
        parts.append(f"**{runtime}** (`{needs}`){unproved}\n\n{fenced(code, language)}")
    parts.append(_PADDING)
    if rows := readers(bundle):
        cells = [[row["reader"], row["speed"], row["why"]] for row in rows]
        parts.append(_table(("who loads the integers", "how", "why"), cells))
    return "\n\n".join(parts)


def _made(bundle: Bundle, story: Story) -> str:
    cells = [[step.verb, step.method, step.source, step.outcome] for step in story.steps]
    versions = ", ".join(f"{name} {v}" for name, v in bundle.manifest.libraries.items())
    files = "\n\n".join(
        f"`compress run {name}`, with this `{name}`:\n\n{fenced(text, 'yaml')}"
        for name, text in story.rebuild.items()
    )
    return (
        f"{_table(('stage', 'method', 'source', 'outcome'), cells)}\n\nWith {plain(versions)}.\n\n"
        "<details><summary>Rebuild it: every setting, defaults included (paths of the machine "
        f"shortened to their last part)</summary>\n\n{files}\n\n</details>"
    )


def _files(bundle: Bundle) -> str:
    cells = [[item.path, f"{item.size_bytes:,}", item.sha256] for item in bundle.items]
    table = _table(("file", "bytes", "sha256"), cells)
    return f"<details><summary>{len(cells)} files</summary>\n\n{table}\n\n</details>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    lines += [f"| {' | '.join(plain(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", " ".join(text.split()))


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
