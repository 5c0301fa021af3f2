"""Words in error messages."""

from __future__ import annotations

from compressor.errors import CompressError, MissingDependency, did_you_mean


def test_a_near_miss_is_named() -> None:
    assert did_you_mean("rnak", ["rank", "alpha"]) == " (did you mean 'rank'?)"


def test_else_the_options_are_listed() -> None:
    assert did_you_mean("zzz", ["rank", "alpha"]) == "; known: alpha, rank"
    assert did_you_mean("zzz", []) == ""


def test_a_missing_package_comes_with_its_command() -> None:
    error = MissingDependency("onnxruntime", "cpu", "running an ONNX export")
    assert isinstance(error, CompressError)
    assert "pip install 'compress-llm[cpu]'" in str(error)
