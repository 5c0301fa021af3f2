"""`compress publish`: an export and its card, put where others load it from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import click

from compressor import progress
from compressor.errors import PublishError
from pipelines import display, table
from pipelines.commands import JSON, QUIET, STORE
from pipelines.draft_command import checkpoint, in_words, record_path


@click.command()
@click.argument("folder")
@click.option("--to", required=True, metavar="URL", help="Where to: hf://org/name.")
@click.option(
    "--private/--public", default=True, show_default=True, help="Who may see a new repository."
)
@click.option(
    "--revision", default="main", show_default=True, metavar="BRANCH", help="Made when missing."
)
@click.option("--tag", help="Name the result, once it was read back.")
@click.option("--license", "license_", metavar="NAME", help="As the hub spells it: apache-2.0.")
@click.option("--base-model", metavar="ORG/NAME", help="The hub name of what was compressed.")
@click.option("--replace", is_flag=True, help="Delete what else the branch holds.")
@click.option("--dry-run", is_flag=True, help="List files and card; send nothing.")
@STORE
@JSON
@QUIET
def publish(
    folder: str,
    to: str,
    private: bool,
    revision: str,
    tag: str | None,
    license_: str | None,
    base_model: str | None,
    replace: bool,
    dry_run: bool,
    store: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish FOLDER, an export or the name of a run, with a card, and read it back.

    The token comes from HF_TOKEN or from hf auth login, the endpoint from HF_ENDPOINT. What did
    not pass the parity gate is refused. After an interruption run the same command again.

    \b
    compress publish exported --to hf://org/name --dry-run
    compress publish demo --to hf://org/name --revision 4bit --tag v1 --license apache-2.0
    """
    from compressor.publish import Item, Request, destination
    from compressor.publish.bundle import open_bundle
    from compressor.publish.card import card
    from compressor.publish.origin import Origin
    from pipelines.story import find_export, history, tell

    if not quiet:
        progress.install(display.Bars())
    place = destination(to)
    bundle = open_bundle(find_export(folder, store))
    known = Origin("", base_model, license_)
    records = history(bundle.folder, store)
    story = tell(records, place.name, revision, known)
    story = dataclasses.replace(story, draft=_draft(bundle.folder, records[0], store))
    if not private and story.origin.license is None:
        raise PublishError("--public: the licence of the source is not known; give --license")
    text = card(bundle, story).encode()
    readme = Item("README.md", text, len(text), hashlib.sha256(text).hexdigest())
    items = [*(item for item in bundle.items if item.path != readme.path), readme]
    files = [{"path": i.path, "size_bytes": i.size_bytes, "sha256": i.sha256} for i in items]
    report = {"to": to, "revision": revision, "files": files, "card": text.decode()}
    if not dry_run:
        receipt = place.put(items, Request(private, revision, tag, replace))
        report |= {"url": receipt.url, "commit": receipt.commit}
    if as_json:
        click.echo(json.dumps(report, indent=1))
    elif dry_run:
        lines = [f"{i.size_bytes:>16,}  {i.path}" for i in items]
        total = table.size(sum(i.size_bytes for i in items))
        click.echo("\n".join([*lines, f"{len(items)} files, {total}", "", text.decode()]))
    else:
        click.echo(report["url"])


def _draft(folder: Path, first: dict[str, Any], store: Path) -> str:
    """What compress draft measured of this checkpoint beside the model that it was made from.

    In words; empty when it did not. `first` is the record of the first run.
    """
    parent = next(Path(s["folder"]) for s in first["stages"] if s["label"] == "model")
    if not parent.is_dir():
        return ""
    path = record_path(checkpoint(str(folder)), parent, store)
    return in_words(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ""
