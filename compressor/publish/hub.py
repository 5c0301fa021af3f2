"""`hf://org/name`: a model repository of the Hugging Face hub, or of `HF_ENDPOINT`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.hf_api import RepoFile

from compressor import progress
from compressor.errors import PublishError
from compressor.publish import Item, Receipt, Request

_OWN = ".gitattributes"  # written by the hub itself
_AGAIN = "run the same command again: what arrived is not sent twice"
_ADVICE = {
    401: "the hub does not accept the token: set HF_TOKEN to one that may write, "
    "or run: hf auth login",
    403: "the token may not do this: use one with write access to this repository",
    404: "no such repository or branch, or the token may not see it",
    409: "it is being changed from elsewhere: look at it, then run the same command again",
    412: "it is being changed from elsewhere: look at it, then run the same command again",
}


class Hub:
    """A model repository of the hub.

    Tokens come from the environment (`HF_TOKEN`) or from `hf auth login`, by the client itself;
    they are never read, logged or stored here.
    """

    def __init__(self, place: str) -> None:
        """Name the repository `org/name`; nothing is contacted yet."""
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
            raise PublishError(f"--to hf://{place}: expected hf://org/name")
        self.name = place

    def put(self, items: Sequence[Item], request: Request) -> Receipt:
        """Upload in one commit, then read back what the hub says it holds and compare.

        Large files go first, one by one; those that the hub has are not sent again, so an
        interrupted upload is resumed by repeating it. Nobody sees half of a model: all files
        appear with the commit, and the tag comes after the comparison.
        Raises `PublishError` for whatever the hub refuses and for a file that differs there.
        """
        with _explained(self.name):
            api = HfApi()
            api.create_repo(self.name, private=request.private, exist_ok=True)
            self._check_visibility(api, request.private)
            if request.revision != "main":
                api.create_branch(self.name, branch=request.revision, exist_ok=True)
            head = api.model_info(self.name, revision=request.revision).sha
            marked = self._marked(api, request.tag)
            if marked and (marked != head or self._faults(api, items, marked)):
                raise self._taken(request.tag)
            additions = [
                CommitOperationAdd(path_in_repo=item.path, path_or_fileobj=item.source)
                for item in items
            ]
            deletions = self._others(api, items, request)
            for addition in progress.track(additions, "upload", len(additions)):
                api.preupload_lfs_files(
                    self.name, [addition], revision=request.revision, free_memory=False
                )
            commit = api.create_commit(
                self.name,
                [*additions, *deletions],
                commit_message="Publish a compressed model",
                revision=request.revision,
                parent_commit=head,
            )
            if faults := self._faults(api, items, commit.oid):
                raise PublishError(
                    f"hf://{self.name} at {commit.oid[:12]} is not what was uploaded: "
                    f"{', '.join(faults)}; do not use it, and {_AGAIN}"
                )
            if request.tag:
                if self._marked(api, request.tag) not in (None, commit.oid):
                    raise self._taken(request.tag)
                api.create_tag(self.name, tag=request.tag, revision=commit.oid, exist_ok=True)
        return Receipt(f"{api.endpoint}/{self.name}/tree/{request.revision}", commit.oid)

    def _check_visibility(self, api: HfApi, private: bool) -> None:
        found = bool(api.model_info(self.name).private)
        if found != private:
            is_, option = ("private", "--private") if found else ("public", "--public")
            raise PublishError(
                f"hf://{self.name} exists and is {is_}; give {option} to publish there, or "
                "change it in its settings on the hub"
            )

    def _marked(self, api: HfApi, tag: str | None) -> str | None:
        """The commit that a tag marks; an earlier try may have set it."""
        tags = api.list_repo_refs(self.name).tags if tag else []
        return next((t.target_commit for t in tags if t.name == tag), None)

    def _taken(self, tag: str | None) -> PublishError:
        return PublishError(
            f"hf://{self.name}: the tag {tag!r} marks another commit; choose another tag, or "
            "delete that one on the hub"
        )

    def _others(
        self, api: HfApi, items: Sequence[Item], request: Request
    ) -> list[CommitOperationDelete]:
        """What else the branch holds: weights of another model would be loaded with these."""
        ours = {item.path for item in items} | {_OWN}
        others = sorted(set(self._files(api, request.revision)) - ours)
        if others and not request.replace:
            raise PublishError(
                f"hf://{self.name}: {request.revision} holds {len(others)} file(s) that are not "
                f"part of this model ({', '.join(others[:5])}); give --replace to delete them in "
                "the same commit, or another --revision"
            )
        return [CommitOperationDelete(path_in_repo=path) for path in others]

    def _files(self, api: HfApi, revision: str) -> dict[str, RepoFile]:
        tree = api.list_repo_tree(self.name, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _faults(self, api: HfApi, items: Sequence[Item], commit: str) -> list[str]:
        """Which of our files are missing at a commit, or differ there in size or hash."""
        there = self._files(api, commit)
        faults = []
        for item in items:
            found = there.get(item.path)
            if found is None:
                faults.append(f"{item.path} is missing")
            elif found.size != item.size_bytes or not _same(found, item):
                faults.append(f"{item.path} differs")
        return faults


def _same(found: RepoFile, item: Item) -> bool:
    """By sha256 where the hub stores a large file, else by git's blob id."""
    if found.lfs:
        return found.lfs.sha256 == item.sha256
    data = item.source.read_bytes() if isinstance(item.source, Path) else item.source
    header = b"blob %d\0" % len(data)
    return found.blob_id == hashlib.sha1(header + data, usedforsecurity=False).hexdigest()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while not isinstance(cause, HTTPError) and cause.__cause__:
            cause = cause.__cause__  # the client wraps what went wrong with one file
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        said = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
        reason = f"{status}: {said.splitlines()[0]}" if status else said.splitlines()[0]
        other = "the hub refuses this" if isinstance(cause, ValueError) else _AGAIN
        advice = _ADVICE.get(status or 0, other)
        raise PublishError(f"hf://{name}: {advice} ({reason})") from error
