"""Text in: documents from any source, cut into full windows that no two roles share."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compressor.errors import MissingDependency, TextError, did_you_mean
from compressor.fetch import locate_text
from compressor.sources import TextRole, TextSource

SHUFFLE_BUFFER = 10_000
"""Documents held at once for shuffling; a corpus below that is shuffled whole."""


@dataclass(frozen=True)
class Windows:
    """Windows of one role.

    Attributes:
        tokens: (N, T) int64; every window is full.
        used: sha256 of a document -> tokens taken from it, earlier roles included.
        hashes: sha256 of every window, earlier roles included.
        documents: how many documents this role drew from.
        repeated: windows dropped because an earlier role has the same.
    """

    tokens: Tensor
    used: dict[str, int]
    hashes: frozenset[str]
    documents: int
    repeated: int

    @property
    def digest(self) -> str:
        """Sha256 of the token ids."""
        return _sha(self.tokens.numpy().tobytes())


def windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    role: TextRole,
    *,
    seed: int,
    used: dict[str, int] | None = None,
    hashes: frozenset[str] = frozenset(),
) -> Windows:
    """Cut `role.windows` windows of `role.length` tokens from shuffled documents.

    Documents are joined by the end-of-text token; where the tokenizer itself begins a text
    with its bos token, so does every window. Documents in `used` are passed over and only
    continued, behind the tokens already taken, when there are no others.
    Raises `TextError` when the source holds too little.
    """
    taken = dict(used or {})
    bos = _bos(tokenizer)
    found: list[Tensor] = []
    seen = set(hashes)
    repeated = 0
    body = role.length - len(bos)
    buffer: list[int] = []
    fresh = _fresh_then_used(source, tokenizer, seed, taken)
    for count, (key, tokens) in enumerate(fresh, start=1):
        position = 0
        while position < len(tokens) and len(found) < role.windows:
            piece = tokens[position : position + body - len(buffer)]
            position += len(piece)
            buffer += piece
            if len(buffer) < body:
                break
            window = torch.tensor(bos + buffer)
            buffer = []
            digest = _sha(window.numpy().tobytes())
            if digest in seen:
                repeated += 1
            else:
                seen.add(digest)
                found.append(window)
        taken[key] = taken.get(key, 0) + position
        if len(found) == role.windows:
            return Windows(torch.stack(found), taken, frozenset(seen), count, repeated)
    raise TextError(
        f"{_name(source)}: {len(found)} windows of {role.length} tokens found, {role.windows} "
        f"wanted, {role.windows * role.length:,} tokens in all; give more text, fewer windows or "
        "a smaller length"
    )


def _fresh_then_used(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, seed: int, taken: dict[str, int]
) -> Iterator[tuple[str, list[int]]]:
    """Yield (sha256, tokens): new documents first, then what is left of used ones."""
    before = dict(taken)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for again in (False, True):
        for document in _shuffled(documents(source, tokenizer), seed):
            key = _sha(document.encode())
            if (key in before) is not again or not document.strip():
                continue
            tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            rest = (tokens + end)[before.get(key, 0) :]
            if rest:
                yield key, rest
        if not before:
            return


def documents(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the documents of a source one by one; a .txt file is one document.

    Raises `TextError` for a missing field, a broken line or undecodable bytes.
    """
    for record in _records(source):
        if isinstance(record, str):
            yield record
        elif source.chat:
            yield _chat(record, source, tokenizer)
        else:
            yield _field(record, source.field, source)


def _records(source: TextSource) -> Iterator[Any]:
    if source.dataset:
        yield from _hub_records(source)
        return
    path = locate_text(source)
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    readers = {".txt": _whole, ".jsonl": _lines, ".json": _json, ".parquet": _parquet}
    readers |= {".raw": _whole, ".utf8": _whole}
    if kind not in readers:
        raise TextError(f"{path}: expected .txt, .jsonl, .json or .parquet, plain or .gz")
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            yield from readers[kind](file, path)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TextError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _whole(file: IO[bytes], path: Path) -> Iterator[str]:
    yield file.read().decode("utf-8")


def _lines(file: IO[bytes], path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _parsed(line, f"{path}:{number}")


def _json(file: IO[bytes], path: Path) -> Iterable[Any]:
    value = _parsed(file.read(), str(path))
    if not isinstance(value, dict | list):
        raise TextError(f"{path}: expected a list or object of records, got {value!r:.40}")
    return value.values() if isinstance(value, dict) else value


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise TextError(f"{where}: not valid JSON ({error})") from error


def _parquet(file: IO[bytes], path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException, parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:  # a damaged page is an OSError without a path
        reason = str(error).strip().partition("\n")[0]
        raise TextError(f"{path}: not a readable parquet file ({reason})") from error


def _hub_records(source: TextSource) -> Iterator[Any]:
    try:
        import datasets
    except ImportError:
        raise MissingDependency("datasets", "hub", "reading a hub data set") from None
    try:
        rows = datasets.load_dataset(
            source.dataset,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        yield from rows
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise TextError(
            f"hub data set {source.dataset!r} cannot be read ({reason}); check its name, "
            "configuration and split, or give a local file under path"
        ) from error


def _field(record: Any, field: str | None, source: TextSource) -> str:
    if not isinstance(record, dict):
        raise TextError(
            f"{_name(source)}: expected records with fields, got {type(record).__name__}"
        )
    if field is None:
        raise TextError(
            f"{_name(source)}: its records have fields; say which holds the text with `field`"
            f" (found: {', '.join(map(str, record))})"
        )
    if field not in record:
        raise TextError(
            f"{_name(source)}: no field {field!r}{did_you_mean(field, map(str, record))}"
        )
    value = record[field]
    if not isinstance(value, str | None):
        raise TextError(
            f"{_name(source)}: field {field!r} holds {type(value).__name__}, expected text"
        )
    return value or ""


def _chat(record: Any, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(source.chat, str):
        messages = record.get(source.chat) if isinstance(record, dict) else None
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise TextError(f"{_name(source)}: field {source.chat!r} holds no list of messages")
    else:
        assert source.chat is not None
        prompt, response = (_field(record, name, source) for name in source.chat)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    if not tokenizer.chat_template:
        raise TextError("the model's tokenizer has no chat template; use `field`, not `chat`")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise TextError(
            f"{_name(source)}: the model's chat template refuses a conversation ({error})"
        ) from error


def _shuffled(items: Iterator[str], seed: int) -> Iterator[str]:
    """Seeded shuffle through a buffer of bounded length."""
    order = random.Random(seed)
    buffer: list[str] = []
    for item in items:
        buffer.append(item)
        if len(buffer) >= SHUFFLE_BUFFER:
            index = order.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    order.shuffle(buffer)
    yield from buffer


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] when the tokenizer begins every text with it, else nothing."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _name(source: TextSource) -> str:
    return source.path or source.dataset or f"{source.package}:{source.file}"


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
