"""Tokens into text as they come, and messages into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Message = dict[str, str]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of tokens that come one by one; all pieces together are the text of all tokens.

    A character whose bytes are spread over several tokens is given with its last one. What a
    token adds is the difference of two decodings that begin at the same earlier token, because
    many tokenizers write the first token of a text differently.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Begin a text; `tokenizer` is one of transformers."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = self._given = 0

    def add(self, token: int) -> str:
        """The text that this token completes, often empty."""
        self._tokens.append(token)
        return self._rest(final=False)

    def flush(self) -> str:
        """What is left at the end: the bytes of a character that never came whole."""
        return self._rest(final=True)

    def _rest(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._given])
        after = self._decode(self._tokens[self._begin :])
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not final):
            return ""
        self._begin, self._given = self._given, len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def stream(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """The text of tokens as they come, without empty pieces."""
    pieces = Detokenizer(tokenizer)
    for token in tokens:
        if piece := pieces.add(token):
            yield piece
    if rest := pieces.flush():
        yield rest


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation in the model's own template, the answer's heading included."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))
