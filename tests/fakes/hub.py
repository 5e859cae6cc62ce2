"""A complete stand-in for the Hugging Face Hub's read side, as a program of its own: standard library only, no code of the project.

    python tests/fakes/hub.py --root DIR --port 0 --token T --log FILE

Repositories are DIR/<namespace>/<name>/ with files and, if wanted, meta.json:
    {"commit": 40 hex, "gated": false|"auto"|"manual", "accepted": true, "private": false, "license": "mit", "tags": [], "refs": {"dev": 40 hex},
     "no_auth_check": true,                    a Hub of before that route
     "lfs": ["*.safetensors", ...],            which files are LFS (fnmatch)
     "lies": {"path": {"oid": …, "sha256": …, "size": …}},     what the listing says instead of the truth
     "nodes": [{…}],                           further entries of the listing
     "redirect": {"path": "http://…"}, "encode": ["path"], "endless": ["path"], "stall": ["path"], "next_page": "http://…"}    hostile behaviour
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import itertools
import json
import re
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

from web_host import Host, Refused, Server, Shared

LFS = ("*.safetensors", "*.bin", "*.gguf", "*.onnx", "*.pt", "*.h5")
DATE = "2026-01-01T00:00:00.000Z"


class Repo:
    """One repository on disk; hashes are kept as long as size and time of a file stay."""

    cache: ClassVar[dict[tuple[str, int, int], tuple[str, str]]] = {}

    def __init__(self, folder: Path, repo_id: str) -> None:
        self.folder, self.id = folder, repo_id
        meta = folder / "meta.json"
        self.meta = json.loads(meta.read_text()) if meta.is_file() else {}
        self.paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != meta)
        self.commit = self.meta.get("commit") or hashlib.sha1("\n".join([repo_id, *self.paths]).encode()).hexdigest()

    def hashes(self, path: str) -> tuple[str, str]:
        file = self.folder / path
        stat = file.stat()
        key = (str(file), stat.st_size, stat.st_mtime_ns)
        if key not in self.cache:
            sha256, sha1 = hashlib.sha256(), hashlib.sha1(f"blob {stat.st_size}\0".encode())
            with file.open("rb") as source:
                while block := source.read(1024 * 1024):
                    sha256.update(block)
                    sha1.update(block)
            self.cache[key] = sha256.hexdigest(), sha1.hexdigest()
        return self.cache[key]

    def is_lfs(self, path: str) -> bool:
        return any(fnmatch.fnmatch(path, pattern) for pattern in self.meta.get("lfs", LFS))

    def node(self, path: str) -> dict:
        sha256, sha1 = self.hashes(path)
        lie = self.meta.get("lies", {}).get(path, {})
        size, sha256 = lie.get("size", (self.folder / path).stat().st_size), lie.get("sha256", sha256)
        if not self.is_lfs(path):
            return {"type": "file", "path": path, "size": size, "oid": lie.get("oid", sha1)}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        return {"type": "file", "path": path, "size": size, "oid": oid, "lfs": {"oid": sha256, "size": size, "pointerSize": len(pointer)}}

    def tree(self, below: str, recursive: bool) -> list[dict]:
        folders = sorted({"/".join(p.split("/")[:i]) for p in self.paths for i in range(1, p.count("/") + 1)})
        nodes = [{"type": "directory", "path": f, "oid": hashlib.sha1(f.encode()).hexdigest(), "size": 0} for f in folders]
        nodes += [self.node(p) for p in self.paths] + self.meta.get("nodes", [])
        prefix = below + "/" if below else ""
        inside = [n for n in nodes if n["path"].startswith(prefix) and (recursive or "/" not in n["path"][len(prefix) :])]
        if below and not inside:
            raise Refused(404, f"{below} does not exist", "EntryNotFound", X_Repo_Commit=self.commit)
        return inside

    def info(self, blobs: bool) -> dict:
        siblings = []
        for path in self.paths:
            entry: dict = {"rfilename": path}
            if blobs:
                node = self.node(path)
                entry |= {"size": node["size"], "blobId": node["oid"]}
                if "lfs" in node:
                    entry["lfs"] = {"sha256": node["lfs"]["oid"], "size": node["size"], "pointerSize": node["lfs"]["pointerSize"]}
            siblings.append(entry)
        license_name = self.meta.get("license")
        return {
            "_id": "0", "id": self.id, "modelId": self.id, "author": self.id.split("/")[0], "sha": self.commit,
            "private": bool(self.meta.get("private")), "gated": self.meta.get("gated", False), "disabled": False,
            "lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0, "spaces": [], "config": {},
            "tags": [*self.meta.get("tags", []), *([f"license:{license_name}"] if license_name else [])],
            "cardData": {"license": license_name} if license_name else {}, "siblings": siblings,
        }  # fmt: skip


class Hub(Shared):
    """What both hosts share: repositories, token, and the tickets of the second host."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.log, options.throttle)
        self.options = options
        self.cdn_port = 0
        self.tickets: dict[str, tuple[Path, float]] = {}
        self.streams = threading.Semaphore(options.streams or 1000)
        self.asked = itertools.count(1)

    def repo(self, repo_id: str) -> Repo:
        root = Path(self.options.root)
        for folder in root.glob("*/*"):
            found = folder.relative_to(root).as_posix()
            if folder.is_dir() and found.lower() == repo_id.lower():
                return Repo(folder, found)
        raise Refused(404, "Repository not found", "RepoNotFound")


