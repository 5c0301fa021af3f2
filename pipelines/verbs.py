"""Each verb alone: a run of one stage on any model, its options made from the method table."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from compressor.errors import ConfigError, SelectionError
from compressor.records import Selection
from pipelines import config as configuration
from pipelines import ranks
from pipelines.commands import JSON, QUIET, STORE, execute
from pipelines.run import Options

Builder = Callable[..., dict[str, Any]]
_OWN = ("blocks", "attention", "ffn")
"""Parameters with an option of their own spelling."""

TEXT = (
    click.option(
        "--text", metavar="TEXT", help="File, PACKAGE:FILE or hub:DATASET to read text from."
    ),
    click.option("--field", help="Column or key of the text."),
    click.option("--windows", type=int, default=16, show_default=True, help="Windows to cut."),
    click.option("--length", type=int, default=512, show_default=True, help="Tokens in a window."),
)
OUT = click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Also copy the result here (must be new)."
)
MODEL = click.argument("model")


def parameters(verb: str, own: tuple[str, ...] = ()) -> list[Callable[..., Any]]:
    """One option per parameter of any method of a verb, its default in the help."""
    table = configuration.methods(verb)
    options: list[Callable[..., Any]] = []
    if len(table) > 1 and "method" not in own:
        names = ", ".join(table)
        options.append(
            click.option("--method", help=f"One of: {names} (default {next(iter(table))}).")
        )
    homes: dict[str, list[str]] = {}
    for name, row in table.items():
        for field in row.params.model_fields:
            homes.setdefault(field, []).append(name)
    for field, owners in homes.items():
        infos = {name: table[name].params.model_fields[field] for name in owners}
        defaults: dict[str, list[str]] = {}
        for name, info in infos.items():
            value = info.get_default(call_default_factory=True)
            defaults.setdefault(json.dumps(value, default=lambda _: "required"), []).append(name)
        listed = "; ".join(
            value if len(names) == len(table) else f"{value} of {', '.join(names)}"
            for value, names in defaults.items()
        )
        told = f"{infos[owners[0]].description or ''} [default {listed}]"
        flags = [f"--{field.replace('_', '-')}", *(["-n"] if field == "n" else [])]
        if field not in own:
            options.append(click.option(*flags, field, type=_YamlValue(), help=told.strip()))
    return options


class _YamlValue(click.ParamType[Any]):
    """A value spelt as in YAML; the method's own parameter class checks it."""

    name = "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read `4`, `true`, `[1, 2]` or a word."""
        try:
            return YAML(typ="safe").load(value) if isinstance(value, str) else value
        except YAMLError:
            self.fail(f"{value!r} is not a YAML value", param, ctx)


