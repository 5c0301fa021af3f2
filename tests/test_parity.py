"""The gate's questions: each kind of fault shows in its own figure, and torch answers the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.errors import ExportError
from compressor.export import ExportParams
from compressor.export import onnx as onnx_export
from compressor.export.decoder_graph import build
from compressor.export.parity import answer, ask, differences, questions, reference
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.runtimes.session import Cache, Session
from tests.tiny import save_tiny, save_tokenizer, tokens

Where = Callable[[np.ndarray, Cache | None, np.ndarray | None], Any]
LAST_ROW = np.array([0, 0, 1])[:, None, None]


class Faulty(Session):
    """A session that is wrong where it is told to be."""

    where: Where
    by = 0.5

    def run(
        self, ids: np.ndarray, cache: Cache | None = None, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Cache]:
        logits, grown = super().run(ids, cache, mask)
        return logits + self.by * (self.where(ids, cache, mask) * (np.arange(96) == 7)), grown


FAULTS: dict[str, tuple[Where, set[str]]] = {
    "a prompt": (lambda i, c, m: c is None and i.shape == (1, 24), {"prefill", "decode"}),
    "a batch of prompts": (
        lambda i, c, m: c is None and m is None and len(i) == 2,
        {"prefill", "decode"},
    ),
    "a step": (lambda i, c, m: i.shape == (1, 1), {"decode"}),
    "a step of a batch": (lambda i, c, m: i.shape == (2, 1), {"decode"}),
    "chunks": (lambda i, c, m: c is not None and i.shape == (1, 12), {"chunked"}),
    "padding": (lambda i, c, m: m is not None and c is None, {"padded"}),
    "one padded row": (
        lambda i, c, m: LAST_ROW if m is not None and c is None else False,
        {"padded"},
    ),
    "a step behind padding": (lambda i, c, m: m is not None and c is not None, {"padded"}),
    "a longer text": (lambda i, c, m: i.shape[1] == 40, {"nll"}),
}


def built(tmp_path: Path, **overrides: Any) -> Path:
    save_tiny(tmp_path / "model", "llama", **({"hidden_size": 64, "vocab_size": 96} | overrides))
    (tmp_path / "onnx").mkdir()
    build(tmp_path / "model", tmp_path / "onnx")
    return tmp_path / "onnx"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_where_it_is(fault: str, tmp_path: Path) -> None:
    session = Faulty(built(tmp_path), "cpu", prepack=False)
    session.where, kinds = FAULTS[fault]
    model = reference(tmp_path / "model")
    asked = questions(model.config, tokens(4, 40), 6)
    said = ask(session, asked)
    found, _ = differences(said, answer(tmp_path / "model", None, asked, said.tokens))
    assert {kind for kind, value in found.items() if value > 2e-3} - {"greedy"} == kinds


def test_greedy_tokens_are_torchs_up_to_the_first_that_is_not(tmp_path: Path) -> None:
    asked_of = built(tmp_path)
    model = reference(tmp_path / "model")
    asked = questions(model.config, tokens(4, 40), 6)
    said = ask(Session(asked_of, "cpu"), asked)
    answers = answer(tmp_path / "model", None, asked, said.tokens)
    assert differences(said, answers)[1] == 18
    ids = torch.from_numpy(asked.prompts)
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    np.testing.assert_array_equal(said.tokens, ids[:, 24:])
    said.steps[1, 2] = -said.steps[1, 2]  # it would have chosen another token there
    found, equal = differences(said, answers)
    assert equal == 6 + 2 + 6
    assert found["greedy"] > 0.1


def test_tokens_that_are_given_are_read(tmp_path: Path) -> None:
    session = Session(built(tmp_path), "cpu")
    asked = questions(reference(tmp_path / "model").config, None, 6)
    own = ask(session, asked)
    given = (own.tokens + 1) % 96
    said = ask(session, asked, given)
    found, equal = differences(said, answer(tmp_path / "model", None, asked, given))
    assert max(found.values()) < 1e-4 and "nll" not in found
    assert equal == 3  # running free it would have left these tokens at once


@pytest.mark.parametrize("head_bits", [None, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_checkpoint_answers_by_blocks_what_the_whole_model_does(
    head_bits: int | None, tied: bool, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "dense", "llama", hidden_size=64, tie_word_embeddings=tied)
    quantize(tmp_path / "dense", tmp_path / "model", None, "rtn", RtnParams(bits=4, group_size=16))
    model = reference(tmp_path / "model", head_bits)
    asked = questions(model.config, tokens(4, 40), 6)
    found = answer(tmp_path / "model", head_bits, asked, tokens(3, 6).numpy())
    with torch.no_grad():
        expected = model(torch.from_numpy(found.tokens)).logits
        window = model(torch.from_numpy(asked.window)).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(window, torch.from_numpy(asked.window[0, 1:]))
    np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    assert found.nll == pytest.approx(float(nll), abs=1e-5)
    plain = answer(tmp_path / "model", None, asked, tokens(3, 6).numpy()).logits
    assert (np.abs(plain - found.logits).max() > 1e-3) == (head_bits is not None)


@pytest.mark.parametrize(("bits", "prepacked"), [(None, False), (4, True)])
def test_float_weights_are_not_copied_for_the_gate_and_integers_run_as_users_run_them(
    bits: Any, prepacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    save_tokenizer(tmp_path / "model")
    opened: list[Session] = []

    def kept(folder: Path, **settings: Any) -> Session:
        opened.append(Session(folder, "cpu", **settings))
        return opened[-1]

    monkeypatch.setattr(onnx_export, "Session", kept)
    onnx_export.export(tmp_path / "model", tmp_path, ExportParams(head_bits=bits, check_tokens=4))
    options = opened[0].inference.get_session_options()
    entry = options.get_session_config_entry("session.disable_prepacking")
    assert (entry == "0") == prepacked


def test_reloaded_safetensors_that_differ_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama", hidden_size=64)
    save_tokenizer(tmp_path / "model")
    good = onnx_export.AutoModelForCausalLM

    class Damaged:
        @staticmethod
        def from_pretrained(folder: Path, **settings: Any) -> Any:
            model = good.from_pretrained(folder, **settings)
            with torch.no_grad():
                model.lm_head.weight[5] *= 1.1
            return model

    monkeypatch.setattr(onnx_export, "AutoModelForCausalLM", Damaged)
    with pytest.raises(ExportError, match="reloaded by transformers, its logits differ"):
        onnx_export.export(tmp_path / "model", tmp_path, ExportParams(check_tokens=4))