class Handler(Host):
    """The Hub's own origin: metadata, and small files or redirects."""

    host = "hub"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server.shared, Hub)
        return self.server.shared

    def refuse(self, refused: Refused) -> None:
        headers = {"X-Error-Message": refused.words} | refused.headers
        if refused.code:
            headers["X-Error-Code"] = refused.code
        self.reply(refused.status, json.dumps({"error": refused.words}).encode(), headers)

    def noted(self) -> dict:
        return {"authorization": "Authorization" in self.headers, "agent": self.headers.get("User-Agent", "")}

    def start(self, status: int, length: int | None, headers: dict[str, str]) -> None:
        super().start(status, length, {"X-Request-Id": secrets.token_hex(4)} | headers)

    def send_file(self, file: Path, headers: dict[str, str], flaws: tuple[str, ...] = ()) -> None:
        size = file.stat().st_size
        lo, hi, status = 0, size, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match:
            lo, hi, status = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size), 206
            if lo >= size or lo >= hi:
                raise Refused(416, "Requested range not satisfiable", Content_Range=f"bytes */{size}")
            headers["Content-Range"] = f"bytes {lo}-{hi - 1}/{size}"
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if "encode" in flaws:
            bomb = gzip.compress(bytes(64 * 1024 * 1024))
            self.reply(status, bomb, headers | {"Content-Encoding": "gzip"})
            return
        self.start(status, None if "endless" in flaws else hi - lo, headers)
        if self.command == "HEAD":
            return
        with self.hub.streams, file.open("rb") as source:
            source.seek(lo)
            self.pour(source, hi - lo, "endless" in flaws, "stall" in flaws)

    def caller(self) -> str:
        """The user that a valid token stands for, empty without one; refuses a wrong token."""
        given = self.headers.get("Authorization", "")
        if not given:
            return ""
        if not self.hub.options.token or given != f"Bearer {self.hub.options.token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        return "tester"

    def route(self) -> None:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        if path == "/api/agent-harnesses":
            return self.reply(200, b'{"standardEnvVars":[],"harnesses":{}}')
        if path.startswith("/api/telemetry/"):
            return self.reply(200, b"")
        user = self.caller()
        if path == "/api/whoami-v2":
            if not user:
                raise Refused(401, "Invalid username or password.")
            token = {"displayName": "test", "role": "read"}
            doc = {
                "type": "user",
                "id": "1",
                "name": user,
                "fullname": user,
                "email": None,
                "isPro": False,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": token},
            }
            return self.reply(200, json.dumps(doc).encode())
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|refs|commits|paths-info|auth-check)(?:/([^/]+)(?:/(.+))?)?)?", path)
        if match:
            repo = self.visible(unquote(match[1]), user)
            return self.api(repo, match[2] or "revision", unquote(match[3] or ""), unquote(match[4] or ""), query, user)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match and self.command in ("GET", "HEAD"):
            return self.resolve(self.visible(unquote(match[1]), user), unquote(match[2]), unquote(match[3]), user)
        raise Refused(404, "Not found")

    def visible(self, repo_id: str, user: str) -> Repo:
        repo = self.hub.repo(repo_id)
        if repo.meta.get("private") and not user:
            raise Refused(401, "Repository not found", "RepoNotFound")
        return repo

    def at(self, repo: Repo, revision: str) -> None:
        known = {"main": repo.commit, repo.commit: repo.commit, "refs/heads/main": repo.commit} | repo.meta.get("refs", {})
        if known.get(revision or "main") != repo.commit:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def gate(self, repo: Repo, user: str) -> None:
        if repo.meta.get("gated") and not (user and repo.meta.get("accepted", True)):
            text = f"Access to model {repo.id} is restricted and you are not in the authorized list."
            raise Refused(403 if user else 401, text, "GatedRepo")

    def api(self, repo: Repo, verb: str, revision: str, rest: str, query: dict[str, list[str]], user: str) -> None:
        def flag(name: str) -> bool:
            return query.get(name, ["false"])[0].lower() in ("true", "1")

        self.at(repo, revision)
        headers: dict[str, str] = {}
        doc: object
        if verb == "revision":
            doc = repo.info(flag("blobs"))
        elif verb == "refs":
            branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commit}]
            branches += [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.meta.get("refs", {}).items()]
            doc = {"branches": branches, "tags": [], "converts": []}
        elif verb == "commits":
            doc = [{"id": repo.commit, "title": "initial", "message": "", "date": DATE, "authors": [{"user": "alice"}]}]
        elif verb == "auth-check":
            if repo.meta.get("no_auth_check"):
                raise Refused(404, "Not found")
            self.gate(repo, user)
            doc = {}
        elif verb == "paths-info":
            kind = self.headers.get("Content-Type", "")
            wanted = json.loads(self.body)["paths"] if "json" in kind else parse_qs(self.body.decode()).get("paths", [])
            doc = [repo.node(p) for p in wanted if p in repo.paths]
        else:
            nodes = repo.tree(rest, flag("recursive"))
            limit = min(int(query.get("limit", ["1000"])[0]), self.hub.options.page)
            cursor = int(query.get("cursor", ["0"])[0])
            doc = nodes[cursor : cursor + limit]
            if cursor + limit < len(nodes):
                more = f"recursive={str(flag('recursive')).lower()}&expand=false&limit={limit}&cursor={cursor + limit}"
                headers["Link"] = f'<http://{self.headers["Host"]}{urlsplit(self.path).path}?{more}>; rel="next"'
            if "next_page" in repo.meta:
                headers["Link"] = f'<{repo.meta["next_page"]}>; rel="next"'
        self.reply(200, json.dumps(doc).encode(), headers)

    def resolve(self, repo: Repo, revision: str, path: str, user: str) -> None:
        self.at(repo, revision)
        self.gate(repo, user)
        if self.hub.options.busy and next(self.hub.asked) % self.hub.options.busy == 0:
            raise Refused(429, "Too many requests", Retry_After="1", RateLimit='"resolvers";r=0;t=1')
        if path not in repo.paths:
            raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=repo.commit)
        node, file = repo.node(path), repo.folder / path
        etag = node["lfs"]["oid"] if "lfs" in node else node["oid"]
        headers = {"X-Repo-Commit": repo.commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(node["size"]), "ETag": f'"{etag}"'}
        headers["Content-Disposition"] = f'inline; filename="{quote(path.rsplit("/", 1)[-1])}";'
        elsewhere = repo.meta.get("redirect", {}).get(path)
        if not elsewhere and "lfs" in node and self.hub.options.redirect:
            ticket = secrets.token_hex(16)
            self.hub.tickets[ticket] = (file, time.monotonic() + self.hub.options.url_ttl)
            elsewhere = f"http://127.0.0.1:{self.hub.cdn_port}/cdn/{quote(repo.id)}/{quote(path)}?X-Amz-Signature={ticket}&X-Amz-Expires={self.hub.options.url_ttl}"
        if elsewhere:
            headers.pop("ETag")
            return self.reply(302, b"", headers | {"Location": elsewhere})
        flaws = tuple(f for f in ("encode", "endless", "stall") if path in repo.meta.get(f, []))
        self.send_file(file, headers, flaws)


