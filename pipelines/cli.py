"""The command line's front door: lazy commands, one-line errors, exit codes.

Exit code 0 is success, 1 an error that the message explains, 2 wrong usage.
Nothing here imports torch, so `compress --help` is instant.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from types import TracebackType

import click

from compressor import __version__
from compressor.errors import CompressError, did_you_mean

COMMANDS = {
    "run": ("pipelines.commands:run", "Run a configuration: build what is missing, skip the rest."),
    "plan": ("pipelines.commands:plan", "Show what a run would do and what is already there."),
    "compare": (
        "pipelines.compare_command:compare",
        "Compare ways to choose what goes, at one budget.",
    ),
    "show": ("pipelines.commands:show", "Print the table of a finished run again."),
    "score": ("pipelines.verbs:score", "Score how much each block of a model matters."),
    "select": ("pipelines.choose:select", "Choose the parts to remove, by scores or a search."),
    "prune": ("pipelines.verbs:prune", "Remove blocks and sublayers from a model."),
    "heal": ("pipelines.verbs:heal", "Train a pruned model to recover what it lost."),
    "allocate": ("pipelines.quantize_commands:allocate", "Choose how many bits each linear gets."),
    "quantize": (
        "pipelines.quantize_commands:quantize",
        "Store the linears of a model in few bits.",
    ),
    "export": ("pipelines.verbs:export", "Write safetensors and ONNX folders that runtimes load."),
    "draft": (
        "pipelines.draft_command:draft",
        "Measure a shallow model as the draft of its parent.",
    ),
    "publish": (
        "pipelines.publish_command:publish",
        "Put an export on the hub, with a card, and read it back.",
    ),
    "evaluate": ("pipelines.verbs:evaluate", "Measure perplexity, size, speed, agreement."),
    "generate": ("pipelines.chat_command:generate", "Go on from a prompt, in any runtime."),
    "chat": ("pipelines.chat_command:chat", "Talk to a model in the terminal."),
    "bench": ("pipelines.bench_command:bench", "Time models side by side, beside the roofline."),
    "verify": ("pipelines.commands:verify", "Re-hash stored artifacts."),
    "methods": ("pipelines.commands:methods", "List every method with its source and cost."),
    "doctor": ("pipelines.commands:doctor", "Check this machine and say what is missing."),
}

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # How long torch's threads spin at a barrier before they sleep: with the default a second
    # busy process slows them down several times; this is as fast alone.
    "GOMP_SPINCOUNT": "30000",
}
"""Defaults for the libraries, set before any is imported; what the user has set stays."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of a pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say what was meant when a command is mistyped."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}{did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="compress")
def cli() -> None:
    """Turn a language model into a shallower, healed, low-bit checkpoint that loads anywhere.

    \b
    The whole job:       compress run configs/demo.yaml
    What would it do?    compress plan configs/demo.yaml
    One step alone:      compress quantize MODEL --bits 4 --text calibration.txt --out DIR

    MODEL is a Hugging Face folder, a .gguf file or a hub id.
    Every command explains itself: compress COMMAND --help.
    """


def main() -> None:
    """Run the command line and turn every error into one line and an exit code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.excepthook = _last_resort
    try:
        code = cli.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; finished stages are kept: run the same command again to go on")
    except click.ClickException as error:
        _fail(error.format_message())
    except (CompressError, OSError) as error:
        _fail(str(error))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(1)


def _last_resort(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Keep an unforeseen error's traceback in a file and print one line."""
    with tempfile.NamedTemporaryFile("w", prefix="compress-", suffix=".log", delete=False) as file:
        traceback.print_exception(kind, error, trace, file=file)
    reason = str(error).splitlines()[0] if str(error) else ""
    message = f"error: unforeseen {kind.__name__}: {reason}; please report it with {file.name}"
    click.echo(message, err=True)
