"""`compress generate` and `compress chat`: hear a model in the terminal."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from compressor.errors import InferenceError
from pipelines.commands import JSON, QUIET

if TYPE_CHECKING:
    from compressor.runtimes.base import Runtime
    from compressor.runtimes.chat import Conversation
    from compressor.runtimes.generate import Generation

HELP = """\
/reset         forget the conversation, keep the system prompt
/system TEXT   begin anew with this system prompt (none without TEXT)
/exit          leave; Ctrl-D too
Ctrl-C         stop the answer; twice, leave"""

_OPTIONS = (
    click.argument("folder", type=click.Path(path_type=Path)),
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True,
                 help="Longest answer."),
    click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
                 help="0 takes the likeliest token; 1 draws as the model says."),
    click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0,
                 show_default=True, help="Draw from the likeliest tokens that hold this share."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the draws."),
    click.option("--runtime", default="auto", show_default=True,
                 help="torch, onnxruntime or genai; auto prefers onnxruntime."),
    click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto",
                 show_default=True),
    click.option("--threads", type=click.IntRange(min=1), help="The runtime's choice by default."),
)  # fmt: skip


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_options
@click.option("--prompt", required=True, help="What to go on from; - reads standard input.")
@click.option("--chat", "as_chat", is_flag=True, help="Ask it in the model's chat template.")
@JSON
@QUIET
def generate(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    as_chat: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Go on from a prompt with the model in FOLDER: an export, its onnx/, or a checkpoint.

    \b
    compress generate exported --prompt "The history of the city begins" --max-new-tokens 32
    compress generate exported --chat --prompt - < question.txt
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    runtime, tokenizer, sampler = _open(folder, **how)
    from compressor.runtimes.generate import Generation
    from compressor.runtimes.text import encode_chat, stream

    if as_chat and not tokenizer.chat_template:
        raise InferenceError(f"{folder}: the tokenizer has no chat template; leave --chat out")
    message = {"role": "user", "content": text}
    tokens = encode_chat(tokenizer, [message]) if as_chat else tokenizer.encode(text)
    eos = runtime.facts.eos | {tokenizer.eos_token_id}
    pieces = []
    with Interrupt() as stop:
        answer = Generation(
            runtime, tokens, max_new_tokens=max_new_tokens, sampler=sampler, eos=eos, stop=stop
        )
        for piece in stream(answer, tokenizer):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
    if as_json:
        click.echo(json.dumps(_report(answer, runtime, "".join(pieces)), indent=1))
        return
    click.echo()
    if not quiet:
        click.echo(_figures(answer, runtime), err=True)


@click.command()
@_options
@click.option("--system", help="A system prompt.")
def chat(folder: Path, max_new_tokens: int, system: str | None, **how: Any) -> None:
    """Talk to the model in FOLDER; a new turn reads only what is new.

    /help lists what can be typed beside questions.

    \b
    compress chat exported
    compress chat model-4bit --system "Answer in one sentence." --temperature 0.7
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (what input() edits lines and recalls them with)
    runtime, tokenizer, sampler = _open(folder, **how)
    from compressor.runtimes.chat import Conversation

    talk = Conversation(runtime, tokenizer, sampler, max_new_tokens=max_new_tokens)
    if not talk.templated:
        _say("this model has no chat template: it goes on from your text, and from all before it")
    if system:
        talk.set_system(system)
    limit = f", context of {runtime.facts.context} tokens" if runtime.facts.context else ""
    _say(f"{runtime.name} on {runtime.device}{limit}; /help for help")
    while (line := _read()) is not None and line != "/exit":
        try:
            if line.startswith("/"):
                _obey(line, talk)
            elif line:
                _answer(line, talk)
        except InferenceError as error:
            _say(f"{error}; /reset begins anew")


class Interrupt:
    """Makes the first Ctrl-C a question, asked by calling this, and the second one an end.

    So a runtime is never torn out of the middle of a step, and its cache stays whole.
    """

    def __init__(self) -> None:
        """Nobody has pressed it yet."""
        self._pressed = False

    def __call__(self) -> bool:
        """Whether it was pressed."""
        return self._pressed

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True


def _open(
    folder: Path,
    *,
    runtime: str,
    device: str,
    threads: int | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> tuple[Runtime, Any, Any]:
    """The runtime, the tokenizer and the sampler; what is cheap to refuse is refused first."""
    from compressor.runtimes import find

    target = find(folder, runtime)
    from compressor.model import load_tokenizer
    from compressor.runtimes.generate import Sampler
    from pipelines.quiet import silence_libraries

    silence_libraries()
    tokenizer = load_tokenizer(target.folder)
    return target.open(device, threads), tokenizer, Sampler(temperature, top_p, seed)


def _read() -> str | None:
    """A line from the terminal or a pipe; None at its end."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            _say("\n/exit or Ctrl-D leaves")


def _obey(line: str, talk: Conversation) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        talk.reset()
    elif command == "/system":
        talk.set_system(rest.strip())
    else:
        _say(HELP if command == "/help" else f"no command {command}\n{HELP}")


def _answer(line: str, talk: Conversation) -> None:
    with Interrupt() as stop:
        for piece in talk.ask(line, stop):
            click.echo(piece, nl=False)
    click.echo()
    assert talk.last
    _say(_figures(talk.last, talk.runtime))
    if talk.last.finish == "context":
        _say("the context is full: /reset begins anew")


def _figures(answer: Generation, runtime: Runtime) -> str:
    """What an answer took, in one line."""
    words = {"length": "cut at --max-new-tokens", "context": "cut: the context is full",
             "stopped": "stopped"}  # fmt: skip
    parts = [f"read {answer.read} tokens at {answer.prefill_rate:.1f} tokens/s"]
    rate = answer.decode_rate
    parts.append(f"wrote {len(answer.tokens)}" + (f" at {rate:.1f} tokens/s" if rate else ""))
    parts.append(f"{runtime.name} on {runtime.device}")
    return f"[{', '.join([*parts, *filter(None, [words.get(answer.finish)])])}]"


def _report(answer: Generation, runtime: Runtime, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.read,
        "finish": answer.finish,
        "runtime": runtime.name,
        "device": runtime.device,
        "first_token_seconds": answer.prefill_seconds,
        "prefill_tokens_per_second": answer.prefill_rate,
        "decode_tokens_per_second": answer.decode_rate,
    }


def _say(words: str) -> None:
    """A word beside the conversation, dim on a terminal."""
    click.secho(words, dim=True, err=True)
