"""Windows whose documents are kept apart, and where the log goes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from compressor.errors import MissingDependency, NotApplicable
from compressor.families import POSITIONS_FROM_MASK
from compressor.heal.arguments import document_end
from compressor.heal.healer import document_positions, next_token_loss
from compressor.heal.trainer import Windows
from tests.healing import PARAMS, run, task
from tests.tiny import FAMILIES, save_tiny, save_tokenizer, tiny, tokens

END = 2


def window() -> torch.Tensor:
    """Three documents in one window of 24 tokens: 7 and 9 with their end, 8 without."""
    row = tokens(1, 24)[0]
    row[6] = row[15] = END
    return row


def test_positions_start_anew_behind_every_end() -> None:
    expected = [*range(7), *range(9), *range(8)]
    assert document_positions(window(), END).tolist() == expected
    assert document_positions(torch.tensor([END, END, 5]), END).tolist() == [0, 0, 0]
    assert document_positions(torch.tensor([5, 6]), END).tolist() == [0, 1]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(POSITIONS_FROM_MASK)))
def test_a_document_does_not_see_those_before_it(family: str) -> None:
    """The loss of a window is that of its documents, each on its own."""
    model = tiny(family)
    row = window()
    item = Windows(row[None], range(1), END)[0]
    batch = {name: torch.as_tensor(value)[None] for name, value in item.items()}
    with torch.no_grad():
        together = next_token_loss(model, batch)
        alone = sum(
            (len(part) - 1) * model(part[None], labels=part[None]).loss
            for part in (row[:7], row[7:16], row[16:])
        )
        plain = next_token_loss(model, {"input_ids": row[None]})
    torch.testing.assert_close(together, alone / 21, rtol=1e-5, atol=1e-5)
    assert abs(plain - together) > 1e-3


def test_a_model_without_positions_is_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "source", "opt")
    save_tokenizer(tmp_path / "source")
    with pytest.raises(NotApplicable, match=r"heal\.reset_documents: opt models take no positions"):
        document_end(task(tmp_path), model)


def test_it_trains_so(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama")
    save_tokenizer(tmp_path / "source")
    report, _ = run(tmp_path, PARAMS.model_copy(update={"reset_documents": True}))
    assert report["last_loss"] < report["first_loss"]


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    save_tiny(tmp_path / "source", "llama")
    with pytest.raises(MissingDependency, match=r"pip install 'compress-llm\[tensorboard\]'"):
        run(tmp_path, PARAMS.model_copy(update={"report_to": "tensorboard"}))
