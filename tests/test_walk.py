"""The streaming walk equals the model's own forward, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor import walk as walk_module
from compressor.decoder import Decoder
from compressor.walk import Stream, walk
from tests.tiny import FAMILIES, save_tiny, tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_walk_equals_forward(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, family)
    windows = tokens(5)
    with torch.no_grad():
        expected = model(windows, output_hidden_states=True)
        stream = Stream(Decoder(tmp_path), windows, batch_size=2)
        for step, reference in zip(walk(stream), expected.hidden_states, strict=False):
            for rows, x_in, x_out in step.advance():
                torch.testing.assert_close(x_in, reference[rows], rtol=1e-5, atol=1e-5)
                assert not torch.equal(x_in, x_out)
        for rows, logits in stream.logits():
            torch.testing.assert_close(logits, expected.logits[rows], rtol=1e-5, atol=1e-5)


def test_blocks_leave_memory_after_use(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    decoder = Decoder(tmp_path)
    with decoder.resident(1) as block:
        assert not any(p.is_meta for p in block.parameters())
    assert all(p.is_meta for block in decoder.blocks for p in block.parameters())


def test_large_streams_spill_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path, "llama")
    monkeypatch.setattr(walk_module, "SPILL_BYTES", 16)
    stream = Stream(Decoder(tmp_path), tokens(3))
    for _ in walk(stream):
        pass
    (_, logits), *_ = stream.logits()
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens(3)).logits, rtol=1e-5, atol=1e-5)
