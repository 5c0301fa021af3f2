"""Generating and chatting: text as it comes, caches kept over turns, errors in one line."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compressor.errors import InferenceError
from compressor.runtimes import find
from compressor.runtimes.chat import Conversation
from compressor.runtimes.generate import Generation, Sampler
from compressor.runtimes.text import Detokenizer, encode_chat, stream
from pipelines.chat_command import Interrupt, chat, generate
from pipelines.cli import main
from tests.tiny import save_tiny, save_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "Zürich 🦊 naïve 東京\n\tend"


def save_bytes_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """A tokenizer whose tokens are bytes, three special ones first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *letters]
    core = Tokenizer(BPE({w: i for i, w in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama that speaks in bytes, with a chat template."""
    path = tmp_path_factory.mktemp("bytes")
    save_tiny(path, "llama", vocab_size=259, max_position_embeddings=256)
    save_bytes_tokenizer(path)
    return path


def conversation(folder: Path, **how: Any) -> Conversation:
    settings: dict[str, Any] = {"max_new_tokens": 12} | how
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Conversation(find(folder).open("cpu"), tokenizer, Sampler(), **settings)


def test_characters_come_whole(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    pieces = list(stream(tokens, tokenizer))
    assert pieces == list(TEXT)


def test_a_stream_is_the_text_of_all_its_tokens(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    words, letters = (AutoTokenizer.from_pretrained(p) for p in (tmp_path, folder))
    fox = letters.encode("🦊")
    broken = [*fox[:2], *letters.encode("ab"), *fox, fox[0], *fox[:3]]
    for tokenizer, tokens in ((words, [5, 1, 9, 2, 33, 0]), (letters, broken), (letters, [])):
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(stream(tokens, tokenizer)) == whole


def test_decoding_one_token_more_takes_no_more_time(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked: list[int] = []

    class Counting:
        def decode(self, tokens: list[int], **how: Any) -> str:
            asked.append(len(tokens))
            return tokenizer.decode(tokens, **how)

    pieces = Detokenizer(Counting())
    for token in tokenizer.encode("a long answer " * 20):
        pieces.add(token)
    assert max(asked) <= 4


def test_turns_are_the_conversation_read_anew(folder: Path) -> None:
    talk = conversation(folder)
    talk.set_system("be brief")
    for question in ("one", "and two", "then three"):
        known = len(talk.runtime.tokens)
        answer = "".join(talk.ask(question))
        assert talk.last
        prompt = encode_chat(talk.tokenizer, talk.messages[:-1])
        fresh = Generation(
            find(folder).open("cpu"), prompt, max_new_tokens=12, sampler=Sampler(), eos={2}
        )
        assert list(fresh) == talk.last.tokens
        assert "".join(stream(fresh.tokens, talk.tokenizer)) == answer
        if known:
            assert talk.last.read < fresh.read == len(prompt)
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 3]


def test_only_the_new_turn_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation(folder)
    monkeypatch.setattr(talk, "_sampler", lambda logits: ord("a") - 33 + 3)  # bytes from '!' on
    assert "".join(talk.ask("hello")) == "a" * 12
    "".join(talk.ask("more"))
    assert talk.last
    # the last token of an answer is never read in its own turn, its end comes from the template
    assert talk.last.read == len("a" + "|" + "<user>more|<assistant>")


def test_a_stopped_answer_is_remembered_and_the_cache_stays_whole(folder: Path) -> None:
    talk = conversation(folder)
    said = "".join(talk.ask("hello", stop=lambda: True))
    assert talk.last
    assert (talk.last.finish, len(talk.last.tokens)) == ("stopped", 1)
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    before = list(talk.runtime.tokens)
    "".join(talk.ask("go on"))
    assert talk.runtime.tokens[: len(before)] == before


def test_reset_keeps_the_system_prompt(folder: Path) -> None:
    talk = conversation(folder)
    talk.set_system("brief")
    first = "".join(talk.ask("hello"))
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "brief"}]
    assert "".join(talk.ask("hello")) == first
    talk.set_system("")
    assert talk.messages == []


def test_a_full_context_forgets_the_question_only(folder: Path) -> None:
    talk = conversation(folder, max_new_tokens=4)
    "".join(talk.ask("hello"))
    said = list(talk.messages)
    with pytest.raises(InferenceError, match="the model's context is 256"):
        "".join(talk.ask("x" * 250))
    assert talk.messages == said
    assert "".join(talk.ask("again")) is not None


def test_without_a_template_it_goes_on_as_plain_text(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").unlink()
    talk = conversation(tmp_path)
    assert not talk.templated
    "".join(talk.ask("ab"))
    assert talk.last
    first = talk.tokenizer.encode("ab") + talk.last.tokens
    "".join(talk.ask("cd"))
    assert talk.runtime.tokens[: len(first) + 2] == first + talk.tokenizer.encode("cd")
    with pytest.raises(InferenceError, match="no chat template"):
        talk.set_system("brief")


def run(command: Any, *args: object, text: str | None = None) -> Any:
    result = CliRunner().invoke(command, list(map(str, args)), input=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_generate_writes_text_and_figures(folder: Path) -> None:
    how = ["--prompt", "ab", "--max-new-tokens", 6]
    done = run(generate, folder, *how)
    report = json.loads(run(generate, folder, *how, "--json").stdout)
    assert done.stdout == report["text"] + "\n"
    assert "read 2 tokens at" in done.stderr
    assert "wrote 6 at" in done.stderr
    assert "torch on cpu, cut at --max-new-tokens" in done.stderr
    assert report.keys() == {
        "text", "tokens", "prompt_tokens", "finish", "runtime", "device", "first_token_seconds",
        "prefill_tokens_per_second", "decode_tokens_per_second",
    }  # fmt: skip
    assert (len(report["tokens"]), report["prompt_tokens"], report["finish"]) == (6, 2, "length")
    quiet = run(generate, folder, "--prompt", "-", "--max-new-tokens", 6, "-q", text="ab")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_generate_draws_by_its_seed(folder: Path) -> None:
    def tokens(*how: object) -> list[int]:
        done = run(generate, folder, "--prompt", "ab", "--max-new-tokens", 8, "--json", *how)
        found: list[int] = json.loads(done.stdout)["tokens"]
        return found

    hot = ("--temperature", 5, "--top-p", 0.99)
    assert tokens("--seed", 1, *hot) == tokens("--seed", 1, *hot) != tokens("--seed", 2, *hot)
    assert tokens("--temperature", 0, "--seed", 3) == tokens()


def test_generate_asks_in_the_template(folder: Path) -> None:
    done = run(generate, folder, "--prompt", "ab", "--max-new-tokens", 2, "--chat", "--json")
    assert json.loads(done.stdout)["prompt_tokens"] == len("<user>ab|<assistant>")


def test_chat_obeys_and_goes_on(folder: Path) -> None:
    lines = "hello\n\n/help\n/reset\n/system brief\nhello\n/what\n" + "x" * 250 + "\nbye\n"
    done = run(chat, folder, "--max-new-tokens", 4, text=lines)
    assert done.exit_code == 0
    assert done.stderr.count("wrote 4 at") == 3
    assert "torch on cpu, context of 256 tokens" in done.stderr
    assert "no command /what" in done.stderr
    assert "the model's context is 256; shorten the prompt; /reset begins anew" in done.stderr
    left = run(chat, folder, "--max-new-tokens", 4, text="/exit\nhello\n")
    assert "wrote" not in left.stderr


def test_interrupting_once_asks_and_twice_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["generate", ".", "--prompt", "x"], r".: no model.onnx and no *.safetensors here"),
        (["chat", "bare"], "bare: no tokenizer can be loaded"),
        (["generate", "model", "--prompt", "x" * 300], "the model's context is 256"),
        (["generate", "model", "--prompt", ""], "the prompt has no tokens"),
        (["generate", "model", "--prompt", "x", "--runtime", "genie"], "did you mean 'genai'"),
        (["bench", "nothing"], "nothing: neither a folder nor a run in "),
        (["bench", "model", "--threads", "0"], "--threads 0: expected counts"),
        (["bench", "model", "--runtime", "torsh"], "did you mean 'torch'"),
        (["bench", "model", "--prompt-tokens", "250", "--repeats", "1"], "context of 256"),
    ],
    ids=lambda value: "-".join(value)[:24] if isinstance(value, list) else "",
)
def test_errors_are_one_line(
    args: list[str],
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model").symlink_to(folder)
    save_tiny(tmp_path / "bare", "llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress", *args])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
