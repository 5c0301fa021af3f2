"""The YAML of a run: read, checked as a whole, and frozen; every fault is named by its line."""

from __future__ import annotations

import importlib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from compressor.errors import ConfigError, did_you_mean
from compressor.evaluate import EvaluateParams
from compressor.methods import Method, Params
from compressor.sources import ModelSource, Source, TextRole, TextSource

VERBS = ("score", "select", "prune", "heal", "allocate", "quantize", "export")
Path_ = tuple[str | int, ...]


class TextConfig(Source):
    """The text of a run: one shared source and how much of it each role gets.

    Roles never share a document as long as there are enough, and never a window.
    """

    source: TextSource | None = None
    evaluation: TextRole | None = None
    calibration: TextRole | None = None
    healing: TextRole | None = None


class Head(Source):
    """Everything of a run's YAML but its stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = Field(4, gt=0, description="windows that go through the model together")
    model: ModelSource
    parent: ModelSource | None = None
    reference: ModelSource | None = Field(
        None, description="what every checkpoint is compared with, in the place of the model"
    )
    text: TextConfig = TextConfig()
    evaluate: EvaluateParams = EvaluateParams()

    @property
    def models(self) -> dict[str, ModelSource]:
        """Every model that is imported, by its key."""
        given = {"model": self.model, "parent": self.parent, "reference": self.reference}
        return {key: source for key, source in given.items() if source}


@dataclass(frozen=True)
class StageConfig:
    """One stage: a verb and its methods with their parameters; only `score` has several."""

    verb: str
    methods: dict[str, Params]


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration."""

    head: Head
    stages: tuple[StageConfig, ...]


def methods(verb: str) -> dict[str, Method]:
    """The method table of a verb."""
    table: dict[str, Method] = importlib.import_module(f"compressor.{verb}").METHODS
    return table


