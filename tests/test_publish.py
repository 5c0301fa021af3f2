"""Publishing by the hub's real client against a server that speaks its calls."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub import ModelCard, snapshot_download
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from compressor.artifact import Manifest, Store
from compressor.errors import ArtifactError, CompressError, PublishError
from compressor.publish import Item, destination
from compressor.publish.bundle import Bundle, open_bundle
from compressor.publish.card import fenced, plain
from compressor.publish.origin import Origin, origin
from compressor.publish.snippets import loads, readers, snippets
from compressor.sources import ModelSource
from pipelines.cli import cli
from pipelines.config import parse
from pipelines.run import Options, make_plan, run
from pipelines.story import configuration, history, tell
from tests.hub_server import Fault, HubServer, Repository
from tests.tiny import save_corpus, save_tiny

REPOSITORY = "org/tiny-4bit"
TO = f"hf://{REPOSITORY}"


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer that knows every byte, as every runtime reads it."""
    letters = sorted(ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *letters]
    core = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, pruned, in 4 bits and exported by a run whose name is `tiny`."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny(folder / "model", "llama", hidden_size=64, vocab_size=272)
    save_byte_tokenizer(folder / "model")
    save_corpus(folder / "corpus.jsonl")
    run(parse(tree(folder), "test"), Store(folder / "artifacts/store"), Options())
    return folder


def tree(folder: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"path": str(folder / "model")},
        "text": {
            "source": {"path": str(folder / "corpus.jsonl"), "field": "text"},
            "evaluation": {"windows": 4, "length": 32},
        },
        "evaluate": {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1},
        "stages": [
            {"select": {"method": "fixed", "blocks": [1]}},
            "prune",
            {"quantize": {"method": "rtn", "group_size": 16}},
            {"export": {"check_tokens": 8}},
        ],
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """An empty hub that the client in this process talks to, with a token that may write."""
    server = HubServer()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    yield server
    server.close()


def publish(project: Path, *args: str, name: str = "tiny") -> None:
    store = str(project / "artifacts")
    cli.main(["publish", name, "--to", TO, "--store", store, "-q", *args], standalone_mode=False)


def exports(project: Path) -> Path:
    record = json.loads((project / "artifacts/runs/tiny.json").read_text())
    return Path(record["exports"]["safetensors"]).parent


def card_of(hub: HubServer, branch: str = "main") -> str:
    found = hub.repositories[REPOSITORY]
    return found.commits[found.branches[branch]]["README.md"].decode()


def test_what_is_pulled_into_an_empty_folder_is_the_model(project: Path, hub: HubServer) -> None:
    publish(project, "--tag", "v1")
    found = hub.repositories[REPOSITORY]
    assert found.private
    assert found.tags == {"v1": found.branches["main"]}
    pulled = Path(snapshot_download(REPOSITORY))
    prompt = torch.tensor([[72, 101, 90, 33]])
    outputs = []
    for folder in (exports(project) / "safetensors", pulled):
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        AutoTokenizer.from_pretrained(folder)
        outputs.append(model.generate(prompt, max_new_tokens=16, do_sample=False).tolist())
    assert outputs[0] == outputs[1]
    manifest = json.loads((exports(project) / "manifest.json").read_text())
    local = {f["path"].removeprefix("safetensors/") for f in manifest["files"]}
    assert {str(p.relative_to(pulled)) for p in pulled.rglob("*") if p.is_file()} == (
        local | {"README.md", ".gitattributes"}
    )


