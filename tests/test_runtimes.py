"""Three runtimes, one interface: the same tokens, caches that can be cut, honest clocks."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaForCausalLM

from compressor.errors import InferenceError
from compressor.export import ExportParams
from compressor.export import onnx as onnx_export
from compressor.quantize import RtnParams
from compressor.quantize.driver import quantize
from compressor.runtimes import Target, find, onnx_runtime
from compressor.runtimes import base as runtimes_base
from compressor.runtimes.base import Facts, Runtime
from compressor.runtimes.generate import Generation, Sampler
from compressor.runtimes.measure import measure, rates, time_rounds
from tests.tiny import save_tiny, save_tokenizer, tokens

genai = pytest.param(
    "genai",
    marks=pytest.mark.skipif(
        not importlib.util.find_spec("onnxruntime_genai"), reason="needs onnxruntime-genai"
    ),
)
RUNTIMES = ["torch", "onnxruntime", genai]
PROMPT = [1, 5, 9, 33, 4, 71, 20]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny llama: safetensors/ and onnx/."""
    folder = tmp_path_factory.mktemp("exported")
    save_tiny(folder / "model", "llama", hidden_size=64, eos_token_id=None)
    save_tokenizer(folder / "model")
    onnx_export.export(folder / "model", folder, ExportParams(check_tokens=4))
    return folder


