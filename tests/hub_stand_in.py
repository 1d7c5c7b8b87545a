"""A Hub on this machine for an unmodified huggingface_hub: it serves directories and keeps what is pushed to it.

Plain files come in commits; large ones as LFS objects, in one piece or in parts, through a server of their own, which
no token must reach. Without Xet: huggingface_hub asks no server whether it may be used, so HF_HUB_DISABLE_XET is set.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub_repository import OWNER, Blob, Refused, Repository, discussion, entry, validated

WRITER, READER = "hf_secretWriter", "hf_secretReader"


@dataclass
class Fault:
    """What the next `times` requests get whose `METHOD PATH` has the pattern in it."""

    pattern: str
    status: int
    code: str
    message: str
    retry_after: int | None
    cut: bool
    times: float


class StandInHub:
    """`repos` (id -> directory) are served as one commit; `pushed` are those that were made or changed over HTTP.

    `requests` are the paths and tokens that were seen, `calls` the same with the method, `stored` those of the storage,
    `served` counts each file's bytes. `chunk_size` makes larger LFS objects go in parts; `lfs` False keeps all plain.
    """

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.revisions = ["main", self.COMMIT]
        self.pushed: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.calls: list[str] = []
        self.stored: list[tuple[str, str | None]] = []
        self.served: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.lfs = True
        self.chunk_size: int | None = None
        self._lock = threading.Lock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler()) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(
        self,
        pattern: str = "",
        status: int = 0,
        code: str = "",
        *,
        message: str = "",
        retry_after: int | None = None,
        cut: bool = False,
        times: float = inf,
    ) -> None:
        """Answer with an error; `cut` ends the connection after 8 bytes of the body, theirs or ours."""
        self.faults.append(Fault(pattern, status, code, message, retry_after, cut, times))

    def fetched(self) -> set[str]:
        """Return the names of the files that were asked for."""
        found = (re.search(r"/resolve/[^/]+/(.+)", path) for path, _ in self.requests)
        return {match[1] for match in found if match}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return what lies in a repository that was pushed."""
        found = self.pushed[repo_id].tree(revision)
        assert found is not None
        return {name: blob.data for name, blob in found[1].items()}

    def make_private(self, repo_id: str) -> None:
        self.pushed[repo_id] = self._repository(repo_id, None)
        self.pushed[repo_id].private = True

    # What it answers

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of what the Hub itself is asked for."""
        words = [unquote(word) for word in urlsplit(path).path.strip("/").split("/")]
        value = json.loads(body) if body and method == "POST" and words[-2:-1] != ["commit"] else {}
        match method, *words:
            case "GET", "api", "whoami-v2":
                self._require(token, writing=False)
                role = "write" if token == WRITER else "read"
                return _json({"name": OWNER, "orgs": [], "auth": {"accessToken": {"role": role}}})
            case "POST", "api", "validate-yaml":
                return _json(validated(value["content"]))
            case "POST", "api", "repos", "create":
                return _json(self._create(value, token))
            case _, "api", "models", owner, name, *rest:
                return _json(self._about(method, f"{owner}/{name}", rest, value, token, body))
            case "POST", owner, name, "info", "lfs", "objects", "batch":
                self._require(token, writing=True)
                return _json({"transfer": "basic", "objects": [self._lfs_actions(each) for each in value["objects"]]})
            case "POST", "lfs", oid, "complete":
                self.objects[oid] = b"".join(data for _, data in sorted(self.parts.pop(oid).items()))
                return _json({})
            case "POST", "lfs", oid, "verify":
                self._require(token, writing=True)
                kept = self.objects[oid]
                if hashlib.sha256(kept).hexdigest() != oid or len(kept) != value["size"]:
                    raise Refused(422, message="not what was announced")
                return _json({})
            case "GET" | "HEAD", owner, name, "resolve", revision, *rest:
                return self._resolve(f"{owner}/{name}", revision, "/".join(rest), token)
        raise Refused(404)

    def store(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return what the storage answers: it takes LFS objects and gives them back."""
        oid, _, part = path.strip("/").partition("/")
        if method == "GET":
            return 200, {}, self.objects[oid]
        if part:
            self.parts.setdefault(oid, {})[int(part)] = body
        else:
            self.objects[oid] = body
        return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

    def _require(self, token: str | None, *, writing: bool) -> None:
        if token not in (WRITER, READER):
            raise Refused(401, message="Invalid credentials in Authorization header")
        if writing and token == READER:
            raise Refused(403, message="this token may only read")

    def _repository(self, repo_id: str, token: str | None) -> Repository:
        found = self.pushed.get(repo_id)
        if found is None and repo_id in self.repos:
            files = (path for path in sorted(self.repos[repo_id].rglob("*")) if path.is_file())
            tree = {path.relative_to(self.repos[repo_id]).as_posix(): Blob(path) for path in files}
            found = Repository(refs=dict.fromkeys(self.revisions, self.COMMIT), commits={self.COMMIT: tree})
        if found is None:
            raise Refused(404, "RepoNotFound")
        if found.private and token not in (WRITER, READER):
            raise Refused(401, "RepoNotFound")
        return found

    def _create(self, value: dict[str, Any], token: str | None) -> dict[str, Any]:
        self._require(token, writing=True)
        owner = value["organization"] or OWNER
        if owner != OWNER:
            raise Refused(403, message=f"You don't have the rights to create a model under {owner}")
        repo_id = f"{owner}/{value['name']}"
        url = {"url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.pushed or repo_id in self.repos:
            raise Refused(409, message="You already created this model repo", **url)
        private = value.get("visibility") == "private" or bool(value.get("private"))
        self.pushed[repo_id] = Repository(private)
        self._commit(repo_id, "main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        return url

    def _commit(self, repo_id: str, ref: str, tree: dict[str, Blob]) -> str:
        repository = self.pushed[repo_id]
        commit = hashlib.sha1(f"{repo_id} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit] = tree
        repository.refs[ref] = commit
        return commit

    def _about(
        self, method: str, repo_id: str, words: list[str], value: dict[str, Any], token: str | None, body: bytes
    ) -> Any:
        """Answer /api/models/REPO_ID/WORDS."""
        repository = self._repository(repo_id, token)
        if method == "POST" and words[0] != "paths-info":
            self._require(token, writing=True)
            self.pushed.setdefault(repo_id, repository)
        kind, revision, *rest = [*words, "main", "main"][:2] + words[2:] if words else ["revision", "main"]
        match method, kind:
            case "POST", "branch":
                if revision in repository.refs:
                    raise Refused(409, message="Reference already exists")
                repository.refs[revision] = repository.refs["main"]
                return {}
            case "POST", "discussions":
                number = len(repository.pull_requests) + 1
                repository.pull_requests.append(value["title"])
                repository.refs[f"refs/pr/{number}"] = repository.refs["main"]
                return {"num": number}
            case "GET", "discussions":
                return discussion(repo_id, int(revision), repository)
        found = repository.tree(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound")
        commit, tree = found
        match method, kind:
            case "GET", "revision":
                siblings = [{"rfilename": name} for name in tree]
                return {"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            case "GET", "tree":
                place = "".join(f"{word}/" for word in rest)
                entries = [entry(name, blob) for name, blob in tree.items() if name.startswith(place)]
                if not entries and place:
                    raise Refused(404, "EntryNotFound")
                return entries
            case "POST", "paths-info":
                return [entry(name, tree[name]) for name in value["paths"] if name in tree]
            case "POST", "preupload":
                return {"files": [self._upload_mode(each, tree) for each in value["files"]]}
            case "POST", "commit":
                oid = self._commit(repo_id, revision, self._changed(tree, body))
                return {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid}
        raise Refused(404)

    def _upload_mode(self, file: dict[str, Any], tree: dict[str, Blob]) -> dict[str, Any]:
        large = self.lfs and (file["path"].endswith(".safetensors") or b"\0" in base64.b64decode(file["sample"]))
        oid = tree[file["path"]].oid if file["path"] in tree else None
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _lfs_actions(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        if oid in self.objects:
            return asked
        place, actions = f"{self.storage}/{oid}", {"verify": {"href": f"{self.endpoint}/lfs/{oid}/verify"}}
        if self.chunk_size and size > self.chunk_size:
            count = -(-size // self.chunk_size)
            header = {str(part): f"{place}/{part}" for part in range(1, count + 1)}
            header["chunk_size"] = str(self.chunk_size)
            upload = {"href": f"{self.endpoint}/lfs/{oid}/complete", "header": header}
        else:
            upload = {"href": place}
        return {**asked, "actions": {"upload": upload, **actions}}

    def _changed(self, tree: dict[str, Blob], body: bytes) -> dict[str, Blob]:
        tree = dict(tree)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "file":
                    tree[value["path"]] = Blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        raise Refused(400, message=f"{value['path']}: its LFS object was not uploaded")
                    tree[value["path"]] = Blob(self.objects[value["oid"]], is_lfs=True)
                case "deletedFile":
                    del tree[value["path"]]
        return dict(sorted(tree.items()))

    def _resolve(self, repo_id: str, revision: str, name: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        found = self._repository(repo_id, token).tree(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound")
        commit, tree = found
        if name not in tree:
            raise Refused(404, "EntryNotFound")
        blob = tree[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.oid}"'}
        if not blob.is_lfs:
            return 200, headers, blob.data
        linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        return 302, {**headers, **linked, "Location": f"{self.storage}/{blob.oid}"}, b""

    def _fault(self, call: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, call):
                    fault.times -= 1
                    return fault
        return None

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # it makes each answer wait 40 ms

            def do_any(self) -> None:
                token = self.headers.get("Authorization")
                is_storage = self.server is hub._servers[1]
                (hub.stored if is_storage else hub.requests).append((self.path, token))
                call = f"{self.command} {'storage' if is_storage else ''}{self.path}"
                hub.calls.append(call)
                fault = hub._fault(call)
                if fault is not None and fault.cut and self.command in ("PUT", "POST"):
                    self.rfile.read(8)
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                body = self.body()
                try:
                    if fault is not None and not fault.cut:
                        raise Refused(fault.status, fault.code, fault.message)
                    if is_storage:
                        status, headers, content = hub.store(self.command, self.path, body)
                    else:
                        bearer = (token or "").removeprefix("Bearer ") or None
                        status, headers, content = hub.answer(self.command, self.path, bearer, body)
                except Refused as refusal:
                    status, content = refusal.status, json.dumps(refusal.body).encode()
                    headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                    if fault is not None and fault.retry_after is not None:
                        headers["Retry-After"] = str(fault.retry_after)
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked and status == 200:
                    status, content = 206, content[int(asked[1]) : int(asked[2] or len(content)) + 1]
                self.send_response(status)
                kind = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
                for name, value in {**kind, **headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    hub.served[self.path.rpartition("/")[2]] += len(content)
                    cut = fault is not None and fault.cut
                    self.wfile.write(content[:8] if cut else content)
                    self.close_connection = cut

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found

            do_GET = do_HEAD = do_POST = do_PUT = do_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps(value).encode()
