"""A stand-in for the Hugging Face hub: the calls of its client's uploads and downloads.

It stores what it is sent and computes every hash from what it stored. Basic LFS transfers
only; run the client with HF_HUB_DISABLE_XET=1. `TOKENS` says who may do what.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard

TOKENS = {"hf_writer": "write", "hf_reader": "read"}
LARGE = (".safetensors", ".onnx", ".onnx.data", ".model")
Files = dict[str, bytes]


class Fault(Exception):
    """A request that is answered with `status` and a reason."""

    def __init__(self, status: int, reason: str, code: str = "", url: str = "") -> None:
        super().__init__(reason)
        self.status, self.code, self.url = status, code, url


class Repository:
    """Branches and tags are names of commits; a commit is all files by path."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.card: dict[str, str] = {}
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: Files) -> str:
        parent = self.branches.get(branch, "")
        listing = "".join(f"{path} {blob_id(data)}\n" for path, data in sorted(files.items()))
        oid = hashlib.sha1(f"{parent}\n{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Fault(404, "no such revision", "RevisionNotFound")
        return oid


class HubServer:
    """The server and what it holds.

    Attributes:
        requests: method and path of every request so far.
        interfere: called before a request is answered; may raise `Fault` or ConnectionError.
        rot: changes the bytes of a file between its upload and its commit.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.interfere: Callable[[str], None] = lambda request: None
        self.rot: Callable[[str, bytes], bytes] = lambda path, data: data
        handler = type("Bound", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def uploads(self) -> list[str]:
        return [request for request in self.requests if request.startswith("PUT")]


def blob_id(data: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > 10 * 2**20


def described(path: str, data: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if is_large(path, len(data)):
        digest = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\n".encode()
        pointer += f"size {len(data)}\n".encode()
        entry["oid"] = blob_id(pointer)
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = url.path
        method = "GET" if self.command == "HEAD" else self.command
        self.hub.requests.append(f"{self.command} {path}")
        try:
            self.hub.interfere(f"{self.command} {path}")
            for verb, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if verb == method and match:
                    return self._reply(200, *function(self, body, *map(unquote, match.groups())))
            raise Fault(404, f"no such page: {path}")
        except Fault as fault:
            headers = {"X-Error-Message": str(fault), "X-Error-Code": fault.code}
            self._reply(
                fault.status, json.dumps({"error": str(fault), "url": fault.url}).encode(), headers
            )
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may(self, right: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise Fault(401, "Invalid username or password.")
        if right == "write" and TOKENS[token] != "write":
            raise Fault(403, "Forbidden: you need write access")

    def repository(self, name: str, right: str = "read") -> Repository:
        found = self.hub.repositories.get(name)
        if right == "write" or (found and found.private):
            self.may(right)
        if found is None:
            raise Fault(404, "Repository not found", "RepoNotFound")
        return found


Answer = tuple[bytes] | tuple[bytes, dict[str, str]]


def _json(value: Any) -> Answer:
    return (json.dumps(value).encode(),)


def create(http: _Handler, body: bytes) -> Answer:
    http.may("write")
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if name in http.hub.repositories:
        raise Fault(409, "You already created this model repo", url=f"{http.hub.url}/{name}")
    private = asked.get("visibility") == "private" or asked.get("private", False)
    http.hub.repositories[name] = Repository(private)
    return _json({"url": f"{http.hub.url}/{name}"})


def info(http: _Handler, body: bytes, name: str, revision: str | None = None) -> Answer:
    found = http.repository(name)
    oid = found.resolve(revision or "main")
    siblings = [{"rfilename": path} for path in found.commits[oid]]
    card = {"cardData": found.card} if found.card else {}
    about = {"id": name, "sha": oid, "private": found.private, "siblings": siblings}
    return _json(about | card)


def validate(http: _Handler, body: bytes) -> Answer:
    data = ModelCard(json.loads(body)["content"]).data
    if not data.license:
        raise Fault(400, "no license")
    return _json({"errors": [], "warnings": []})


def branch(http: _Handler, body: bytes, name: str, new: str) -> Answer:
    found = http.repository(name, "write")
    if new in found.branches:
        raise Fault(409, "Reference already exists")
    found.branches[new] = found.resolve(json.loads(body).get("startingPoint", "main"))
    return _json({})


def tag(http: _Handler, body: bytes, name: str, revision: str) -> Answer:
    found, new = http.repository(name, "write"), json.loads(body)["tag"]
    if new in found.tags:
        raise Fault(409, "Tag already exists")
    found.tags[new] = found.resolve(revision)
    return _json({})


def refs(http: _Handler, body: bytes, name: str) -> Answer:
    found = http.repository(name)
    kinds = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
    listed = {
        kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c} for n, c in names.items()]
        for kind, (ref, names) in kinds.items()
    }
    return _json({**listed, "converts": []})


def tree(http: _Handler, body: bytes, name: str, revision: str, below: str = "") -> Answer:
    found = http.repository(name)
    files = found.commits[found.resolve(revision)]
    inside = [path for path in files if path.startswith(below)]
    if not inside:
        raise Fault(404, "no such folder", "EntryNotFound")
    if http.query.get("recursive", [""])[0].lower() not in ("true", "1"):
        inside = [path for path in inside if "/" not in path[len(below) :].strip("/")]
    return _json([described(path, files[path]) for path in inside])


def preupload(http: _Handler, body: bytes, name: str, revision: str) -> Answer:
    found = http.repository(name, "write")
    there = found.commits[found.resolve(revision)]
    files = []
    for asked in json.loads(body)["files"]:
        path, large = asked["path"], is_large(asked["path"], asked["size"])
        files.append(
            {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        )
        if path in there:
            entry = described(path, there[path])
            files[-1]["oid"] = entry["lfs"]["oid"] if large else entry["oid"]
    return _json({"files": files})


def batch(http: _Handler, body: bytes, name: str) -> Answer:
    http.repository(name, "write")
    objects = []
    for asked in json.loads(body)["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in http.hub.blobs:
            entry["actions"] = {
                "upload": {"href": f"{http.hub.url}/storage/{asked['oid']}"},
                "verify": {"href": f"{http.hub.url}/verify"},
            }
        objects.append(entry)
    return _json({"transfer": "basic", "objects": objects})


def store(http: _Handler, body: bytes, oid: str) -> Answer:
    http.hub.blobs[hashlib.sha256(body).hexdigest()] = body
    return _json({})


def verify(http: _Handler, body: bytes) -> Answer:
    asked = json.loads(body)
    if len(http.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
        raise Fault(422, "the object was not received in full")
    return _json({})


def commit(http: _Handler, body: bytes, name: str, revision: str) -> Answer:
    found = http.repository(name, "write")
    files = dict(found.commits[found.resolve(revision)])
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        match item["key"]:
            case "header" if value.get("parentCommit") not in (None, found.branches[revision]):
                raise Fault(412, "A commit has happened since. Please refresh and try again.")
            case "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = http.hub.rot(value["path"], data)
            case "lfsFile" if value["oid"] not in http.hub.blobs:
                raise Fault(400, f"the LFS object of {value['path']} was not uploaded")
            case "lfsFile":
                data = http.hub.blobs[value["oid"]]
                files[value["path"]] = http.hub.rot(value["path"], data)
            case "deletedFile":
                del files[value["path"]]
    oid = found.commit(revision, files)
    return _json({"commitUrl": f"{http.hub.url}/{name}/commit/{oid}", "commitOid": oid})


def resolve(http: _Handler, body: bytes, name: str, revision: str, path: str) -> Answer:
    found = http.repository(name)
    oid = found.resolve(revision)
    if path not in found.commits[oid]:
        raise Fault(404, "Entry not found", "EntryNotFound")
    data = found.commits[oid][path]
    entry = described(path, data)
    etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet"}
    return data, headers


_NAME, _REF = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("GET", f"/api/models/{_NAME}", info),
    ("GET", f"/api/models/{_NAME}/revision/{_REF}", info),
    ("GET", f"/api/models/{_NAME}/refs", refs),
    ("GET", f"/api/models/{_NAME}/tree/{_REF}", tree),
    ("GET", f"/api/models/{_NAME}/tree/{_REF}/(.+)", tree),
    ("POST", f"/api/models/{_NAME}/branch/{_REF}", branch),
    ("POST", f"/api/models/{_NAME}/tag/{_REF}", tag),
    ("POST", f"/api/models/{_NAME}/preupload/{_REF}", preupload),
    ("POST", f"/api/models/{_NAME}/commit/{_REF}", commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", batch),
    ("PUT", "/storage/([0-9a-f]{64})", store),
    ("POST", "/verify", verify),
    ("GET", f"/{_NAME}/resolve/{_REF}/(.+)", resolve),
]