def test_the_card_describes_and_its_snippets_run(project: Path, hub: HubServer) -> None:
    publish(project, "--license", "mit", "--base-model", "org/base", "--public")
    text = card_of(hub)
    data = ModelCard(text).data.to_dict()
    assert (data["license"], "license_name" in data) == ("mit", False)
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["compress", "onnx", "pruned", "quantized"]
    assert "(`pip install transformers torch compressed-tensors`)" in text
    assert re.search(r"\*\*vLLM\*\* \(`pip install vllm`\): .*not run by this project", text)
    for stage in ("original", "prune", "quantize", "onnx"):
        assert re.search(rf"^\| {stage} \|", text, re.MULTILINE)
    for entry in json.loads((exports(project) / "manifest.json").read_text())["files"]:
        assert entry["sha256"] in text
    code = dict(re.findall(r"\*\*([\w-]+)\*\* .*?\n\n```python\n(.*?)\n```", text, re.DOTALL))
    assert set(code) == {"transformers", "onnxruntime", "onnxruntime-genai"}
    outputs = {name: run_snippet(text) for name, text in code.items() if runs_here(name)}
    assert {"transformers", "onnxruntime"} <= set(outputs)
    shortest = min(map(len, outputs.values()))  # some stop at the end of the text
    assert shortest > len("The history of the city begins in") + 1
    assert len({tuple(tokens[:shortest]) for tokens in outputs.values()}) == 1


def test_a_card_does_not_say_what_nobody_knows(project: Path, hub: HubServer) -> None:
    publish(project)
    text = card_of(hub)
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "unknown")
    assert not {"base_model", "base_model_relation"} & set(data)
    assert "licence of the source is not known" in text


def runs_here(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def run_snippet(code: str) -> list[int]:
    """Run a snippet of the card as it stands and return its tokens, the prompt's included."""
    names: dict[str, Any] = {"print": lambda text: None}
    exec(code, names)
    return [int(token) for token in np.asarray(names["output"]).reshape(-1)]


def test_an_interrupted_upload_sends_only_what_is_missing(project: Path, hub: HubServer) -> None:
    def dies(request: str) -> None:
        if request.startswith("PUT") and hub.blobs:
            raise ConnectionError

    hub.interfere = dies
    with pytest.raises(PublishError, match="run the same command again"):
        publish(project)
    (arrived,) = hub.blobs
    found = hub.repositories[REPOSITORY]
    assert list(found.commits[found.branches["main"]]) == [".gitattributes"]  # nothing half-seen
    hub.interfere, before = (lambda request: None), len(hub.uploads())
    publish(project)
    assert len(hub.blobs) == 3  # weights, graph and its data
    sent = hub.uploads()[before:]
    assert len(sent) == 2 and not any(arrived in request for request in sent)


def test_publishing_again_sends_and_commits_nothing(project: Path, hub: HubServer) -> None:
    publish(project, "--tag", "v1")
    commits, uploads = len(hub.repositories[REPOSITORY].commits), len(hub.uploads())
    publish(project, "--tag", "v1")
    assert len(hub.repositories[REPOSITORY].commits) == commits
    assert len(hub.uploads()) == uploads
    with pytest.raises(PublishError, match="the tag 'v1' marks another commit"):
        publish(project, "--license", "mit", "--tag", "v1")
    assert len(hub.repositories[REPOSITORY].commits) == commits


@pytest.mark.parametrize("path", ["model.safetensors", "config.json", "onnx/model.onnx.data"])
def test_bytes_that_change_on_the_hub_are_noticed(path: str, project: Path, hub: HubServer) -> None:
    def flip(name: str, data: bytes) -> bytes:
        return bytes([data[0] ^ 1]) + data[1:] if name == path else data

    hub.rot = flip
    with pytest.raises(PublishError, match=f"not what was uploaded: {path} differs"):
        publish(project, "--tag", "v1")
    assert hub.repositories[REPOSITORY].tags == {}


def test_a_branch_gets_the_model_and_main_is_left_alone(project: Path, hub: HubServer) -> None:
    publish(project, "--revision", "4bit", "--tag", "v1")
    found = hub.repositories[REPOSITORY]
    assert list(found.commits[found.branches["main"]]) == [".gitattributes"]
    assert found.tags["v1"] == found.branches["4bit"]
    text = card_of(hub, "4bit")
    assert text.count('revision="4bit"') == 4
    assert "vllm serve org/tiny-4bit --revision 4bit" in text


def test_files_of_another_model_go_only_when_asked(project: Path, hub: HubServer) -> None:
    publish(project)
    found = hub.repositories[REPOSITORY]
    files = found.commits[found.branches["main"]]
    old = {"model-00002-of-00002.safetensors": b"old", "onnx/model_2.onnx": b"old"}
    found.commit("main", files | old)
    with pytest.raises(PublishError, match=r"2 file.*model-00002-of-00002\.safe.*--replace"):
        publish(project)
    publish(project, "--replace")
    assert found.commits[found.branches["main"]].keys() == files.keys()


def test_who_may_see_it_is_never_a_surprise(project: Path, hub: HubServer) -> None:
    with pytest.raises(PublishError, match="licence of the source is not known; give --license"):
        publish(project, "--public")
    assert hub.requests == []
    publish(project, "--public", "--license", "mit")
    assert not hub.repositories[REPOSITORY].private
    with pytest.raises(PublishError, match="exists and is public; give --public"):
        publish(project)


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "set HF_TOKEN"),
        (403, "write access"),
        (404, "no such repository or branch"),
        (409, "changed from elsewhere"),
        (412, "changed from elsewhere"),
        (418, "run the same command again"),
    ],
)
@pytest.mark.parametrize("call", ["POST /api/models/org/tiny-4bit/commit", "PUT /storage"])
def test_what_the_hub_refuses_is_one_line_with_a_remedy(
    call: str, status: int, advice: str, project: Path, hub: HubServer
) -> None:
    def refuse(request: str) -> None:
        if request.startswith(call):
            raise Fault(status, "because")

    hub.interfere = refuse
    with pytest.raises(PublishError, match=f"{advice}.*{status}: because") as caught:
        publish(project)
    assert "\n" not in str(caught.value)
    assert "hf_writer" not in str(caught.value)


