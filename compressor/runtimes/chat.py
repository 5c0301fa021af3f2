"""A conversation of several turns over one cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from compressor.errors import InferenceError
from compressor.runtimes.base import Runtime
from compressor.runtimes.generate import Generation, Sampler
from compressor.runtimes.text import Message, encode_chat, stream


class Conversation:
    """Questions and answers in the model's chat template; a new turn reads only what is new.

    What the cache already begins with is found by comparing tokens, so a template that rewrites
    earlier turns costs time and never changes an answer. A model without a template goes on as
    plain text: each question is appended to all that was said.

    Attributes:
        messages: all turns so far.
        last: the latest answer, with its figures.
    """

    def __init__(
        self, runtime: Runtime, tokenizer: Any, sampler: Sampler, *, max_new_tokens: int
    ) -> None:
        """Begin without a system prompt."""
        self.runtime, self.tokenizer = runtime, tokenizer
        self.last: Generation | None = None
        self.messages: list[Message] = []
        self._plain: list[int] = []
        self._sampler, self._count = sampler, max_new_tokens
        self._eos = runtime.facts.eos | {tokenizer.eos_token_id}

    @property
    def templated(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.tokenizer.chat_template)

    def reset(self) -> None:
        """Forget every turn but the system prompt."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._plain = []

    def set_system(self, text: str) -> None:
        """Begin anew with this system prompt, or with none for an empty one."""
        if not self.templated:
            raise InferenceError("this model has no chat template, so no system prompt")
        self.messages = [{"role": "system", "content": text}] if text else []

    def ask(self, text: str, stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer, piece by piece; what came before a stop belongs to the conversation.

        Raises `InferenceError`, with the question forgotten, when the context cannot hold it.
        """
        question = {"role": "user", "content": text}
        prompt = self._prompt(question)
        self.last = Generation(
            self.runtime,
            prompt,
            max_new_tokens=self._count,
            sampler=self._sampler,
            eos=self._eos,
            stop=stop,
        )
        answer = ""
        for piece in stream(self.last, self.tokenizer):
            answer += piece
            yield piece
        self.messages += [question, {"role": "assistant", "content": answer}]
        self._plain = [*prompt, *self.last.tokens]

    def _prompt(self, question: Message) -> list[int]:
        if self.templated:
            return encode_chat(self.tokenizer, [*self.messages, question])
        added = self.tokenizer.encode(question["content"], add_special_tokens=not self._plain)
        return [*self._plain, *added]
