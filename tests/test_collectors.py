"""Every score of the walk equals the paper's formula in float64, family by family."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity as cos

from compressor import ratings
from compressor.blocks import LINEAR, Blocks, hidden, weight_of
from compressor.decoder import Decoder, all_finite
from compressor.errors import NotApplicable
from compressor.ratings import mean, median
from compressor.records import Scores
from compressor.score import METHODS
from compressor.score.activity import Activity
from compressor.score.block_influence import LayerInputModification
from compressor.score.collect import score
from compressor.score.outliers import InputNorms
from compressor.score.stream import StreamNorms
from compressor.score.sublayer_cosine import branch_cosines, guarded
from compressor.score.zd import far_share
from tests.test_score import one_block
from tests.tiny import save_tiny, tiny, tokens

L, N, T = 4, 5, 12
WINDOWS = tokens(N, T)
ATTENTION = {  # what a block of each family adds to the stream for its attention
    "llama": "self_attn",
    "gemma3_text": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
    "gpt_neox": "attention",
    "gpt2": "attn",
    "opt": "self_attn",
}


class Run:
    """A whole model run in float64, every state kept.

    Attributes:
        h: h_0..h_L, the last before the final norm.
        attention: what each block's attention adds.
        middle: what its feed-forward is added to (for parallel residuals, the block's input).
        inputs, weights: per block, of its linears.
        maps: per block, attention maps (N, H, T, T).
    """

    def __init__(self, family: str) -> None:
        model: Any = tiny(family).double()
        model.set_attn_implementation("eager")
        layers = Blocks(model).layers
        self.h: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.maps: list[Tensor] = []
        self.inputs: list[list[Tensor]] = []
        self.weights: list[list[Tensor]] = []
        for block in layers:
            block.register_forward_pre_hook(lambda _, args: self.h.append(args[0]))
            added = block.get_submodule(ATTENTION[family])
            added.register_forward_hook(lambda *a: self.attention.append(hidden(a[2])))
            linears = [m for m in block.modules() if isinstance(m, LINEAR)]
            self.weights.append([weight_of(m).detach() for m in linears])
            self.inputs.append([])
            for linear in linears:
                keep = self.inputs[-1]
                linear.register_forward_pre_hook(
                    lambda _, args, keep=keep: keep.append(args[0].reshape(-1, args[0].shape[-1]))
                )
            name = next(n for n in ("self_attn", "attn", "attention") if hasattr(block, n))
            block.get_submodule(name).register_forward_hook(lambda *a: self.maps.append(a[2][1]))
        layers[-1].register_forward_hook(lambda *a: self.h.append(hidden(a[2])))
        with torch.no_grad():
            model(WINDOWS, use_cache=False)
        parallel = family == "gpt_neox"
        self.middle = [
            x if parallel else x + a for x, a in zip(self.h, self.attention, strict=False)
        ]
        self.ffn = [y - x - a for x, y, a in zip(self.h, self.h[1:], self.attention, strict=False)]

    def ratings(self, index: int) -> list[float]:
        """Every |W_ij| ||X_j|| of a block, norms over all tokens divided by sqrt(N)."""
        found: list[float] = []
        for weight, x in zip(self.weights[index], self.inputs[index], strict=True):
            norms = np.sqrt((x.numpy() ** 2).sum(0) / N).tolist()
            for row in weight.tolist():
                found += [abs(w) * norm for w, norm in zip(row, norms, strict=True)]
        return found


@pytest.fixture(scope="module", params=ATTENTION)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, request.param)
    return Run(request.param), folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny(folder, "llama")
    return folder


def ask(folder: Path, _name: str, **params: Any) -> Scores:
    row = METHODS[_name]
    given = WINDOWS if row.needs else None
    return score(folder, given, {_name: row.params(**params)}, batch_size=2)


def near(values: list[float]) -> Any:
    return pytest.approx(values, abs=2e-6, rel=2e-5)


def test_sublayer_cosine(pair: tuple[Run, Path]) -> None:
    run, folder = pair
    found = ask(folder, "sublayer_cosine")
    attention = [
        1 - float(cos(x, x + a, dim=-1).mean()) for x, a in zip(run.h, run.attention, strict=False)
    ]
    ffn = [
        1 - float(cos(x, x + f, dim=-1).mean()) for x, f in zip(run.middle, run.ffn, strict=True)
    ]
    assert found.attention["sublayer_cosine"] == near(attention)
    assert found.ffn["sublayer_cosine"] == near(ffn)
    assert min(abs(a - f) for a, f in zip(attention, ffn, strict=True)) > 1e-3


def test_ffn_saturation(pair: tuple[Run, Path]) -> None:
    run, folder = pair
    s = [
        float(cos(x, x + f, dim=-1)[:, 3:].mean()) for x, f in zip(run.middle, run.ffn, strict=True)
    ]
    for threshold in (min(s) - 0.01, float(np.mean(s)), max(s) - 1e-4):
        found = ask(folder, "ffn_saturation", threshold=threshold, warm_up=3).ffn["ffn_saturation"]
        first = next(l for l in range(L) if s[l] >= threshold)
        trailing = next(k for k in range(L) if s[L - 1 - k] >= threshold)
        inside = range(first, L - trailing)
        assert found == near([1 - s[l] if l in inside else 3 - s[l] for l in range(L)])


@pytest.mark.parametrize("cosine", ["token", "window"])
def test_lim(pair: tuple[Run, Path], cosine: str) -> None:
    run, folder = pair
    found = ask(folder, "lim", cosine=cosine).block["lim"]
    first = 2 if cosine == "token" else 1
    expected = [
        -np.mean(
            [
                float(a @ b / (a.norm() * b.norm()))
                for x, y in zip(before, after, strict=True)
                for a, b in ([(x.flatten(), y.flatten())] if first == 1 else zip(x, y, strict=True))
            ]
        )
        for before, after in zip(run.h, run.h[1:], strict=False)
    ]
    assert found == near(expected)
    if cosine == "token":
        influence = ask(folder, "block_influence").block["block_influence"]
        assert found == near([bi - 1 for bi in influence])


def test_dlp_and_owl(pair: tuple[Run, Path]) -> None:
    run, folder = pair
    ratings = [sorted(run.ratings(index)) for index in range(L)]
    assert ask(folder, "dlp").block["dlp"] == near([-a[(len(a) - 1) // 2] for a in ratings])
    assert ask(folder, "dlp", statistic="mean").block["dlp"] == near([-np.mean(a) for a in ratings])
    found = ask(folder, "owl", multiple=2).block["owl"]
    expected = [np.mean(np.array(a) > 2 * np.mean(a)) for a in ratings]
    assert found == pytest.approx(expected, abs=1.5 / len(ratings[0]))  # one may sit on the edge
    assert min(found) > 0


@pytest.mark.parametrize("sides", ["one", "two"])
def test_zd(pair: tuple[Run, Path], sides: str) -> None:
    run, folder = pair
    expected = []
    for weights in run.weights:
        w = np.concatenate([weight.flatten().numpy() for weight in weights])
        z = (w - w.mean()) / w.std()
        expected.append(-float(((z if sides == "one" else abs(z)) > 1).mean()))
    assert ask(folder, "zd", sides=sides).block["zd"] == pytest.approx(expected, abs=1e-12)


def test_activity(pair: tuple[Run, Path]) -> None:
    run, folder = pair
    norms = torch.stack(run.h).norm(dim=-1).numpy()
    for alpha in (0.3, 0.8):
        active = np.zeros(L)
        for n, t in np.ndindex(N, T):
            deltas: list[float] = []
            for l in range(L):
                delta = norms[l + 1, n, t] - norms[l, n, t]
                active[l] += delta >= alpha * (max(deltas) - min(deltas) if deltas else 0)
                deltas.append(delta)
        assert ask(folder, "activity", alpha=alpha).block["activity"] == list(active / (N * T))


@pytest.mark.parametrize("length", [9, 64])
def test_attention_rank(pair: tuple[Run, Path], length: int) -> None:
    run, folder = pair
    found = ask(folder, "attention_rank", max_windows=3, max_tokens=length, tolerance=0.1)
    expected = []
    for maps in run.maps:
        kept = maps[:3, :, :length, :length].numpy()  # causal: the first tokens see no others
        np.testing.assert_allclose(kept.sum(-1), 1, atol=1e-6)
        values = np.linalg.svd(kept, compute_uv=False)
        expected.append(float((values > 0.1 * values[..., :1]).sum(-1).mean()))
    assert found.attention["attention_rank"] == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 1


def test_eager_attention_ends(llama: Path) -> None:
    decoder = Decoder(llama)
    usual = decoder.model.config._attn_implementation
    with decoder.eager_attention():
        assert decoder.model.config._attn_implementation == "eager" != usual
    assert decoder.model.config._attn_implementation == usual


def test_residual(pair: tuple[Run, Path]) -> None:
    run, folder = pair
    depth = ask(folder, "residual").depth
    h = torch.stack(run.h)
    assert depth["residual_norm"] == near(h.norm(dim=-1).mean((1, 2)).tolist())
    change = (h[1:] - h[:-1]).norm(dim=-1) / h[:-1].norm(dim=-1)
    assert depth["residual_change"] == near(change.mean((1, 2)).tolist())
    x = h.numpy()
    z = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    assert depth["residual_kurtosis"] == near((z**4).mean((1, 2, 3)).tolist())


@pytest.mark.parametrize("parallel", [False, True])
def test_t3_a_sublayer_is_compared_with_its_residual(parallel: bool) -> None:
    """Attention adds (1, -1) to (3, 4), the feed-forward the same to what it reads."""
    x, f = torch.tensor([3.0, 4]), torch.tensor([1.0, -1])
    y = x + 2 * f
    stream: Any = SimpleNamespace(before=x.norm(), after=y.norm())
    attention, ffn = branch_cosines(x, y, f if parallel else x + f, stream, parallel)
    assert float(attention) == pytest.approx(0.96, abs=1e-6)
    after_both = (4 * 5 + 3 * 2) / (5 * math.sqrt(29))
    assert float(ffn) == pytest.approx(0.96 if parallel else after_both, abs=1e-6)


def test_t7_lim_and_zd() -> None:
    x, y = torch.tensor([[[1.0, 2, 3]]]), torch.tensor([[[2.0, 2, 2]]])
    for cosine in ("token", "window"):
        (found,) = one_block(LayerInputModification, x, y, cosine=cosine).block["lim"]
        assert found == pytest.approx(-0.925820, abs=1e-6)
    w = [torch.tensor([-2.0, -1, 0]), torch.tensor([[0.0, 1, 5]])]
    assert far_share(w, two_sided=False) == pytest.approx(0.166667, abs=1e-6)
    assert far_share(w, two_sided=True) == pytest.approx(0.333333, abs=1e-6)
    assert far_share([torch.ones(4)], two_sided=True) == 0


@pytest.mark.parametrize(
    ("norms", "active"),
    [
        ([10.0, 14.0, 15.0, 15.5, 19.0], [1, 1, 0, 1]),
        ([10.0, 9.0, 9.0, 9.0, 9.3], [0, 1, 0, 1]),  # a bar of 0 is reached by 0, not by -1
    ],
)
def test_t9_activity(norms: list[float], active: list[int]) -> None:
    blocks: Any = SimpleNamespace(blocks=range(4))
    stream = StreamNorms(blocks, torch.zeros(1, 1))
    activity = Activity(blocks, torch.zeros(1, 1), stream, alpha=0.3)
    for l in range(4):
        x, y = torch.tensor([[[norms[l], 0]]]), torch.tensor([[[0, norms[l + 1]]]])
        for watcher in (stream, activity):
            watcher.update(SimpleNamespace(index=l), slice(0, 1), x, y)  # type: ignore[arg-type]
    assert activity.result().block["activity"] == active


@pytest.mark.parametrize("seed", range(6))
def test_median_is_exact(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** (seed - 2)
    parts = [
        torch.exp(spread * torch.randn(size, generator=generator)).clamp(max=1e30)
        for size in ((3, 50), (17, 3), (1, seed + 1))
    ]
    parts.append(torch.zeros(2, 20 * seed))
    everything = torch.cat([part.flatten() for part in parts])
    assert median(lambda: parts) == float(everything.median())
    assert mean(parts) == pytest.approx(float(everything.double().mean()))


@pytest.mark.parametrize(("kind", "passes"), [("usual", 2), ("pruned", 2), ("misleading", 3)])
def test_median_of_many_is_exact(kind: str, passes: int) -> None:
    x = torch.randn(301, 433, generator=torch.Generator().manual_seed(1)).abs()
    if kind == "pruned":
        x[x < x.quantile(0.7)] = 0
    if kind == "misleading":  # what is sampled says nothing of the rest
        x.view(-1)[::127] = 1e9 + torch.arange(len(x.view(-1)[::127]))
    calls: list[list[Tensor]] = []
    assert median(lambda: calls.append([x]) or [x]) == float(x.median())
    assert len(calls) == passes


@pytest.mark.parametrize("name", ["dlp", "owl", "zd"])
def test_matrices_in_pieces_give_the_same(
    name: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(llama, name).block[name]
    monkeypatch.setattr(ratings, "_CACHED", 64)
    assert ask(llama, name).block[name] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_is_found(bad: float) -> None:
    x = torch.arange(6.0).view(2, 3)
    assert all_finite(x)
    x[1, 0] = bad
    assert not all_finite(x)


def test_cold_feed_forwards_rank_above_all_others() -> None:
    s = [0.2, -0.9, 0.95, -1.0, 0.9, 0.99, 0.1, 0.89]
    found = guarded(s, 0.9)
    order = sorted(range(8), key=found.__getitem__)
    assert order == [5, 2, 4, 3, 7, 0, 6, 1]
    assert guarded([0.9, 0.95, 0.9], 0.9) == pytest.approx([0.1, 0.05, 0.1])
    with pytest.raises(NotApplicable, match=r"highest is 0\.990.*lower the threshold"):
        guarded(s, 0.995)


def test_hooks_are_off_when_a_score_runs_the_block_itself(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer contribution pushes other streams through the block between two batches."""
    names = ("dlp", "sublayer_cosine", "layer_contribution", "owl")
    together = score(llama, WINDOWS, {n: METHODS[n].params() for n in names}, batch_size=2)
    for name in names:
        alone = ask(llama, name)
        for kind in ("block", "attention", "ffn"):
            values = getattr(alone, kind)
            assert all(getattr(together, kind)[n] == v for n, v in values.items())


def test_one_set_of_norms_serves_both(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[InputNorms] = []
    begin = InputNorms.__init__

    def counted(self: InputNorms, decoder: Decoder, tokens: Tensor) -> None:
        made.append(self)
        begin(self, decoder, tokens)

    monkeypatch.setattr(InputNorms, "__init__", counted)
    score(llama, WINDOWS, {n: METHODS[n].params() for n in ("dlp", "owl")})
    assert len(made) == 1


def test_every_forward_score_shares_one_walk(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run = Decoder.run

    def counted(self: Decoder, index: int, x: Tensor, block: Any = None) -> Tensor:
        calls.append(index)
        return run(self, index, x, block)

    monkeypatch.setattr(Decoder, "run", counted)
    shared = [n for n, row in METHODS.items() if row.cost == "1 forward, shared"] + ["zd"]
    assert len(shared) >= 10
    params: dict[str, Any] = {"ffn_saturation": {"warm_up": 2, "threshold": -0.5}}
    found = score(
        llama,
        WINDOWS,
        {n: METHODS[n].params(**params.get(n, {})) for n in shared},
        batch_size=2,
    )
    assert not found.unavailable
    assert sorted(calls) == sorted(list(range(L)) * 3)


def test_weights_alone_need_no_text(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "run", None)
    assert len(score(llama, WINDOWS, {"zd": METHODS["zd"].params()}).block["zd"]) == L


def test_what_a_model_cannot_give_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Post-norm blocks have no branches; a kernel without maps has no rank; 12 tokens are few."""
    save_tiny(tmp_path, "opt", do_layer_norm_before=False)

    def fused(self: Any, *_: Any) -> None:
        raise NotApplicable("no maps")

    monkeypatch.setattr(METHODS["attention_rank"].load(), "_maps", fused)
    names = ("sublayer_cosine", "attention_rank", "block_influence")
    found = score(tmp_path, WINDOWS, {n: METHODS[n].params() for n in names})
    assert set(found.block) == {"block_influence"}
    assert not found.attention
    assert set(found.unavailable) == {"sublayer_cosine", "attention_rank"}
    assert "post-norm" in found.unavailable["sublayer_cosine"]


def test_attention_that_gives_no_maps_is_refused(llama: Path) -> None:
    class Fused(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden_states, None

    decoder = Decoder(llama)
    rank = METHODS["attention_rank"].load()(
        decoder, WINDOWS, max_windows=1, max_tokens=8, tolerance=0.01
    )
    block: Any = decoder.blocks.layers[0]
    block.self_attn, kept = Fused(), block.self_attn
    step: Any = SimpleNamespace(index=0, run=lambda x: block.self_attn(x))
    with pytest.raises(NotApplicable, match=r"layers\.0\.self_attn gives no attention maps"):
        rank.update(step, slice(0, 1), torch.zeros(1, 12, 32), torch.zeros(1, 12, 32))
    block.self_attn = kept


def test_a_warm_up_longer_than_the_windows_is_refused(llama: Path) -> None:
    with pytest.raises(NotApplicable, match="12 tokens end within the warm-up of 25"):
        ask(llama, "ffn_saturation")


DOCS = Path(__file__).parents[1] / "docs" / "scores"


@pytest.mark.parametrize("name", METHODS)
def test_every_score_has_its_page(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text()
    head, *sections = page.split("\n## ")
    title, source, what = head.strip().split("\n\n")
    assert title.startswith("# ")
    assert f"`{name}`" in source
    for identifier in re.findall(r"arXiv:[\d.]+\d", METHODS[name].source):
        assert identifier in source
    assert len(what.split()) > 30
    headings = [section.partition("\n\n")[0] for section in sections]
    assert headings[:2] == ["Formula", "Cost"]
    assert headings[-1] == "When it misleads"
    assert all(len(section) > 20 for section in sections)
    assert f"[{name}]({name}.md)" in (DOCS / "README.md").read_text()
