"""Artifacts are committed whole or not at all, and damage is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressor import sources
from compressor.artifact import Manifest, Store, key_of, verify
from compressor.errors import ArtifactError
from compressor.fetch import fingerprint_model
from compressor.sources import ModelSource

KEY = key_of("prune", "blocks", 1, {"n": 1}, {})


def build(store: Store, text: str = "weights") -> Path:
    with store.draft("prune", KEY) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "file").write_text(text)
        manifest = Manifest(
            stage="prune", method="blocks", version=1, key=KEY, params={"n": 1}, parents={}
        )
        return store.commit(draft, manifest)


def _write_and_break(draft: Path) -> None:
    (draft / "half").write_text("x")
    raise ValueError("broken")


def test_commit_then_cached(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.status("prune", KEY) == "missing"
    store.work("prune", KEY).mkdir(parents=True)
    folder = build(store)
    assert folder.name == f"prune-{KEY[:16]}"
    assert store.status("prune", KEY) == "cached"
    assert verify(folder) == []
    assert not store.work("prune", KEY).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="broken"), store.draft("prune", KEY) as draft:
        _write_and_break(draft)
    assert list(tmp_path.iterdir()) == []


def test_truncation_is_noticed_and_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = build(store)
    (folder / "sub" / "file").write_text("w")
    assert store.status("prune", KEY) == "damaged"
    aside = store.set_aside("prune", KEY)
    assert (aside / "sub" / "file").read_text() == "w"
    assert store.status("prune", KEY) == "missing"


def test_same_length_change_is_found_by_verify(tmp_path: Path) -> None:
    folder = build(Store(tmp_path))
    (folder / "sub" / "file").write_text("wEIGHTS")
    (fault,) = verify(folder)
    assert "sub/file" in fault


def test_missing_manifest_is_no_artifact(tmp_path: Path) -> None:
    folder = build(Store(tmp_path))
    (folder / "manifest.json").unlink()
    assert Store(tmp_path).status("prune", KEY) == "damaged"
    with pytest.raises(ArtifactError, match="not an artifact"):
        verify(folder)


def test_two_processes_cannot_build_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.draft("prune", KEY), pytest.raises(ArtifactError, match="another process"):
        build(Store(tmp_path))


def test_a_crashed_draft_is_cleaned_up(tmp_path: Path) -> None:
    stale = tmp_path / f".tmp-{KEY[:16]}-999999"
    stale.mkdir()
    build(Store(tmp_path))
    assert not stale.exists()


def test_a_crash_while_replacing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    folder, replace = build(store), os.replace

    def dies(source: Path, target: Path) -> None:
        if target == folder:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            build(store, "newer")
    assert store.status("prune", KEY) == "missing"
    with store.draft("prune", KEY):
        assert store.status("prune", KEY) == "cached"
    assert (folder / "sub/file").read_text() == "weights"
    assert (build(store, "newer") / "sub/file").read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_every_part_of_the_key_counts() -> None:
    base = ("prune", "blocks", 1, {"n": 1}, {"checkpoint": "a"})
    variants = [
        ("heal", *base[1:]),
        ("prune", "other", *base[2:]),
        (*base[:2], 2, *base[3:]),
        (*base[:3], {"n": 2}, base[4]),
        (*base[:4], {"checkpoint": "b"}),
    ]
    keys = {key_of(*base), *(key_of(*v) for v in variants)}
    assert len(keys) == 6
    assert key_of(*base[:3], {"b": 1, "a": 2}, {}) == key_of(*base[:3], {"a": 2, "b": 1}, {})


def test_an_artifact_that_is_imported_keeps_its_manifest(tmp_path: Path) -> None:
    """An import links the files of a folder, its manifest too if it has one."""
    store = Store(tmp_path)
    source = build(store)
    before = (source / "manifest.json").read_bytes()
    key = key_of("model", "import", 1, {}, {})
    with store.draft("model", key) as draft:
        (draft / "manifest.json").symlink_to(source / "manifest.json")
        manifest = Manifest(
            stage="model", method="import", version=1, key=key, params={}, parents={}
        )
        folder = store.commit(draft, manifest)
    assert (source / "manifest.json").read_bytes() == before
    assert store.status("prune", KEY) == store.status("model", key) == "cached"
    assert verify(folder) == []


def test_a_linked_source_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fingerprint is what the key was made from; `verify` reads the file itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("weights")
    fingerprint_model(ModelSource(path=str(weights.parent)))
    read: list[Path] = []
    monkeypatch.setattr(sources, "file_digest", lambda path: read.append(path) or "")
    store, key = Store(tmp_path / "store"), key_of("model", "import", 1, {}, {})
    with store.draft("model", key) as draft:
        (draft / weights.name).symlink_to(weights)
        manifest = Manifest(
            stage="model", method="import", version=1, key=key, params={}, parents={}
        )
        folder = store.commit(draft, manifest)
    assert read == [] and verify(folder) == []
    weights.write_text("wEIGHTS")
    assert len(verify(folder)) == 1
