"""A Hub of one's own for the tests: what huggingface_hub asks of huggingface.co, on a local port, kept in memory.

    with HubServer() as hub:
        hub.publish("acme/model", folder)
        result = client(hub, folder / "home", "result = ...")

A repository has branches of commits, a commit has files, and a file has the id that git or LFS would give it. Whoever
writes, or reads what is private, needs `TOKEN`. huggingface_hub reads its endpoint when it is imported, so clients run
in processes of their own, and without Xet, which is another protocol. Beside card_rules.py this file knows the standard
library only.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.card_rules import check_card

TOKEN = "hf_test"
USER = "me"
DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".png")


class HubError(Exception):
    """An answer of the kind that huggingface_hub turns into an exception of its own."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None, **body: Any):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


@dataclass(frozen=True)
class File:
    data: bytes
    is_lfs: bool

    @property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id


@dataclass
class Commit:
    id: str
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    name: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, File], branch: str = "main") -> Commit:
        new = hashlib.sha1(f"{self.name} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(new, title, files))
        self.branches[branch] = self.commits[-1]
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, or of an id."""
        found = self.branches.get(unquote(revision)) or next((c for c in self.commits if c.id == revision), None)
        if found is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found


class HubServer(ThreadingHTTPServer):
    """Serves from `__enter__` to `__exit__`; `requests` holds what was asked, `"METHOD /path status"` each."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}  # "models/acme/x"
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks_off_after: int | None = None  # so many uploads, once
        self.seconds_an_upload = 0.0
        self.makes_branches = True

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """For a client with the cache `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def publish(self, name: str, folder: Path, branch: str = "main", kind: str = "models") -> str:
        """Puts a folder into a repository, new or not, past the protocol; returns the commit."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository(name))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {p.relative_to(folder).as_posix(): File(p.read_bytes(), p.suffix in LFS_SUFFIXES) for p in paths}
        return repository.commit("published", files, branch).id


def client(hub: HubServer, home: Path, code: str, **variables: str) -> dict:
    """Runs code as a user would, against the Hub with the cache `home`; returns what it puts into `result`."""
    answer = home / "answer.json"
    home.mkdir(exist_ok=True)
    code += f"\nimport json\nopen({str(answer)!r}, 'w').write(json.dumps(result))\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **hub.environment(home), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(answer.read_text())


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
PLAIN = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Callable], Callable]:
    def add(function: Callable) -> Callable:
        ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return add


@dataclass
class Call:
    """One request: its repository if its path names one, its body, its query."""

    hub: HubServer
    body: bytes
    query: dict[str, list[str]]
    repository: Repository | None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> dict:
    token = {"role": "write", "displayName": "test"}
    return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": token}}


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> dict:
    errors, warnings = ([{"message": text} for text in texts] for texts in check_card(call.json["content"]))
    if errors:
        raise HubError(400, "", errors[0]["message"], errors=errors, warnings=warnings)
    return {"errors": [], "warnings": warnings}