class Cdn(Handler):
    """The second origin: signed URLs only, and like an object store it refuses a request that carries Authorization."""

    host = "cdn"

    def route(self) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "Only one auth mechanism allowed")
        file, until = self.hub.tickets.get(parse_qs(urlsplit(self.path).query).get("X-Amz-Signature", [""])[0], (None, 0.0))
        if file is None or time.monotonic() > until:
            raise Refused(403, "Request has expired")
        self.send_file(file, {"ETag": '"not-the-content-hash-12"'})


def main() -> None:
    """Starts both listeners, prints where they are, and serves until it is killed."""
    options = argparse.ArgumentParser(description="a stand-in Hugging Face Hub")
    options.add_argument("--root", required=True)
    options.add_argument("--port", type=int, default=0)
    options.add_argument("--token", default="")
    options.add_argument("--log", default="")
    options.add_argument("--page", type=int, default=1000, help="entries of one page of the tree")
    options.add_argument("--redirect", action="store_true", help="LFS files are on a second host, behind signed URLs")
    options.add_argument("--url-ttl", type=int, default=3600, help="seconds that such a URL lives")
    options.add_argument("--throttle", type=int, default=0, help="bytes a second, all connections together")
    options.add_argument("--streams", type=int, default=0, help="bodies sent at once")
    options.add_argument("--busy", type=int, default=0, help="answer every n-th request for a file with 429 and Retry-After")
    chosen = options.parse_args()
    shared = Hub(chosen)
    hub, cdn = Server(chosen.port, Handler, shared), Server(0, Cdn, shared)
    shared.cdn_port = cdn.server_port
    threading.Thread(target=cdn.serve_forever, daemon=True).start()
    print(f"listening on http://127.0.0.1:{hub.server_port} cdn http://127.0.0.1:{cdn.server_port}", flush=True)
    try:
        hub.serve_forever()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