def load(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides and check everything.

    Raises `ConfigError` with one line per fault: file, line, key, what was expected.
    """
    tree = read(path)
    override(tree, overrides)
    return parse(tree, str(path))


def read(path: Path) -> dict[str, Any]:
    """The tree of a YAML file, unchecked; raises `ConfigError` when it holds none."""
    try:
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        known = [str(p) for p in Path("configs").glob("*.yaml")]
        raise ConfigError(f"{path}: no such file{did_you_mean(str(path), known)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except YAMLError as error:  # a control character has no mark
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys such as name, model, text, stages")
    return tree


def override(tree: dict[str, Any], overrides: tuple[str, ...]) -> None:
    """Apply `a.b=c` overrides to a tree, in place; raises `ConfigError` for one that cannot be."""
    for each in overrides:
        _override(tree, each)


def parse(tree: dict[str, Any], origin: str) -> RunConfig:
    """Check a parsed tree; `origin` names it in messages."""
    faults: list[tuple[Path_, str]] = []
    head = _build(Head, {k: v for k, v in tree.items() if k != "stages"}, (), faults)
    stages = []
    items = tree.get("stages") or []
    if not isinstance(items, list):
        faults.append((("stages",), "expected a list of stages"))
        items = []
    for index, item in enumerate(items):
        stage = _stage(item, ("stages", index), faults)
        if stage:
            stages.append(stage)
    if faults:
        raise ConfigError(
            "\n".join(f"{origin}{_line(tree, p)}: {_dotted(p)}{text}" for p, text in faults)
        )
    assert isinstance(head, Head)
    return RunConfig(head, tuple(stages))


def _stage(item: Any, path: Path_, faults: list[tuple[Path_, str]]) -> StageConfig | None:
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict) or len(item) != 1:
        faults.append((path, "expected one verb, such as `- select: {method: contiguous, n: 4}`"))
        return None
    verb, body = next(iter(item.items()))
    if verb not in VERBS:
        faults.append(((*path, verb), f"unknown verb{did_you_mean(str(verb), VERBS)}"))
        return None
    wanted = _wanted(verb, body, (*path, verb), faults)
    built = {
        name: _build(methods(verb)[name].params, body or {}, where, faults)
        for name, (body, where) in wanted.items()
    }
    return StageConfig(verb, {k: v for k, v in built.items() if isinstance(v, Params)})


def _wanted(
    verb: str, body: Any, path: Path_, faults: list[tuple[Path_, str]]
) -> dict[str, tuple[dict[str, Any], Path_]]:
    """{method: (its parameters, where they stand)} as written in one stage."""
    table = methods(verb)
    body = dict(_spelt_out(verb, body))
    if verb == "score":
        wanted = {name: (value or {}, (*path, name)) for name, value in body.items()}
        if not wanted:
            faults.append((path, f"name at least one score; known: {', '.join(sorted(table))}"))
    else:
        name = str(body.pop("method", next(iter(table))))
        wanted = {name: (body, path)}
    for name in [n for n in wanted if n not in table]:
        faults.append(
            (wanted.pop(name)[1], f"unknown method {name!r}{did_you_mean(str(name), table)}")
        )
    return wanted


def _spelt_out(verb: str, body: Any) -> dict[str, Any]:
    """A stage's body as a mapping, whether it was left out, one name or a list of scores."""
    if isinstance(body, dict):
        return body
    if body is None:
        return {}
    if verb == "score":
        return dict.fromkeys(map(str, body if isinstance(body, list) else [body]))
    return {"method": body}


def _build(
    model: type[BaseModel], values: Any, path: Path_, faults: list[tuple[Path_, str]]
) -> BaseModel | None:
    try:
        return model.model_validate(_plain(values))
    except ValidationError as error:
        for fault in error.errors():
            where = tuple(fault["loc"])
            text = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                known = _fields(model, where[:-1])
                text = f"unknown key{did_you_mean(str(where[-1]), known)}"
            elif fault["type"] not in ("missing", "value_error"):
                text += f", got {fault['input']!r}"
            faults.append(((*path, *where), text))
        return None


def _fields(model: type[BaseModel], path: Path_) -> list[str]:
    """Field names of the model that stands at `path` below `model`."""
    for name in path:
        field = model.model_fields.get(str(name))
        options = _union(field.annotation) if field else ()
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if inner:
            model = inner[0]
    return list(model.model_fields)


def _union(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _override(tree: Any, override: str) -> None:
    """Apply `a.b=c`; a verb in the path stands for every stage of that verb."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: expected key=value, such as heal.steps=20")
    *parents, last = dotted.removeprefix("stages.").split(".")
    try:
        value = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value") from error
    nodes: list[Any] = [tree]
    if parents and parents[0] in VERBS:
        nodes = _stages_of(tree, parents.pop(0), override)
    for name in parents:
        nodes = [_child(node, name, override) for node in nodes]
    for node in nodes:
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {dotted} does not lead to a key of the file")
        node[last] = value


def _stages_of(tree: Any, verb: str, override: str) -> list[Any]:
    found = []
    items = tree.get("stages")
    for index, item in enumerate(items if isinstance(items, list) else []):
        if item == verb:
            tree["stages"][index] = item = {verb: {}}
        if isinstance(item, dict) and verb in item:
            item[verb] = _spelt_out(verb, item[verb])
            found.append(item[verb])
    if not found:
        raise ConfigError(f"--set {override}: the file has no stage {verb!r}")
    return found


def _child(node: Any, name: str, override: str) -> Any:
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: {name!r} does not lead to a key of the file")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _line(tree: Any, path: Path_) -> str:
    """`:line` of the deepest part of `path` that stands in the file."""
    line = None
    for name in path:
        marks = getattr(getattr(tree, "lc", None), "data", None) or {}
        if name not in marks:
            break
        line = marks[name][0] + 1
        tree = tree[name]
    return f":{line}" if line else ""


def _dotted(path: Path_) -> str:
    text = ""
    for name in path:
        text += f"[{name}]" if isinstance(name, int) else f".{name}"
    return f"{text.removeprefix('.')}: " if text else ""