def alone(
    verb: str, role: str | None, own: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorate the builder of a configuration with a verb's model, text and method options."""

    def decorate(build: Builder) -> click.Command:
        def command(
            model: str, out: Path | None, store: Path, as_json: bool, quiet: bool, **given: Any
        ) -> None:
            text = {
                name: given.pop(name) for name in ("text", "field", "windows", "length") if role
            }
            tree = {"name": run_name(verb, model), "model": model_source(model)}
            tree |= build(**{k: v for k, v in given.items() if v is not None})
            if verb == "evaluate" and not text["text"]:
                raise click.UsageError("evaluate needs --text, which the model was not made from")
            if role and text["text"]:
                tree["text"] = {role: role_source(**text)}
            checked = configuration.parse(tree, f"compress {verb}")
            refuse_existing(out)
            record = execute(checked, store, Options(), as_json=as_json, quiet=quiet)
            if out and not ranks.rank():
                _deliver(Path(record["stages"][-1]["folder"]), out)
                click.echo(f"copied to {out}", err=True)

        command.__doc__ = build.__doc__
        command.__click_params__ = getattr(build, "__click_params__", [])  # type: ignore[attr-defined]
        for option in (
            QUIET,
            JSON,
            STORE,
            OUT,
            *(reversed(TEXT) if role else ()),
            *reversed(parameters(verb, own)),
            MODEL,
        ):
            command = option(command)
        return click.command(verb)(command)

    return decorate


@alone("score", "calibration")
def score(method: str | None = None, **params: Any) -> dict[str, Any]:
    """Score the blocks of MODEL; --method takes several names, joined by commas.

    \b
    compress score MODEL --method angular_distance,block_influence --text corpus.txt -o scores
    """
    table = configuration.methods("score")
    names = method.split(",") if method else [next(iter(table))]
    chosen: dict[str, dict[str, Any]] = {}
    for name in names:
        known = table[name].params.model_fields if name in table else params
        chosen[name] = {key: value for key, value in params.items() if key in known}
    return {"stages": [{"score": chosen}]}


@alone("prune", "calibration", own=_OWN)
@click.option("--selection", type=click.Path(path_type=Path), help="A selection.json.")
@click.option("--blocks", help="Blocks to remove, such as 13-18 or 3,7,12.")
@click.option("--attention", help="Blocks to remove the attention of.")
@click.option("--ffn", help="Blocks to remove the feed-forward of.")
def prune(selection: Path | None = None, **params: Any) -> dict[str, Any]:
    """Remove blocks and sublayers from MODEL by list or selection file, or by another method.

    \b
    compress prune MODEL --blocks 13-18 -o shallower
    compress prune MODEL --blocks 13-18 --attention 3,5 --ffn 7-9 -o shallower
    compress prune MODEL --method wanda --sparsity 0.5 --text corpus.txt -o sparse
    """
    lists = {kind: params.pop(kind) for kind in _OWN if kind in params}
    method = params.get("method", "blocks")
    row = configuration.methods("prune").get(method)
    if row is None or "selection" not in row.needs:
        if selection or lists:
            raise click.UsageError(f"--method {method} takes no selection and no list of parts")
        return {"stages": [{"prune": params}]}
    if (selection is None) == (not lists):
        raise click.UsageError("give either --selection or some of --blocks, --attention, --ffn")
    parts: dict[str, Any] = {
        kind: parse_blocks(listed, f"--{kind}") for kind, listed in lists.items()
    }
    if selection:
        chosen = Selection.load(selection)
        parts = {kind: getattr(chosen, f"drop_{kind}") for kind in _OWN}
        parts["num_blocks"] = chosen.num_blocks
        parts |= {"reuse_attention": chosen.reuse_attention, "reuse_ffn": chosen.reuse_ffn}
    return {"stages": [{"select": {"method": "fixed", **parts}}, {"prune": params}]}


@alone("heal", "healing")
@click.option("--parent", help="The model that MODEL was cut from, for distill and --around-cut.")
def heal(parent: str | None = None, **params: Any) -> dict[str, Any]:
    """Train MODEL on TEXT to recover what it lost; keeps the best, resumes after a crash.

    \b
    compress heal shallower --text corpus.jsonl --field text --windows 256 -o healed
    compress heal shallower --method lisa --text corpus.jsonl --max-seconds 28800 -o healed
    compress heal shallower --method distill --parent MODEL --text corpus.jsonl -o healed
    torchrun --nproc-per-node 2 -m pipelines heal shallower --text corpus.jsonl -o healed
    """
    return {"stages": [{"heal": params}]} | ({"parent": model_source(parent)} if parent else {})


@alone("export", None)
def export(**params: Any) -> dict[str, Any]:
    """Write MODEL as a safetensors folder and an ONNX folder, and check them against each other.

    \b
    compress export model-4bit -o exported
    compress bench exported
    """
    return {"stages": [{"export": params}], "evaluate": {"speed": False}}


@alone("evaluate", "evaluation")
@click.option("--reference", help="Model to compare with: KL, top-1, added loss by window.")
def evaluate(reference: str | None = None, **params: Any) -> dict[str, Any]:
    """Measure perplexity over held-out --text, size and speed of MODEL.

    \b
    compress evaluate MODEL --text heldout.txt --windows 32
    compress evaluate model-4bit --reference MODEL --text heldout.txt --windows 32
    """
    return {"evaluate": params} | ({"reference": model_source(reference)} if reference else {})


def model_source(model: str) -> dict[str, str]:
    """A `model:` entry from what a person types: a path that exists, else a hub id@revision."""
    if Path(model).expanduser().exists():
        return {"path": model}
    name, _, revision = model.partition("@")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return {"hub": name, "revision": revision} if revision else {"hub": name}
    raise ConfigError(f"{model}: no such folder or file, and not a hub id such as org/name")


def read_yaml(path: Path, option: str) -> Any:
    """What a YAML or JSON file holds; raises `ConfigError` when it cannot be read."""
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{option} {path}: not a file of YAML or JSON ({reason})") from error


def parse_blocks(text: str, option: str = "--blocks") -> list[int]:
    """[13, 14, 15, 20] from `13-15,20`; raises `SelectionError` for anything else."""
    blocks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise SelectionError(f"{option} {text}: expected indices such as 13-18 or 3,7,12")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SelectionError(
                f"{option} {text}: {part.strip()} ends before it begins; write {last}-{first}"
            )
        blocks += range(first, last + 1)
    return sorted(blocks)


def role_source(text: str, field: str | None, windows: int, length: int) -> dict[str, Any]:
    """A text role from what a person types: a file, PACKAGE:FILE or hub:DATASET."""
    source: dict[str, Any]
    package, _, file = text.partition(":")
    if Path(text).exists() or not file:
        source = {"path": text}
    elif package == "hub":
        source = {"dataset": file}
    else:
        source = {"package": package, "file": file}
    if field:
        source["field"] = field
    return {"source": source, "windows": windows, "length": length}


def run_name(verb: str, model: str) -> str:
    """The name of the run that a verb alone makes."""
    return re.sub(r"[^\w.-]+", "-", f"{verb}-{Path(model).name}").strip("-.")


def refuse_existing(out: Path | None) -> None:
    """Raise `ConfigError` when there is something at `out` already."""
    if out and out.exists():
        raise ConfigError(f"--out {out}: exists already; give a new path")


def _deliver(folder: Path, out: Path) -> None:
    """Copy a result to where the user wants it, whole or not at all."""
    draft = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(folder, draft)
    draft.rename(out)