@route("POST", "/api/repos/create")
def create_repository(call: Call) -> dict:
    kind, name = (
        (call.json.get("type") or "model") + "s",
        f"{call.json.get('organization') or USER}/{call.json['name']}",
    )
    url = f"{call.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
    if f"{kind}/{name}" in call.hub.repositories:
        raise HubError(409, "", "You already created this repo", url=url)
    repository = Repository(name, private=call.json.get("visibility") == "private")
    repository.commit("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
    call.hub.repositories[f"{kind}/{name}"] = repository
    return {"url": url, "name": name, "id": name}


@route("GET", API + "(/revision/(?P<revision>[^/]+))?")
def repository_info(call: Call, revision: str | None) -> dict:
    repository, commit = call.repository, call.repository.at(revision or "main")
    return {
        "_id": "0",
        "id": repository.name,
        "sha": commit.id,
        "private": repository.private,
        "lastModified": DATE,
        "createdAt": DATE,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
    }


@route("POST", API + "/branch/(?P<branch>[^/]+)")
def create_branch(call: Call, branch: str) -> dict:
    if unquote(branch) in call.repository.branches:
        raise HubError(409, "", f"Reference already exists: {branch}")
    if not call.hub.makes_branches:
        raise HubError(403, "", "your token may not write")
    call.repository.branches[unquote(branch)] = call.repository.at(call.json.get("startingPoint") or "main")
    return {}


# Reading


def describe(path: str, file: File) -> dict:
    entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.git_id}
    lfs = {"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}}
    return entry | lfs if file.is_lfs else entry


def describe_folder(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


@route("GET", API + "/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def list_tree(call: Call, revision: str, folder: str | None) -> list[dict]:
    files, start = call.repository.at(revision).files, f"{unquote(folder)}/" if folder else ""
    inside = [path for path in sorted(files) if path.startswith(start)]
    if not inside:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist")
    folders = {parent.as_posix() for path in inside for parent in Path(path).parents}
    folders = sorted(path for path in folders if path != "." and path.startswith(start))
    if call.query.get("recursive", ["false"])[0].lower() not in ("1", "true"):
        inside, folders = ([path for path in paths if "/" not in path[len(start) :]] for paths in (inside, folders))
    return [describe_folder(path) for path in folders] + [describe(path, files[path]) for path in inside]


@route("POST", API + "/paths-info/(?P<revision>[^/]+)")
def paths_info(call: Call, revision: str) -> list[dict]:
    files = call.repository.at(revision).files
    is_json = call.body.startswith(b"{")
    paths = call.json["paths"] if is_json else parse_qs(call.body.decode()).get("paths", [])
    folders = [path for path in paths if any(file.startswith(f"{path}/") for file in files)]
    return [describe(path, files[path]) for path in paths if path in files] + [describe_folder(p) for p in folders]


@route("GET HEAD", PLAIN + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def download(call: Call, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
    commit = call.repository.at(revision)
    file = commit.files.get(unquote(path))
    if file is None:
        raise HubError(404, "EntryNotFound", f"{path} does not exist", {"X-Repo-Commit": commit.id})
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"'}
    if file.is_lfs:
        headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.etag}"'}
    return file.data, headers


# Writing: what goes by LFS is uploaded, then a commit names it


@route("POST", API + "/preupload/(?P<revision>[^/]+)")
def preupload(call: Call, revision: str) -> dict:
    files = call.repository.at(revision).files

    def mode(name: str) -> str:
        return "lfs" if name.endswith(LFS_SUFFIXES) else "regular"

    return {
        "files": [
            {
                "path": new["path"],
                "shouldIgnore": False,
                "uploadMode": mode(new["path"]),
                "oid": files[new["path"]].etag if new["path"] in files else None,
            }
            for new in call.json["files"]
        ]
    }


@route("POST", PLAIN + r"\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> dict:
    def object_of(wanted: dict) -> dict:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in call.hub.uploads:
            return answer
        return answer | {"actions": {"upload": {"href": f"{call.hub.url}/lfs/{wanted['oid']}"}}}

    return {"transfer": "basic", "objects": [object_of(wanted) for wanted in call.json["objects"]]}


@route("PUT", "/lfs/(?P<sha256>[0-9a-f]{64})")
def lfs_upload(call: Call, sha256: str) -> bytes:
    time.sleep(call.hub.seconds_an_upload)
    if call.hub.breaks_off_after == 0:
        call.hub.breaks_off_after = None
        raise HubError(400, "", "the line is dead")
    if call.hub.breaks_off_after is not None:
        call.hub.breaks_off_after -= 1
    if hashlib.sha256(call.body).hexdigest() != sha256:
        raise HubError(400, "", "the upload is not what was announced")
    call.hub.uploads[sha256] = call.body
    return b""


@route("POST", API + "/commit/(?P<branch>[^/]+)")
def create_commit(call: Call, branch: str) -> dict:
    parent = call.repository.at(branch)
    files, title = dict(parent.files), ""
    for line in call.body.decode().splitlines():
        change = json.loads(line)
        kind, value = change["key"], change["value"]
        if kind == "header":
            title = value["summary"]
        elif kind == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            files[value["path"]] = File(call.hub.uploads[value["oid"]], True)
        elif kind == "deletedFile":
            files.pop(value["path"])
        elif kind == "deletedFolder":
            files = {path: file for path, file in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        else:
            raise HubError(400, "", f"this Hub knows no {kind}")
    commit = call.repository.commit(title, files, unquote(branch))
    url = f"{call.hub.url}/{call.repository.name}/commit/{commit.id}"
    return {"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def answer(self) -> None:
        url = urlsplit(self.path)
        try:
            status, (body, headers) = 200, self.dispatch(url.path, parse_qs(url.query), self.read_body())
        except HubError as error:
            status, body, headers = error.status, json.dumps(error.body).encode(), error.headers
        self.server.requests.append(f"{self.command} {url.path} {status}")
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def dispatch(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[bytes, dict[str, str]]:
        found = ((f, p.fullmatch(path)) for method, p, f in ROUTES if method == self.command and p.fullmatch(path))
        function, match = next(found, (None, None))
        if match is None:
            raise HubError(404, "", f"this Hub has no {self.command} {path}")
        is_open = self.command in ("GET", "HEAD") or function in (validate_yaml, paths_info, lfs_upload)
        token = self.headers.get("Authorization")
        is_user = token == f"Bearer {TOKEN}"
        if (token or not is_open) and not is_user:  # a wrong token may not even read what is open
            raise HubError(401, "", "Invalid credentials in Authorization header")
        groups, repository = match.groupdict(), None
        with self.server.lock:
            if "name" in groups:
                kind, name = (groups.pop("kind") or "models").rstrip("/"), groups.pop("name")
                repository = self.server.repositories.get(f"{kind}/{name}")
                if repository is None or (repository.private and not is_user):
                    raise HubError(404, "RepoNotFound", "Repository not found")
            answer = function(Call(self.server, body, query, repository), **groups)
        if isinstance(answer, tuple):
            return answer
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode(), {}

    def log_message(self, *args: Any) -> None:
        pass
