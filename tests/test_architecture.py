"""Imports go one way, tables tell the truth, files and functions stay small."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pipelines.config import VERBS, methods
from pipelines.plan import VERSIONS
from pipelines.stages import STAGES

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("compressor/**/*.py"), *ROOT.glob("pipelines/**/*.py")])
VERB_FOLDERS = (*VERBS, "evaluate")
ROLES = {"calibration", "healing", "evaluation"}
ROLES |= {"scores", "selection", "parent", "teacher", "costs"}
FOLDERS = (*VERB_FOLDERS, "publish")
"""Folders on top of the library, which never import each other."""

LAYERS = (
    {"errors"},
    {
        "progress",
        "families",
        "files",
        "methods",
        "sources",
        "sparsity",
        "shallow",
        "memory",
        "spool",
        "units",
    },
    {"fetch", "artifact", "records", "checkpoint", "moments", "layouts"},
    {"blocks", "dense"},
    {"decoder"},
    {"walk", "model", "text", "sublayers", "magnitude", "ratings", "lineage"},
    {"cut", "inputs", "targets"},
    {"trial", "backward", "teacher", "runtimes"},
)
"""Modules of the library from the ground up; a module imports from lower layers only."""


def modules(path: Path) -> list[str]:
    """Every module of ours that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module in ("compressor", "pipelines"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("compressor", "pipelines")]


def layer(module: str) -> int:
    name = module.split(".")[1]
    if name in FOLDERS:
        return len(LAYERS)
    if name == "__version__":
        return 0
    return next(i for i, names in enumerate(LAYERS) if name in names)


def test_there_are_files() -> None:
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "pipelines":
        return
    imported = modules(path)
    assert not [m for m in imported if m.startswith("pipelines")]
    if parts[1] == "__init__":
        return
    if parts[1] in FOLDERS:
        others = [m for m in imported if m.split(".")[1] in FOLDERS]
        assert [m for m in others if m.split(".")[1] != parts[1]] == []
        return
    here = layer(".".join(parts))
    level = [m for m in imported if layer(m) == here and m.split(".")[1] != parts[1]]
    higher = [m for m in imported if layer(m) > here] + (level if here != 1 else [])
    assert higher == []


def test_the_pipelines_import_each_other_in_no_circle() -> None:
    names = {path.stem: path for path in ROOT.glob("pipelines/*.py")}
    assert len(names) > 20
    needs = {
        name: {m.split(".")[1] for m in modules(path) if m.startswith("pipelines.")} - {name}
        for name, path in names.items()
    }
    TopologicalSorter(needs).prepare()


def test_every_stage_of_a_plan_has_its_function() -> None:
    assert {*VERBS, *VERSIONS, "evaluate", "teacher", "costs"} == STAGES.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_swallows_errors_or_asks_for_a_family(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("Exception", "BaseException", "everything")
        if isinstance(node, ast.Compare) and path.name != "families.py":
            compared = [ast.unparse(c) for c in (node.left, *node.comparators)]
            if any("model_type" in c for c in compared):
                assert isinstance(node.ops[0], ast.In | ast.NotIn)


@pytest.mark.parametrize("verb", VERB_FOLDERS)
def test_tables_point_at_functions_that_take_the_parameters(verb: str) -> None:
    table = methods(verb)
    assert table
    for row in table.values():
        assert row.summary
        assert row.source
        assert row.cost
        assert set(row.needs) <= ROLES
        target = row.load()
        assert inspect.getdoc(target)
        if verb in ("score", "select", "prune"):  # others get their parameters as one object
            signature = inspect.signature(target)
            keywords = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
            of_the_run = {"device", "batch_size"} if verb == "prune" else set()
            assert keywords - of_the_run == set(row.params.model_fields)


def test_every_method_is_described_in_the_tables_only_once() -> None:
    targets = [row.target for verb in VERB_FOLDERS for row in methods(verb).values()]
    for target in targets:
        assert importlib.util.find_spec(target.partition(":")[0])


@pytest.mark.parametrize("args", [["--help"], ["methods", "--json"], ["plan", "tiny.yaml"]])
def test_the_front_door_imports_no_torch(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "tiny.yaml").write_text("name: tiny\nmodel: {path: model}\nstages: [export]\n")
    script = (
        "import sys\nfrom pipelines.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: code = done.code\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
