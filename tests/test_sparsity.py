"""Layer-wise sparsities: the mean is what was asked for, the order is the paper's."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.errors import ConfigError
from compressor.sparsity import dlp_sparsities, owl_sparsities

S = [0.3, 0.1, 0.7, 0.2, 0.25]


def test_t8_dlp() -> None:
    assert dlp_sparsities([1, 2, 4, 5], 0.7, 0.15) == pytest.approx([0.55, 0.625, 0.775, 0.85])


def test_dlp_is_the_papers_formula() -> None:
    importance = 1 - np.array(S) / np.sum(S)
    d = (importance - importance.min()) / (importance.max() - importance.min()) * 2 * 0.1
    assert dlp_sparsities(S, 0.5, 0.1) == pytest.approx(list(0.5 + d.mean() - d))


def test_owl_is_the_code_of_its_authors() -> None:
    ratio = np.array(S)
    ratio = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * 0.08 * 2)
    keep = ratio - ratio.mean() + (1 - 0.7)
    assert owl_sparsities(S, 0.7, 0.08) == pytest.approx(list(1 - keep))


@pytest.mark.parametrize("sparsities", [dlp_sparsities, owl_sparsities])
def test_mean_and_span_are_kept_and_equal_blocks_are_equal(sparsities: object) -> None:
    assert callable(sparsities)
    found = sparsities(S, 0.6, 0.12)
    assert np.mean(found) == pytest.approx(0.6, abs=1e-12)
    assert max(found) - min(found) == pytest.approx(0.24)
    assert sparsities([3.0, 3.0], 0.6, 0.12) == [0.6, 0.6]


@pytest.mark.parametrize("p", [0.05, 0.95])
def test_an_impossible_sparsity_says_what_is_possible(p: float) -> None:
    with pytest.raises(ConfigError, match="use an alpha below") as caught:
        dlp_sparsities(S, p, 0.2)
    possible = float(str(caught.value).rpartition(" ")[2])
    dlp_sparsities(S, p, possible - 0.001)
    with pytest.raises(ConfigError):
        dlp_sparsities(S, p, possible + 0.001)
