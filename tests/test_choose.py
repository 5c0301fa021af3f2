"""`compress select` from scores and from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from compressor.decoder import Decoder
from compressor.errors import CompressError, ConfigError
from compressor.records import Scores, Selection
from pipelines.choose import select
from tests.tiny import save_corpus, save_tiny, save_tokenizer

TEXT = "--text corpus.jsonl --field text --windows 4 --length 16 -q"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model", "llama")
    save_tokenizer(tmp_path / "model")
    save_corpus(tmp_path / "corpus.jsonl")
    scores = Scores(num_blocks=4, block={"block_influence": [0.2, 0.3, 0.1, 0.1]})
    (tmp_path / "scores").mkdir()
    scores.save(tmp_path / "scores" / "scores.json")
    monkeypatch.chdir(tmp_path)


def ask(line: str) -> str:
    assert isinstance(select, click.Command)
    result = CliRunner().invoke(select, line.split(), catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_stored_scores_need_no_model() -> None:
    for source in ("scores", "scores/scores.json"):
        chosen = Selection.model_validate_json(ask(f"{source} --method lowest -n 2 --protect 0,-1"))
        assert chosen.drop_blocks == [1, 2]
    assert ask("scores --method fixed --blocks 1 --ffn 0,-1 -o given.json") == "given.json\n"
    given = Selection.load(Path("given.json"))
    assert (given.drop_blocks, given.drop_ffn) == ([1], [0, 3])
    with pytest.raises(ConfigError, match="method 'sleb' needs a model and --text"):
        ask("scores --method sleb -n 1")
    with pytest.raises(ConfigError, match="--scores needs a model"):
        ask("scores --method lowest -n 1 --scores lamp")


def test_searches_work_alone_on_a_model() -> None:
    ask(f"model --method sleb -n 2 --part sublayers {TEXT} -o greedy.json")
    greedy = Selection.load(Path("greedy.json"))
    assert greedy.evaluations > 1
    assert len(greedy.drop_attention) + len(greedy.drop_ffn) + 2 * len(greedy.drop_blocks) == 2
    searched = "--method swap -n 1 --start contiguous --scores angular_distance"
    assert "select-" in ask(f"model {searched} {TEXT}")
    ask(f"model --method even --speedup 2 {TEXT} -o even.json")
    assert Selection.load(Path("even.json")).drop_blocks == [1, 2]
    with pytest.raises(ConfigError, match="needs calibration"):
        ask("model --method clasp -n 1")
    with pytest.raises(ConfigError, match="no such folder"):
        ask("nowhere --method clasp -n 1")


def test_a_killed_search_goes_on_to_the_same_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    search = f"model --method sleb -n 2 --part sublayers {TEXT}"
    ask(f"{search} --store whole -o whole.json")
    run, left = Decoder.run, [10]

    def killed(self: Decoder, index: int, x: torch.Tensor) -> Any:
        left[0] -= 1
        if not left[0]:
            raise CompressError("killed")
        return run(self, index, x)

    monkeypatch.setattr(Decoder, "run", killed)
    with pytest.raises(CompressError, match="killed"):
        ask(f"{search} --store cut")
    left[0] = 10_000
    ask(f"{search} --store cut -o resumed.json")
    resumed = 10_000 - left[0]
    left[0] = 10_000
    ask(f"{search} --store fresh -o fresh.json")
    assert resumed < 10_000 - left[0]
    for name in ("resumed", "fresh"):
        assert Path(f"{name}.json").read_bytes() == Path("whole.json").read_bytes()