def test_a_commit_from_elsewhere_in_between_is_not_overwritten(
    project: Path, hub: HubServer
) -> None:
    def slip_in(request: str) -> None:
        if request.startswith("POST") and "/commit/" in request:
            hub.repositories[REPOSITORY].commit("main", {"theirs.txt": b"work"})

    hub.interfere = slip_in
    with pytest.raises(PublishError, match="changed from elsewhere"):
        publish(project)
    found = hub.repositories[REPOSITORY]
    assert list(found.commits[found.branches["main"]]) == ["theirs.txt"]


def test_the_command_line_says_it_in_one_line(project: Path, hub: HubServer) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_reader", "HF_HUB_DISABLE_XET": "1"}
    command = ["publish", "tiny", "--to", TO, "--store", str(project / "artifacts")]
    done = subprocess.run(
        [sys.executable, "-c", "from pipelines.cli import main; main()", *command],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: {TO}: the token may not do this.*\(403: .*\)\n", done.stderr)


def test_a_dry_run_lists_everything_and_contacts_nobody(
    project: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(project, "--dry-run")
    said = capsys.readouterr().out
    manifest = json.loads((exports(project) / "manifest.json").read_text())
    for entry in manifest["files"]:
        path = entry["path"].removeprefix("safetensors/")
        assert re.search(rf"^ +{entry['size_bytes']:,}  {re.escape(path)}$", said, re.MULTILINE)
    assert f"\n{len(manifest['files']) + 1} files, " in said
    assert "license_name: unknown" in said
    assert hub.requests == []


def test_what_was_not_proved_is_refused(project: Path, tmp_path: Path, hub: HubServer) -> None:
    record = json.loads((project / "artifacts/runs/tiny.json").read_text())
    folders = {stage["verb"]: stage["folder"] for stage in record["stages"]}
    bad = shutil.copytree(exports(project), tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())

    def refused(error: type[CompressError], words: str, name: str | Path) -> None:
        with pytest.raises(error, match=words):
            publish(project, name=str(name))

    refused(PublishError, "made by 'quantize'.*compress export", folders["quantize"])
    refused(ArtifactError, f"no manifest.json.*give {bad}", bad / "onnx")
    refused(ArtifactError, "neither a folder nor a run in .*'tiny'", "tini")
    with (bad / "onnx/model.onnx").open("ab") as file:
        file.write(b"0")
    refused(PublishError, "1 file.*model.onnx: its sha256 is not", bad)
    del manifest["metrics"]["onnx"]["parity"]
    (bad / "manifest.json").write_text(json.dumps(manifest))
    refused(PublishError, "the parity gate compared nothing", bad)
    command = ["publish", str(exports(project)), "--to", TO, "--store", "none"]
    with pytest.raises(PublishError, match=r"no record under .* knows"):
        cli.main(command, standalone_mode=False)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/name", "no such destination.*hf://org/name"),
        ("org/name", "no such destination"),
        ("hf://name", "expected hf://org/name"),
        ("hf://a/b/c", "expected hf://org/name"),
    ],
)
def test_a_destination_that_is_none_is_named(url: str, words: str) -> None:
    with pytest.raises(PublishError, match=words):
        destination(url)