def greedy(runtime: Runtime, prompt: list[int], count: int = 12) -> list[int]:
    return list(Generation(runtime, prompt, max_new_tokens=count, sampler=Sampler()))


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtimes_give_the_model_s_greedy_tokens(name: str, exported: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(exported / "safetensors")
    expected = list(PROMPT)
    with torch.no_grad():
        for _ in range(12):  # no cache: every token from the whole sequence
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    runtime = find(exported, name).open("cpu")
    assert (runtime.name, runtime.device) == (name, "cpu")
    assert greedy(runtime, PROMPT) == expected[len(PROMPT) :]
    assert runtime.tokens == expected[:-1]


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_cut_cache_equals_a_new_one(name: str, exported: Path) -> None:
    runtime, fresh = (find(exported, name).open("cpu") for _ in range(2))
    runtime.prefill(PROMPT)
    runtime.step(50)
    for prompt in (PROMPT[:4], [*PROMPT[:3], 60, 61], [8, 9], PROMPT, [*PROMPT, 7, 8]):
        read = prompt[runtime.keep(prompt) :]
        assert read
        again = runtime.prefill(read)
        fresh.rewind(0)
        np.testing.assert_allclose(again, fresh.prefill(prompt), rtol=1e-4, atol=1e-4)
        assert runtime.tokens == prompt
    assert read == [7, 8]


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_cache_is_counted_by_its_tokens(name: str, exported: Path) -> None:
    runtime = find(exported, name).open("cpu")
    runtime.prefill(PROMPT)
    assert runtime.cache_bytes == 2 * 4 * 2 * 16 * 4 * len(PROMPT)  # kv, blocks, heads, dim, fp32


@pytest.mark.parametrize("name", RUNTIMES)
def test_long_prompts_are_read_in_chunks(
    name: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(1, 60)[0].tolist()
    whole = find(exported, name).open("cpu").prefill(prompt)
    monkeypatch.setattr(runtimes_base, "CHUNK", 16)
    chunked = find(exported, name).open("cpu").prefill(prompt)
    np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_context_is_a_limit(name: str, exported: Path) -> None:
    runtime = find(exported, name).open("cpu")
    with pytest.raises(InferenceError, match="129 tokens, but the model's context is 128"):
        runtime.prefill([5] * 129)
    with pytest.raises(InferenceError, match="no tokens"):
        runtime.prefill([])
    answer = Generation(runtime, [5] * 120, max_new_tokens=50, sampler=Sampler())
    assert len(list(answer)) == 9  # eight are read, the ninth is the last logits' choice
    assert answer.finish == "context"


def test_the_buffer_grows_without_a_change(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = greedy(find(exported, "onnxruntime").open("cpu"), PROMPT, 40)
    monkeypatch.setattr(onnx_runtime, "_ROOM", 8)
    assert greedy(find(exported, "onnxruntime").open("cpu"), PROMPT, 40) == whole


@pytest.mark.parametrize("name", RUNTIMES)
def test_logits_stay_as_they_were_given(name: str, exported: Path) -> None:
    runtime = find(exported, name).open("cpu")
    given = [runtime.prefill(PROMPT), *(runtime.step(token) for token in (3, 8)),
             runtime.prefill([2, 6]), *(runtime.step(token) for token in (4, 9))]  # fmt: skip
    read = [*PROMPT, 3, 8, 2, 6, 4, 9]
    model: Any = LlamaForCausalLM.from_pretrained(exported / "safetensors")
    with torch.no_grad():
        expected = model(torch.tensor([read])).logits[0].numpy()
    positions = [6, 7, 8, 10, 11, 12]
    np.testing.assert_allclose(given, expected[positions], rtol=1e-4, atol=1e-4)


def test_graphs_without_a_shared_buffer_run_too(exported: Path, tmp_path: Path) -> None:
    for path in (exported / "onnx").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    expected = greedy(find(exported, "onnxruntime").open("cpu"), PROMPT)
    (tmp_path / "genai_config.json").unlink()
    runtime = find(tmp_path).open("cpu")
    assert not runtime.facts.shared_cache
    assert greedy(runtime, PROMPT) == expected
    assert greedy(runtime, [*PROMPT[:4], 8]) == greedy(
        find(exported, "torch").open("cpu"), [*PROMPT[:4], 8]
    )


def test_sizes_that_a_graph_leaves_open_are_those_genai_is_told(
    exported: Path, tmp_path: Path
) -> None:
    for path in (exported / "onnx").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = ir.load(tmp_path / "model.onnx")
    for value in model.graph.inputs[2:]:
        assert value.shape is not None
        value.shape = ir.Shape(["batch", "heads", "past", "channels"])
    ir.save(model, tmp_path / "model.onnx")
    expected = greedy(find(exported, "onnxruntime").open("cpu"), PROMPT)
    runtime = find(tmp_path, "onnxruntime").open("cpu")
    assert greedy(runtime, PROMPT) == expected
    assert runtime.cache_bytes == 2 * 4 * 2 * 16 * 4 * len(runtime.tokens)
    (tmp_path / "genai_config.json").unlink()
    with pytest.raises(InferenceError, match="tells its heads"):
        find(tmp_path, "onnxruntime").open("cpu")


def test_a_sliding_window_that_moved_on_is_computed_anew(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mistral")
    runtime, fresh = (find(tmp_path).open("cpu") for _ in range(2))
    row = tokens(1, 24)[0].tolist()
    runtime.prefill(row)
    prompt = row[:12]
    assert runtime.keep(prompt) == 0
    np.testing.assert_allclose(runtime.prefill(prompt), fresh.prefill(prompt), rtol=1e-5)


def test_integers_run_in_torch_as_they_are(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "llama", hidden_size=64)
    params = RtnParams(bits=3, group_size=16, symmetric=False)
    quantize(tmp_path / "dense", tmp_path / "packed", None, "rtn", params)
    model = onnx_export.reference(tmp_path / "packed")
    runtime = find(tmp_path / "packed").open("cpu")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1].numpy()
    np.testing.assert_allclose(runtime.prefill(PROMPT), expected, rtol=1e-5, atol=1e-5)


def test_positions_are_given_to_a_graph_that_asks_for_them(exported: Path, tmp_path: Path) -> None:
    """Such as those of onnxruntime-genai's builder; this one adds them to the logits."""
    folder = shutil.copytree(exported / "onnx", tmp_path / "onnx")
    model = ir.load(folder / "model.onnx")
    graph = model.graph
    positions = ir.val("position_ids", ir.DataType.INT64, ["batch", "sequence"])
    graph.inputs.append(positions)
    plain, graph.outputs[0].name = graph.outputs[0], "plain"
    floats = ir.node("Cast", [positions], {"to": ir.DataType.FLOAT.value})
    axes = ir.node("Constant", [], {"value_ints": [-1]})
    column = ir.node("Unsqueeze", [floats.outputs[0], axes.outputs[0]])
    moved = ir.node("Add", [plain, column.outputs[0]])
    moved.outputs[0].name, moved.outputs[0].dtype = "logits", ir.DataType.FLOAT
    graph.extend([floats, axes, column, moved])
    graph.outputs[0] = moved.outputs[0]
    ir.save(model, folder / "model.onnx")
    asked, known = (find(each).open("cpu") for each in (folder, exported / "onnx"))
    assert asked.facts.shared_cache
    last = len(PROMPT) - 1
    np.testing.assert_allclose(asked.prefill(PROMPT) - known.prefill(PROMPT), last, atol=1e-4)
    np.testing.assert_allclose(asked.step(7) - known.step(7), last + 1, atol=1e-4)


def test_auto_takes_the_graph_and_says_what_is_missing(exported: Path, tmp_path: Path) -> None:
    assert find(exported) == Target(exported / "onnx", "onnxruntime")
    assert find(exported / "onnx") == Target(exported / "onnx", "onnxruntime")
    assert find(exported / "safetensors") == Target(exported / "safetensors", "torch")
    assert find(exported, "torch") == Target(exported / "safetensors", "torch")
    with pytest.raises(InferenceError, match="no such folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(InferenceError, match=r"no model\.onnx and no \*\.safetensors here"):
        find(tmp_path)
    with pytest.raises(InferenceError, match=r"no model\.onnx here; it runs in torch"):
        find(exported / "safetensors", "onnxruntime")
    with pytest.raises(InferenceError, match=r"did you mean 'torch'"):
        find(exported, "troch")


def test_without_onnxruntime_auto_takes_torch(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.runtimes.importlib.util.find_spec", lambda name: None)
    assert find(exported).runtime == "torch"


def test_a_missing_genai_is_one_line(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(InferenceError, match="pip install onnxruntime-genai"):
        find(exported, "genai").open()


def test_a_damaged_graph_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (tmp_path / "config.json").write_text('{"vocab_size": 96}')
    with pytest.raises(InferenceError, match=r"model\.onnx: onnxruntime .* cannot load it"):
        find(tmp_path).open("cpu")


def test_facts_come_from_all_three_files(tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match="vocab_size"):
        Facts.of(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 9, "n_positions": 7, "eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert Facts.of(tmp_path) == Facts(9, 7, frozenset({1, 2, 3}), False)
    genai_config = {"model": {"context_length": 5, "eos_token_id": 4, "vocab_size": 8}}
    search = {"search": {"past_present_share_buffer": True}}
    (tmp_path / "genai_config.json").write_text(json.dumps(genai_config | search))
    (tmp_path / "config.json").unlink()
    assert Facts.of(tmp_path) == Facts(8, 5, frozenset({2, 3, 4}), True)


def test_greedy_is_temperature_zero_and_seeds_repeat() -> None:
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    assert Sampler()(logits) == logits.argmax()

    def draws(seed: int, **how: float) -> list[int]:
        sampler = Sampler(seed=seed, **how)  # type: ignore[arg-type]
        return [sampler(logits) for _ in range(64)]

    assert draws(3, temperature=1.0) == draws(3, temperature=1.0)
    assert draws(3, temperature=1.0) != draws(4, temperature=1.0)
    assert set(draws(0, temperature=1e-4)) == {int(logits.argmax())}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, 4), (0.96, 4), (0.94, 3), (0.81, 3), (0.79, 2), (0.51, 2), (0.49, 1), (1e-9, 1)],
)
def test_the_nucleus_is_the_fewest_that_hold_top_p(top_p: float, kept: int) -> None:
    share = np.array([0.05, 0.5, 0.15, 0.3])
    order = [1, 3, 2, 0]
    sampler = Sampler(temperature=2.0, top_p=top_p)
    drawn = [sampler(2.0 * np.log(share)) for _ in range(4000)]
    assert set(drawn) == set(order[:kept])
    expected = share[order[:kept]] / share[order[:kept]].sum()
    found = np.array([drawn.count(i) for i in order[:kept]]) / len(drawn)
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_eos_and_stop_end_an_answer(exported: Path) -> None:
    runtime = find(exported, "onnxruntime").open("cpu")
    free = greedy(runtime, PROMPT)
    last = next(i for i, token in enumerate(free) if i > 1 and token not in free[:i])
    how: dict[str, Any] = {"max_new_tokens": 12, "sampler": Sampler()}
    ended = Generation(runtime, PROMPT, eos={free[last]}, **how)
    assert list(ended) == free[:last]
    assert ended.finish == "eos"
    stopped = Generation(runtime, PROMPT, stop=lambda: True, **how)
    assert (list(stopped), stopped.finish) == (free[:1], "stopped")
    full = Generation(runtime, PROMPT, **how)
    assert (list(full), full.finish) == (free, "length")
    assert full.read == 1  # the prompt is in the cache; its last token is read for its logits


class Clock:
    """Time that only the runtime spends: one second a prompt token, ten a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.reads: list[int] = []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def runtime(self) -> Runtime:
        clock = self

        class Fake(Runtime):
            name = "fake"
            cache_bytes = 0

            def _forward(self, read: list[int]) -> np.ndarray:
                clock.reads.append(len(read))
                clock.now += len(read) if len(read) > 1 else 10
                return np.arange(96.0)

            def _cut(self, length: int) -> bool:
                return True

        return Fake(Facts(96, 128, frozenset()))


def test_rates_are_tokens_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    runtime = clock.runtime()
    rounds = time_rounds(runtime, prompt_tokens=8, new_tokens=6, repeats=2)
    assert len(runtime.tokens) == 8 + 6  # every round begins with an empty cache
    assert clock.reads == [8] + 4 * [1] + 2 * ([8] + 6 * [1])  # the first request is the warm-up
    assert (rounds.first, rounds.prefill, rounds.decode) == (8, [8, 8], [60, 60])
    assert rates(6, [2.0, 1.0, 4.0]) == {"median": 3.0, "min": 1.5, "max": 6.0}
    with pytest.raises(InferenceError, match="context of 128"):
        time_rounds(clock.runtime(), prompt_tokens=120, new_tokens=9, repeats=1)


def test_an_answer_counts_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    answer = Generation(clock.runtime(), [3] * 5, max_new_tokens=4, sampler=Sampler())
    for _ in answer:
        clock.now += 1000  # the reader's time is not the model's
    assert (answer.prefill_seconds, answer.decode_seconds) == (5, 30)
    assert (answer.prefill_rate, answer.decode_rate) == (1.0, 0.1)


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_every_token_that_is_counted_runs(name: str, exported: Path) -> None:
    lengths: list[int] = []

    def note(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, LlamaForCausalLM):
            lengths.append(args[0].shape[1])

    target = find(exported, name)
    with register_module_forward_hook(note):
        found = measure(target, device="cpu", prompt_tokens=8, new_tokens=6, repeats=2)
    if name == "torch":
        assert lengths == [8] + 4 * [1] + 2 * ([8] + 6 * [1])
    for kind in ("prefill", "decode"):
        assert 0 < found[kind]["min"] <= found[kind]["median"] <= found[kind]["max"]
    assert 0 < found["load_seconds"] < 60
