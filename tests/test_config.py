"""Configurations: every shipped one loads, every fault is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from compressor.errors import ConfigError
from compressor.records import Width
from pipelines.config import RunConfig, load
from pipelines.quantize_commands import quantize

ROOT = Path(__file__).parents[1]
GOOD = """\
name: good
model: {path: model}
text:
  source: {path: corpus.jsonl, field: text}
  evaluation: {windows: 4, length: 32}
  healing: {windows: 4, length: 32}
stages:
  - score:
      lamp: {sparsity: 0.3}
      block_influence:
  - select: {method: lowest, n: 2, score: lamp}
  - prune
  - heal: {method: lora, steps: 3}
  - quantize: rtn
  - export
"""


def write(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def test_every_shipped_configuration_loads() -> None:
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        assert load(path).head.name == path.stem


def test_stages_and_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD))
    assert [(s.verb, sorted(s.methods)) for s in config.stages] == [
        ("score", ["block_influence", "lamp"]),
        ("select", ["lowest"]),
        ("prune", ["blocks"]),
        ("heal", ["lora"]),
        ("quantize", ["rtn"]),
        ("export", ["folders"]),
    ]
    assert config.stages[0].methods["lamp"].model_dump() == {"sparsity": 0.3}
    assert config.stages[3].methods["lora"].model_dump()["rank"] == 64
    assert config.head.seed == 0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: good", "nam: good", r":1: nam: unknown key \(did you mean 'name'\?\)"),
        ("model: {path: model}", "model: {pth: model}", r":2: model\.pth: unknown key .*'path'"),
        ("{path: model}", "{path: a, hub: b/c}", r":2: model: give exactly one of path, hub"),
        ("field: text}", "feild: text}", r":4: text\.source\.feild: unknown key .*'field'"),
        ("windows: 4, length: 32}\n  h", "windows: -4, length: 32}\n  h", r":5: .*greater than 0"),
        ("- prune", "- prunne", r":12: stages\[2\]\.prunne: unknown verb .*'prune'"),
        ("lamp: {s", "lammp: {s", r":9: .*unknown method 'lammp' \(did you mean 'lamp'\?\)"),
        ("method: lora", "method: lorra", r":13: .*unknown method 'lorra' .*'lora'"),
        ("steps: 3", "stepps: 3", r":13: stages\[3\]\.heal\.stepps: unknown key .*'steps'"),
        ("steps: 3", "steps: many", r":13: stages\[3\]\.heal\.steps: .*integer.*got 'many'"),
        ("n: 2, ", "", r":11: stages\[1\]\.select\.n: Field required"),
        ("- prune", "- {prune: , export: }", r":12: stages\[2\]: expected one verb"),
        ("- export", "- export: [", r":16: not valid YAML|:15: not valid YAML"),
        ("name: good", "name: a\0b", "not valid YAML: unacceptable character"),
        ("method: lora", "method: [lora]", r":13: .*unknown method .*'lora'"),
        ("quantize: rtn", "quantize: [rtn, gptq]", r":14: .*unknown method"),
        ("name: good", "name: ../evil", r":1: name: .*pattern"),
        ("name: good\n", "name: good\nname: bad\n", "not valid YAML"),
    ],
)
def test_faults_are_named_with_their_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(ConfigError, match=said):
        load(write(tmp_path, GOOD.replace(old, new)))


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("name: good", "nam: good").replace("steps: 3", "stepps: 3")
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("override", ["heal.steps=9", "stages.heal.steps=9"])
def test_an_override_reaches_every_stage_of_its_verb(override: str, tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD), (override,))
    assert config.stages[3].methods["lora"].model_dump()["steps"] == 9


@pytest.mark.parametrize("body", ["lamp", "[lamp]", "{lamp: }"])
def test_an_override_reaches_a_score_however_it_is_spelt(body: str, tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("stages:")] + f"stages:\n  - score: {body}\n"
    assert list(load(write(tmp_path, text)).stages[0].methods) == ["lamp"]
    (stage,) = load(tmp_path / "run.yaml", ("score.lamp.sparsity=0.2",)).stages
    assert stage.methods["lamp"].model_dump() == {"sparsity": 0.2}


def test_overrides_of_the_head_and_of_bare_stages(tmp_path: Path) -> None:
    overrides = ("model.path=other", "seed=3", "text.calibration.windows=2", "quantize.bits=8",
                 "text.calibration.length=16", "export.formats=[onnx]")  # fmt: skip
    config = load(write(tmp_path, GOOD), overrides)
    assert (config.head.model.path, config.head.seed) == ("other", 3)
    assert config.head.text.calibration is not None
    assert config.stages[4].methods["rtn"].model_dump()["bits"] == 8
    assert config.stages[5].methods["folders"].model_dump()["formats"] == ("onnx",)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("heal.steps", "expected key=value"),
        ("heal.steps=[1", "not a YAML value"),
        ("evaluate.sped=false", "did you mean 'speed'"),
        ("heal.stepps=3", "did you mean 'steps'"),
        ("score.lampp.sparsity=0.1", "did you mean 'lamp'"),
        ("name.x=3", "does not lead to a key"),
    ],
)
def test_bad_overrides_are_explained(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(write(tmp_path, GOOD), (override,))


def test_an_override_of_a_stage_that_is_not_there(tmp_path: Path) -> None:
    head = GOOD[: GOOD.index("stages:")]
    for stages in ("stages: 3\n", "stages: [export]\n", ""):
        with pytest.raises(ConfigError, match="the file has no stage 'heal'"):
            load(write(tmp_path, head + stages), ("heal.steps=3",))


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="expected keys such as name"):
        load(write(tmp_path, "just words"))
    with pytest.raises(ConfigError, match="expected keys such as name"):
        load(write(tmp_path, ""))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("yaml", "linears:\n  '*.down_proj': 8\n  '*.o_proj': {bits: 3, group_size: 32}\n"),
        (
            "json",
            '{"linears": {"*.down_proj": 8, "*.o_proj": {"bits": 3, "group_size": 32}}}',
        ),
    ],
)
def test_a_scheme_is_read_from_a_file(
    form: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr("pipelines.verbs.execute", lambda checked, *_, **__: seen.append(checked))
    file = tmp_path / f"plan.{form}"
    file.write_text(text)
    arguments = [str(tmp_path), "--method", "rtn", "--scheme", str(file)]
    assert CliRunner().invoke(quantize, arguments).exit_code == 0
    plan = dict(seen[0].stages[0].methods["rtn"])["scheme"]
    assert list(plan.linears) == ["*.down_proj", "*.o_proj"]
    assert plan.linears["*.down_proj"] == Width(bits=8)
    assert plan.linears["*.o_proj"] == Width(bits=3, group_size=32)
    file.write_text("linears: [")
    assert "not a file of YAML or JSON" in str(CliRunner().invoke(quantize, arguments).exception)