def test_the_cards_yaml_makes_the_same_keys(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((project / "artifacts/runs/tiny.json").read_text())
    text = configuration(record)
    assert str(project) not in text
    monkeypatch.chdir(project)  # where the shortened paths are
    stages = make_plan(parse(YAML(typ="safe").load(text), "card"))
    assert [stage.key for stage in stages] == [stage["key"] for stage in record["stages"]]


def test_a_result_of_another_result_tells_its_whole_history(project: Path, tmp_path: Path) -> None:
    store = tmp_path / "artifacts"
    shutil.copytree(project / "artifacts/runs", store / "runs")
    first = json.loads((store / "runs/tiny.json").read_text())
    pruned = next(stage for stage in first["stages"] if stage["verb"] == "prune")
    shutil.copytree(pruned["folder"], tmp_path / "shallower")
    second = tree(project) | {"name": "second", "stages": ["export"]}
    second |= {"model": {"path": str(tmp_path / "shallower")}, "text": {}}
    made = run(parse(second, "test"), Store(store / "store"), Options())
    found = history(Path(made["stages"][-1]["folder"]), store)
    assert [record["name"] for record in found] == ["tiny", "second"]
    story = tell(found, "org/name", "main", Origin(""))
    assert [step.verb for step in story.steps][-1] == "export"
    assert {"prune", "quantize"} <= {step.verb for step in story.steps}
    assert list(story.rebuild) == ["tiny.yaml", "second.yaml"]
    assert story.origin.words == "model"


def test_the_licence_comes_from_where_the_model_does(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "model", tmp_path / "model")
    source = ModelSource(path=str(tmp_path / "model"))
    assert origin(source) == Origin("model")
    (tmp_path / "model/README.md").write_text("---\nlicense: mit\n---\nwords\n")
    assert origin(source) == Origin("model", None, "mit")
    writer = GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert origin(ModelSource(path=str(tmp_path / "small.gguf"))).license == "apache-2.0"


def test_the_licence_of_a_hub_model_is_asked_of_the_hub(hub: HubServer) -> None:
    source = ModelSource(hub="org/base")
    assert origin(source) == Origin("org/base", "org/base", None)
    hub.repositories["org/base"] = Repository(private=False)
    hub.repositories["org/base"].card = {"license": "gemma"}
    assert origin(source) == Origin("org/base", "org/base", "gemma")


def test_a_measured_draft_is_on_the_card(
    project: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = exports(project), project / "artifacts"
    (project / "prompts.txt").write_text("w3 w4\n")
    command = ["draft", str(folder), str(project / "model"), "--new-tokens", "4", "-q"]
    given = ["--prompts", str(project / "prompts.txt"), "--store", str(store)]
    cli.main([*command, *given], standalone_mode=False)
    said = capsys.readouterr().out.strip()
    publish(project)
    text = card_of(hub)
    assert "## As a draft of its parent" in text
    assert plain(said) in text
    shutil.rmtree(store / "drafts")
    command[2] = str(folder / "safetensors")  # its own parent, which it was not made from
    cli.main([*command, *given], standalone_mode=False)
    publish(project)
    assert "## As a draft of its parent" not in card_of(hub)
    shutil.rmtree(store / "drafts")


@pytest.mark.parametrize("newest", [True, False])
def test_the_newest_version_of_a_reader_decides_about_its_snippet(
    newest: bool, project: Path, tmp_path: Path
) -> None:
    """What the card's `pip install` brings is the newest."""
    bundle = open_bundle(exports(project))
    rows = readers(bundle)
    ours = [row for row in rows if row["reader"].startswith("transformers")]
    for row, readable in zip(ours, (newest, not newest, True), strict=True):
        row["speed"] = "dense" if readable else "no"
    (tmp_path / "rows.json").write_text(json.dumps({"readers": rows}))
    items = [i for i in bundle.items if i.path != "quantization.json"]
    items.append(Item("quantization.json", tmp_path / "rows.json", 0, ""))
    changed = dataclasses.replace(bundle, items=items)
    assert loads(changed, "transformers") is newest
    assert loads(changed, "vLLM")


def test_a_model_with_its_own_code_says_so_and_loads(project: Path, hub: HubServer) -> None:
    given = tree(project) | {"name": "shallow", "text": {}}
    selection = {"method": "fixed", "blocks": [1], "attention": [2]}
    given["stages"] = [{"select": selection}, "prune", {"export": {"check_tokens": 4}}]
    run(parse(given, "test"), Store(project / "artifacts/store"), Options())
    publish(project, "--to", "hf://org/shallow", name="shallow")  # clients remember commits by name
    found = hub.repositories["org/shallow"]
    text = found.commits[found.branches["main"]]["README.md"].decode()
    assert "vLLM" not in text
    assert ModelCard(text).data.tags == ["compress", "onnx", "pruned"]
    assert "(`pip install transformers torch`)" in text
    code = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code[0].count("trust_remote_code=True") == 2
    outputs = [run_snippet(snippet) for snippet in code[:2]]
    shortest = min(map(len, outputs))
    assert shortest > 34
    assert outputs[0][:shortest] == outputs[1][:shortest]


def test_what_users_name_things_cannot_write_on_the_card() -> None:
    assert plain("a|b\n<b>[x](y) `c` *d*") == r"a\|b \<b\>\[x\](y) \`c\` \*d\*"
    assert fenced("name: x\n```\n# injected", "yaml").splitlines()[0] == "````yaml"
    assert fenced("name: x", "yaml") == "```yaml\nname: x\n```"


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({"vLLM 0.33 on CUDA": "no", "transformers 5.23": "dense"}, {"transformers"}),
        ({"vLLM 0.33 on CUDA": "no", "vLLM 0.33 on CPU": "fast", "transformers": "no"}, {"vLLM"}),
        ({}, {"transformers", "vLLM"}),
    ],
)
def test_runtimes_are_offered_by_what_reads_the_integers(
    speeds: dict[str, str], expected: set[str], tmp_path: Path
) -> None:
    rows = [{"reader": name, "speed": speed, "why": ""} for name, speed in speeds.items()]
    found = {"config.json": "{}"} | (
        {"quantization.json": json.dumps({"readers": rows})} if rows else {}
    )
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    about = {"stage": "export", "method": "folders", "version": 1, "key": "0", "parents": {}}
    manifest = Manifest(**about, params={"folders": {"onnx_dtype": "float32"}})
    items = [Item(name, tmp_path / name, 0, "") for name in found]
    offered = snippets(Bundle(tmp_path, manifest, items, {}), "org/name", "main")
    assert set(offered) - {"onnxruntime", "onnxruntime-genai"} == expected
    manifest.params["folders"]["onnx_dtype"] = "bfloat16"  # which numpy lacks
    fewer = snippets(Bundle(tmp_path, manifest, items, {}), "org/name", "main")
    assert set(offered) - set(fewer) == {"onnxruntime"}
