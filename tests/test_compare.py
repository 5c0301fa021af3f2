"""Comparing choices: every pair tried once, failures named, nothing done twice."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from compressor.errors import ConfigError
from compressor.records import Selection
from pipelines import leaderboard
from pipelines.compare import choices
from pipelines.compare_command import DEFAULTS
from pipelines.compare_command import compare as command
from tests.command_line import compress
from tests.tiny import save_project

ARGUMENTS = [
    "compare", "model", "--budget", "2", "--text", "corpus.jsonl", "--field", "text",
    "--windows", "4", "--held-out", "3", "--length", "24",
    "--scores", "angular_distance,block_influence,lamp", "--selections", "lowest,simple",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a corpus, and one finished comparison in `out`."""
    folder = tmp_path_factory.mktemp("compare")
    save_project(folder)
    done = compress(folder, *ARGUMENTS, "-o", "out", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "first.json").write_text(done.stdout)
    return folder


def board(project: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((project / "first.json").read_text())
    return value


def test_every_pair_is_there_and_the_best_is_first(project: Path) -> None:
    rows = board(project)["rows"]
    assert {row["choice"] for row in rows} == {
        "lowest / angular_distance", "lowest / block_influence", "lowest / lamp", "simple",
    }  # fmt: skip
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        assert len(row["parts"]["drop_blocks"]) == 2
        assert row["added"] == pytest.approx(row["loss"] - board(project)["original"]["loss"])
        assert 0 <= row["top1_agreement"] <= 1
        assert row["kl"] > 0


def test_the_original_agrees_with_itself(project: Path) -> None:
    original = board(project)["original"]
    assert original["kl"] == pytest.approx(0, abs=1e-6)
    assert original["top1_agreement"] == 1


def test_a_choice_costs_what_pruning_it_costs(project: Path) -> None:
    """The leaderboard's loss is that of a checkpoint really cut the same way."""
    row = board(project)["rows"][-1]
    blocks = ",".join(map(str, row["parts"]["drop_blocks"]))
    assert compress(project, "prune", "model", "--blocks", blocks, "-o", "cut").returncode == 0
    text = ["--text", "corpus.jsonl", "--field", "text", "--windows", "3", "--length", "24"]
    done = compress(project, "evaluate", "cut", *text, "--speed", "false", "--json")
    assert done.returncode == 0, done.stderr
    nll = json.loads(done.stdout)["stages"][-1]["metrics"]["nll"]
    assert row["loss"] == pytest.approx(nll, abs=1e-5)


def test_nothing_is_done_twice(project: Path) -> None:
    before = sorted((project / "artifacts/store").iterdir())
    again = compress(project, *ARGUMENTS, "--json")
    assert json.loads(again.stdout) == board(project)
    assert sorted((project / "artifacts/store").iterdir()) == before
    assert "> " not in again.stderr


def test_files_are_delivered(project: Path) -> None:
    out = project / "out"
    assert json.loads((out / "leaderboard.json").read_text()) == board(project)
    lines = (out / "leaderboard.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 1 + 4
    assert (out / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    assert "exists already" in compress(project, *ARGUMENTS, "-o", "out").stderr


def test_what_cannot_be_chosen_is_named_and_the_others_go_on(project: Path) -> None:
    wanted = [*ARGUMENTS]
    wanted[wanted.index("lowest,simple")] = "contiguous,simple"
    wanted[wanted.index("angular_distance,block_influence,lamp")] = "block_influence"
    wanted[wanted.index("--budget") + 1] = "4"
    done = compress(project, *wanted, "--json")
    assert done.returncode == 1
    assert "no choice could be made" in done.stderr
    assert done.stderr.count("n = 4 is more than") == 1  # one reason, all whom it stops


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lowest'"):
        choices(["lowst"], ["lamp"], 2, "block")
    with pytest.raises(ConfigError, match=r"'fixed' cannot be asked for 2 x block"):
        choices(["fixed"], ["lamp"], 2, "block")


def test_only_scores_that_choices_go_by_are_computed(project: Path) -> None:
    wanted = [*ARGUMENTS]
    wanted[wanted.index("lowest,simple")] = "lowest/zd,simple"
    done = compress(project, *wanted, "--json")
    assert {row["choice"] for row in json.loads(done.stdout)["rows"]} == {"lowest / zd", "simple"}
    assert "> score zd\n" in done.stderr


def test_text_options_beside_a_configuration_are_refused(project: Path) -> None:
    done = compress(project, "compare", "tiny.yaml", "--budget", "2", "--held-out", "3")
    assert done.returncode == 1
    assert "--held-out would do nothing; write --set text.evaluation.windows=" in done.stderr


def test_a_selection_without_scores_is_tried_once() -> None:
    asked = choices(["simple", "lowest"], ["lamp", "zd"], 3, "block")
    assert [c.label for c in asked] == ["simple", "lowest / lamp", "lowest / zd"]
    assert {c.settings["n"] for c in asked} == {3}


def in_process(monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> Any:
    """The leaderboard that the command prints, or what it raises."""
    monkeypatch.chdir(folder)
    text = ("--text", "corpus.jsonl", "--field", "text", "--windows", "4", "--length", "24")
    given = [args[0], "--budget", "1", *args[1:], "--json", "--quiet"]
    given += [] if args[0].endswith(".yaml") else text
    result = CliRunner().invoke(command, given)
    if result.exception:
        raise result.exception
    return json.loads(result.stdout)


def test_the_score_of_a_pair_is_computed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--scores", "lamp", "--selections", "lowest/lim,simple")
    found = in_process(monkeypatch, project, "model", *asked)
    assert {row["choice"] for row in found["rows"]} == {"lowest / lim", "simple"}
    assert not found["failed"]


@pytest.mark.parametrize("part", DEFAULTS)
def test_every_part_has_defaults_that_fit(
    part: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, selections = (words.split(",") for words in DEFAULTS[part])
    every = {choice.label for choice in choices(selections, scores, 1, part)}
    if part == "block":
        return
    found = in_process(monkeypatch, project, "model", "--part", part)
    short = {row["choice"]: row["reason"] for row in found["failed"]}
    assert {row["choice"] for row in found["rows"]} == every - short.keys()
    assert short.keys() <= {"lowest / ffn_saturation"}
    assert all("within the warm-up of 25" in reason for reason in short.values())


def test_choices_without_a_score_go_on_without_scores(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No score is left, or none is needed: neither ends the others."""
    asked = ("--part", "ffn", "--scores", "ffn_saturation", "--selections")
    found = in_process(monkeypatch, project, "model", *asked, "lowest,sleb")
    assert [row["choice"] for row in found["rows"]] == ["sleb"]
    assert [row["choice"] for row in found["failed"]] == ["lowest / ffn_saturation"]
    found = in_process(monkeypatch, project, "model", *asked, "sleb")
    assert ([row["choice"] for row in found["rows"]], found["failed"]) == (["sleb"], [])
    assert found["score_seconds"] == 0


@pytest.mark.parametrize("text", ["", "{calibration: {windows: 4, length: 24}}", "corpus.txt"])
def test_a_configuration_without_held_out_text_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare.yaml").write_text(f"model: {{path: model}}\ntext: {text}\n")
    with pytest.raises(ConfigError, match=r"bare\.yaml: no text\.evaluation, by which choices"):
        in_process(monkeypatch, tmp_path, "bare.yaml")


def test_words_and_map_of_a_selection() -> None:
    chosen = Selection(
        num_blocks=8, drop_blocks=[2, 3, 4], drop_attention=[1], drop_ffn=[6], reuse_ffn={7: 5}
    )
    assert leaderboard.describe(chosen) == "blocks 2-4, attention 1, ffn 6"
    assert leaderboard.describe(Selection(num_blocks=8)) == "nothing removed"
    assert leaderboard.ranges([3, 13, 14, 15, 18]) == "3,13-15,18"
    assert leaderboard.map_of(chosen.model_dump(mode="json")) == "·▀███·▄○"


def test_the_table_fits_a_person(project: Path) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    leaderboard.show(board(project), console)
    text = console.export_text()
    assert "simple" in text
    assert "·██·" in text
    assert "nats per token" in text
