"""Texts in: every kind of file, full windows, roles that never share one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from compressor import text
from compressor.errors import SourceError, TextError
from compressor.fetch import pinned
from compressor.sources import TextRole, TextSource
from compressor.text import documents, windows
from tests.tiny import save_corpus, save_tokenizer

SHARED = Path(__file__).parents[2] / "shared/data"
ROWS = [{"text": f"w{i} w{i + 1}", "other": i} for i in range(3, 9)]
TEXTS = [row["text"] for row in ROWS]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """Word-level, with end of text and without bos."""
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def corpus(tmp_path: Path) -> TextSource:
    """60 documents of 51 tokens each, end of text included."""
    save_corpus(tmp_path / "corpus.jsonl")
    return TextSource(path=str(tmp_path / "corpus.jsonl"), field="text")


def write(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif kind == "list.json":
        path.write_text(json.dumps(ROWS))
    elif kind == "object.json":
        path.write_text(json.dumps({str(i): row for i, row in enumerate(ROWS)}))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", ["jsonl", "list.json", "object.json", "parquet"])
def test_every_kind_of_file(kind: str, packed: bool, tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, kind)
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_name(f"{path.name}.gz")
    assert list(documents(TextSource(path=str(path), field="text"), tokenizer)) == TEXTS


def test_a_txt_file_is_one_document(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("w3 w4\n\nw5")
    assert list(documents(TextSource(path=str(tmp_path / "a.txt")), tokenizer)) == ["w3 w4\n\nw5"]


def test_a_file_of_an_installed_package(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    site = tmp_path / "site"
    (site / "corpus_pkg").mkdir(parents=True)
    (site / "corpus_pkg/__init__.py").write_text("raise SystemExit('imported')")
    (site / "corpus_pkg/data.jsonl").write_text(json.dumps(ROWS[0]))
    (site / "corpus_pkg-1.dist-info").mkdir()
    (site / "corpus_pkg-1.dist-info/METADATA").write_text("Name: corpus-pkg\nVersion: 1\n")
    listing = "corpus_pkg/__init__.py,,\ncorpus_pkg/data.jsonl,,\n"
    (site / "corpus_pkg-1.dist-info/RECORD").write_text(listing)
    monkeypatch.syspath_prepend(str(site))
    good = TextSource(package="corpus-pkg", file="corpus_pkg/data.jsonl", field="text")
    assert list(documents(good, tokenizer)) == TEXTS[:1]
    with pytest.raises(SourceError, match=r"did you mean 'corpus_pkg/data\.jsonl'"):
        list(documents(TextSource(package="corpus-pkg", file="corpus_pkg/dat.jsonl"), tokenizer))
    with pytest.raises(SourceError, match=r"not installed; run: pip install --no-deps nope"):
        list(documents(TextSource(package="nope", file="a"), tokenizer))


def test_chat_goes_through_the_models_template(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages, "prompt": "w3", "response": "w4"}))
    for chat in ("messages", ("prompt", "response")):
        source = TextSource(path=str(path), chat=chat)
        assert list(documents(source, tokenizer)) == ["user: w3\nassistant: w4\n"]
    tokenizer.chat_template = None
    with pytest.raises(TextError, match="no chat template"):
        list(documents(TextSource(path=str(path), chat="messages"), tokenizer))


def test_hub_data_sets_are_streamed(tmp_path: Path, tokenizer: Any) -> None:
    """The data set library reads a local folder as it reads the hub."""
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus", "jsonl")
    source = TextSource(dataset=str(tmp_path / "corpus"), field="text")
    assert list(documents(source, tokenizer)) == TEXTS
    missing = TextSource(dataset=str(tmp_path / "corpus"), field="text", split="nope")
    with pytest.raises(TextError, match=r"cannot be read .* check its name"):
        list(documents(missing, tokenizer))


def test_a_hub_data_set_is_read_at_the_commit_that_pins_it() -> None:
    source = TextSource(dataset="org/text", revision="main")
    assert pinned(source, "hub:abc").revision == "abc"
    assert pinned(TextSource(path="a.txt"), "sha256:abc").revision is None


def test_windows_are_full_seeded_and_counted(corpus: TextSource, tokenizer: Any) -> None:
    role = TextRole(windows=7, length=20)
    first = windows(corpus, tokenizer, role, seed=0)
    assert first.tokens.shape == (7, 20)
    assert first.tokens.dtype == torch.int64
    assert first.documents == 3
    assert sum(first.used.values()) == 140
    assert first.digest == windows(corpus, tokenizer, role, seed=0).digest
    assert first.digest != windows(corpus, tokenizer, role, seed=1).digest
    assert (first.tokens.flatten()[50], first.tokens.flatten()[101]) == (2, 2)


def test_blank_documents_are_passed_over(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": t} for t in ("", " \n", None, "w3 w4 w5")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = TextSource(path=str(tmp_path / "a.jsonl"), field="text")
    found = windows(source, tokenizer, TextRole(windows=1, length=4), seed=0)
    assert found.tokens.tolist() == [[3, 4, 5, 2]]
    assert found.documents == 1


def test_roles_share_no_document(corpus: TextSource, tokenizer: Any) -> None:
    role = TextRole(windows=20, length=30)
    first = windows(corpus, tokenizer, role, seed=0)
    second = windows(corpus, tokenizer, role, seed=0, used=first.used, hashes=first.hashes)
    assert first.used.keys() < second.used.keys()
    assert all(second.used[key] == count for key, count in first.used.items())
    rows = {tuple(row.tolist()) for row in first.tokens}
    assert not rows & {tuple(row.tolist()) for row in second.tokens}


def test_one_long_document_goes_on_behind_what_was_taken(tmp_path: Path, tokenizer: Any) -> None:
    words = [f"w{3 + i % 91}" for i in range(100)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    source = TextSource(path=str(tmp_path / "a.txt"))
    role = TextRole(windows=2, length=20)
    first = windows(source, tokenizer, role, seed=0)
    second = windows(source, tokenizer, role, seed=0, used=first.used, hashes=first.hashes)
    ids = tokenizer(" ".join(words))["input_ids"]
    assert first.tokens.flatten().tolist() == ids[:40]
    assert second.tokens.flatten().tolist() == ids[40:80]


def test_what_was_taken_adds_up_over_roles(tmp_path: Path, tokenizer: Any) -> None:
    """Windows of three lengths never look alike, so only the counts keep roles apart."""
    words = " ".join(f"w{3 + i % 91}" for i in range(100))
    (tmp_path / "a.txt").write_text(words)
    source, ids = TextSource(path=str(tmp_path / "a.txt")), tokenizer(words)["input_ids"]
    used: dict[str, int] = {}
    for length, start in ((20, 0), (30, 20), (25, 50)):
        found = windows(source, tokenizer, TextRole(windows=1, length=length), seed=0, used=used)
        assert found.tokens.flatten().tolist() == ids[start : start + length]
        used = found.used
    assert list(used.values()) == [75]


def test_a_window_an_earlier_role_has_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    for name, extra in (("a", "w3"), ("b", "w4")):
        (tmp_path / f"{name}.txt").write_text("w5 " * 10 + f"{extra} " * 20)
    role = TextRole(windows=1, length=10)
    first = windows(TextSource(path=str(tmp_path / "a.txt")), tokenizer, role, seed=0)
    other = TextSource(path=str(tmp_path / "b.txt"))
    second = windows(other, tokenizer, role, seed=0, used=first.used, hashes=first.hashes)
    assert second.repeated == 1
    assert second.tokens.tolist() == [[4] * 10]


def test_every_window_begins_with_bos_where_texts_do(corpus: TextSource, tokenizer: Any) -> None:
    plain = windows(corpus, tokenizer, TextRole(windows=3, length=19), seed=0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    found = windows(corpus, tokenizer, TextRole(windows=3, length=20), seed=0)
    assert found.tokens[:, 0].tolist() == [1, 1, 1]
    assert torch.equal(found.tokens[:, 1:], plain.tokens)


def test_shuffling_is_bounded_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SHUFFLE_BUFFER", 10)
    items = [str(i) for i in range(100)]
    shuffled = list(text._shuffled(iter(items), 0))
    assert sorted(shuffled) == sorted(items)
    streamed = [int(item) for item in shuffled[:90]]
    assert streamed != sorted(streamed)  # while it streams, not only what is left at the end
    assert all(item <= place + 9 for place, item in enumerate(streamed))


def test_a_conversation_the_template_refuses(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"m": [{"role": "user", "content": "w3"}]}))
    with pytest.raises(TextError, match=r"a\.jsonl: .*template refuses .*roles must alternate"):
        list(documents(TextSource(path=str(tmp_path / "a.jsonl"), chat="m"), tokenizer))


def _broken_gzip() -> bytes:
    """A sound header over a damaged deflate stream."""
    data = bytearray(gzip.compress(b"w3 w4 w5 w6" * 1000, mtime=0))
    data[10] = 0xFF  # block type 3, which deflate reserves
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "content", "settings", "said"),
    [
        ("a.jsonl", b'{"text": "w3"}\n{bad\n', {"field": "text"}, r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "w3"}\n', {"field": "txt"}, "did you mean 'text'"),
        ("a.jsonl", b'{"text": "w3"}\n', {}, "say which holds the text"),
        ("a.jsonl", b'{"m": "w3"}\n', {"chat": "m"}, "no list of messages"),
        ("a.jsonl", b'{"m": ["w3"]}\n', {"chat": "m"}, "no list of messages"),
        ("a.json", b"3", {"field": "text"}, "expected a list or object of records, got 3"),
        ("a.json", b'"w3 w4"', {}, "expected a list or object of records, got 'w3 w4'"),
        ("a.txt", b"", {}, "0 windows of 8 tokens found, 2 wanted"),
        ("a.txt", b"w3 w4 w5 w6 w7 w8 w9 w10 w11", {}, "1 windows of 8 tokens found"),
        ("a.txt", b"w3 \xff", {}, "cannot be read as UTF-8"),
        ("a.txt.gz", b"no gzip", {}, "cannot be read as UTF-8"),
        ("a.txt.gz", gzip.compress(b"w3 w4", mtime=0)[:-9], {}, "ended before the end-of-stream"),
        ("a.txt.gz", _broken_gzip(), {}, "invalid block type"),
        ("a.parquet", b"no parquet", {"field": "text"}, "not a readable parquet"),
        ("a.csv", b"", {}, "expected .txt, .jsonl, .json or .parquet"),
        ("a.jsonl", b"[1, 2]\n", {"field": "text"}, "expected records with fields, got list"),
    ],
)
def test_what_cannot_be_read_is_explained(
    name: str, content: bytes, settings: dict[str, Any], said: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    source = TextSource(path=str(tmp_path / name), **settings)
    with pytest.raises(TextError, match=said):
        windows(source, tokenizer, TextRole(windows=2, length=8), seed=0)


def test_a_damaged_parquet_page_names_the_file(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, "parquet")
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the first page; header and footer stay sound
    path.write_bytes(data)
    with pytest.raises(TextError, match=r"data\.parquet: not a readable parquet") as caught:
        list(documents(TextSource(path=str(path), field="text"), tokenizer))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_real_files(tokenizer: Any) -> None:
    first = {
        "wikitext2-tokenized/valid-head.txt": {},
        "c4-calib/c4.utf8.gz": {},
        "piqa/piqa_valid.jsonl": {"field": "query"},
    }
    for name, settings in first.items():
        source = TextSource(path=str(SHARED / name), **settings)
        assert len(next(iter(documents(source, tokenizer)))) > 10
    tokenizer.chat_template = TEMPLATE
    dolly = SHARED / "dolly-hhrlhf-small/dolly_hhrlhf_train_small.jsonl"
    source = TextSource(path=str(dolly), chat=("prompt", "response"))
    assert next(iter(documents(source, tokenizer))).startswith("user: ")
