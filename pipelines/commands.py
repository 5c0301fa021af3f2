"""The commands about whole runs: run, plan, show, verify, methods, doctor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from compressor import artifact, progress
from compressor.artifact import Store
from compressor.errors import ArtifactError, ConfigError, did_you_mean
from pipelines import config as configuration
from pipelines import display, ranks, table
from pipelines.run import Event, Options, make_plan
from pipelines.run import run as run_plan
from pipelines.runs import read_run

STORE = click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("artifacts"),
    show_default=True,
    help="Folder of all results; made when needed.",
)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C",
    help="Override a value, such as --set heal.steps=20 or --set model.path=DIR.",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing but the result.")
CONFIG = click.argument("config", type=click.Path(path_type=Path))


@click.command()
@CONFIG
@SET
@click.option("--from", "first", metavar="STAGE", help="Start here; what is before must be stored.")
@click.option("--to", "last", metavar="STAGE", help="Stop after this stage and its evaluation.")
@click.option("--force", is_flag=True, help="Build again what is stored already.")
@STORE
@JSON
@QUIET
def run(
    config: Path,
    overrides: tuple[str, ...],
    first: str | None,
    last: str | None,
    force: bool,
    store: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a configuration: build what is missing, skip what is stored, print the table.

    A second run does nothing. A run that was interrupted, even killed, goes on where it
    stopped when the same command runs again.

    \b
    compress run configs/demo.yaml
    compress run configs/demo.yaml --set heal.steps=20 --to heal
    """
    checked = configuration.load(config, overrides)
    execute(checked, store, Options(first, last, force), as_json=as_json, quiet=quiet)


def execute(
    checked: configuration.RunConfig, store: Path, options: Options, *, as_json: bool, quiet: bool
) -> dict[str, Any]:
    """Run a plan under bars and print its record or its table."""
    artifacts = Store(store / "store")
    if ranks.rank():
        return run_plan(checked, artifacts, options)
    built: list[str] = []

    def on_event(event: Event, stage: Any) -> None:
        if event == "done":
            built.append(stage.label)
        if not quiet:
            display.announce(event, stage)

    if not quiet:
        progress.install(display.Bars())
        if display.console.is_terminal:
            display.print_plan(make_plan(checked), artifacts, display.console)
    record = run_plan(checked, artifacts, dataclasses.replace(options, on_event=on_event))
    if as_json:
        click.echo(json.dumps(record | {"built": built, "table": table.rows(record)}, indent=1))
        return record
    if not built and not quiet:
        display.console.print("nothing to do: every stage is stored already")
    if quiet:
        folders = list(record["exports"].values()) or [record["stages"][-1]["folder"]]
        click.echo("\n".join(folders))
    else:
        display.print_summary(record, display.stdout())
    return record


@click.command()
@CONFIG
@SET
@STORE
@JSON
def plan(config: Path, overrides: tuple[str, ...], store: Path, as_json: bool) -> None:
    """Show the stages of a run in order: what is stored already and what will be built."""
    stages = make_plan(configuration.load(config, overrides))
    artifacts = Store(store / "store")
    if not as_json:
        display.print_plan(stages, artifacts, display.stdout())
        return
    listing = [
        {
            "verb": s.verb,
            "label": s.label,
            "method": s.method,
            "key": s.key,
            "params": s.params,
            "status": artifacts.status(s.verb, s.key),
        }
        for s in stages
    ]
    click.echo(json.dumps(listing, indent=1))


@click.command()
@click.argument("name")
@STORE
@JSON
@click.option("--markdown", is_flag=True, help="As a Markdown table, for a README.")
def show(name: str, store: Path, as_json: bool, markdown: bool) -> None:
    """Print the table of a finished run again."""
    record = read_run(name, store)
    if as_json:
        click.echo(json.dumps(record | {"table": table.rows(record)}, indent=1))
    elif markdown:
        click.echo(table.markdown(record))
    else:
        display.print_summary(record, display.stdout())


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@STORE
@JSON
def verify(folders: tuple[Path, ...], store: Path, as_json: bool) -> None:
    """Re-hash artifacts (all of the store by default) and name every file that changed."""
    chosen = folders or tuple(sorted(p.parent for p in (store / "store").glob("*/manifest.json")))
    results = {str(folder): artifact.verify(folder) for folder in chosen}
    if as_json:
        click.echo(json.dumps(results, indent=1))
    else:
        for folder, faults in results.items():
            click.echo(f"{'ok ' if not faults else 'BAD'} {folder}")
    faults = [fault for found in results.values() for fault in found]
    if faults:
        raise ArtifactError(
            f"{len(faults)} file(s) are not what was written: {'; '.join(faults)}; delete the "
            "folder and run again"
        )


@click.command()
@click.argument("verb", required=False)
@JSON
def methods(verb: str | None, as_json: bool) -> None:
    """List every method: what it does, where it comes from, what it costs."""
    verbs = (*configuration.VERBS, "evaluate")
    if verb and verb not in verbs:
        raise ConfigError(f"no verb {verb!r}{did_you_mean(verb, verbs)}")
    listing = [
        {
            "verb": each,
            "method": name,
            "summary": row.summary,
            "source": row.source,
            "cost": row.cost,
            "needs": ", ".join(row.needs),
            "version": row.version,
            "parameters": {
                key: field.get_default(call_default_factory=True)
                if not field.is_required()
                else "required"
                for key, field in row.params.model_fields.items()
            },
        }
        for each in ([verb] if verb else verbs)
        for name, row in configuration.methods(each).items()
    ]
    if as_json:
        click.echo(json.dumps(listing, indent=1, default=str))
        return
    grid = Table(show_lines=True)
    for heading in ("verb", "method", "summary", "source", "cost", "needs"):
        grid.add_column(heading)
    for row in listing:
        grid.add_row(
            *(str(row[name]) for name in ("verb", "method", "summary", "source", "cost", "needs"))
        )
    display.stdout().print(grid)


@click.command()
@STORE
@JSON
def doctor(store: Path, as_json: bool) -> None:
    """Check Python, devices, memory, disk and packages; say which command mends what."""
    from pipelines.doctor import report

    checks = report(store)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
        return
    grid = Table()
    for heading in ("check", "state", "found", "to mend it"):
        grid.add_column(heading)
    for check in checks:
        grid.add_row(*map(escape, (check.name, check.state, check.found, check.fix)))
    display.stdout().print(grid)
