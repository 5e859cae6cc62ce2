"""What the Hub's protocol says in its own words: places and ids, file nodes, trees, refusals, and the bodies that clients send; pure.

Here because reading (registry/protocols/huggingface.py) and writing (registry/hub_writing.py) word the same things alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import parse_qsl

from artifact import errors
from artifact.manifest import check_name, check_ref, hub_name, parse_json
from artifact.store import File, Revision
from registry import refusals

MAX_NAMES = 3
API = ("models", "datasets", "spaces", "repos", "whoami-v2", "agent-harnesses", "telemetry", "validate-yaml", "organizations")
NAMED = {"repo": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound"}
_REASONS = {"moved": 412, "files": 422, "not_served": 501}


@dataclass(frozen=True)
class Place:
    """Where a client's HF_ENDPOINT points: the path before `/api` or before a repository, the organisation in it, and the parts behind it."""

    prefix: str
    org: str
    parts: tuple[str, ...]

    def names(self, repo_id: str) -> tuple[str, ...]:
        """The canonical names that a Hub id may mean here, in order: those of the endpoint's organisation first; raises NotFound."""
        found = [f"{self.org}/{repo_id.lower()}"] if self.org else []
        if not self.org or "/" in repo_id:
            found.append(repo_id.lower())
            with suppress(errors.Invalid):
                found.append(hub_name(repo_id))
        return _checked(repo_id, found)


def place(raw_parts: Sequence[str]) -> Place:
    """The place of a request by its decoded path segments: `/`, `/ORG`, `/v1/hf` and `/v1/hf/ORG`."""
    parts = list(raw_parts)
    at = 2 if parts[:2] == ["v1", "hf"] else 0
    org = ""
    if parts[at : at + 1] != ["api"] and parts[at + 1 : at + 2] == ["api"] and parts[at + 2 : at + 3] and parts[at + 2] in API:
        org = parts[at]
        at += 1
    return Place("".join(f"/{part}" for part in parts[:at]), org.lower(), tuple(parts[at:]) or ("",))


def names_of(segments: Sequence[str]) -> tuple[str, ...]:
    """The canonical names that the path segments before `resolve` or `.git` may mean: of three, the first may be an endpoint's organisation."""
    whole = "/".join(segments)
    if len(segments) == 3:
        return Place("", segments[0].lower(), ()).names("/".join(segments[1:]))
    found = [whole.lower()]
    if len(segments) < 3:
        with suppress(errors.Invalid):
            found.append(hub_name(whole))
    return _checked(whole, found)


def _checked(repo_id: str, found: Sequence[str]) -> tuple[str, ...]:
    names = []
    for name in dict.fromkeys(found):
        with suppress(errors.Invalid):
            names.append(check_name(name))
    if not names or "--" in repo_id or ".." in repo_id or not repo_id.isascii():  # some letters elsewhere have an ASCII one as their lower case
        raise errors.NotFound(f"{repo_id[:100]!r} is not a model id", expected="namespace/name", reason="repo")
    return tuple(names)


def ref_of(text: str) -> str:
    """The branch, tag or commit that a revision means; raises NotFound."""
    ref = text.removeprefix("refs/heads/").removeprefix("refs/tags/")
    try:
        return check_ref(ref)
    except errors.Invalid as error:
        raise errors.NotFound(f"no revision {text[:100]!r}", reason="revision") from error


def refusal(error: errors.AirlockError, reading: bool) -> tuple[int, dict[str, str]]:
    """Status and headers of a refusal; what a client may not read is told as gated, since its users know what that means."""
    status = _REASONS.get(error.reason) or refusals.form(refusals.STATUS, error, 500)
    headers = {"x-error-message": refusals.words(error)} | refusals.headers(status, error)
    if status == 404:
        headers["x-error-code"] = NAMED.get(error.reason, "RepoNotFound")
        if "commit" in error.ids:
            headers["x-repo-commit"] = error.ids["commit"]
    elif status == 403 and reading:
        headers["x-error-code"] = "GatedRepo"
    elif status == 401:  # the exact text keeps clients from turning it into "repository not found"; our words are in the body
        headers |= {"x-error-message": "Invalid credentials in Authorization header", "www-authenticate": "Bearer"}
    return status, headers


# ---- files


def git_sha1(raw: bytes) -> str:
    """The git object id of a file's bytes."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()


def _pointer(file: File) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid {file.digest}\nsize {file.size}\n".encode()


def as_lfs(file: File) -> bool:
    """Whether a file is shown as LFS: also where its git id is unknown, so that clients can check its sha256."""
    return file.lfs or not file.git_oid


def etag(file: File) -> str:
    """What clients call a file's content by: SHA-256 of an LFS file, else the git object id."""
    return file.digest.split(":")[1] if as_lfs(file) else file.git_oid


def node(file: File) -> dict[str, object]:
    """A file of a tree."""
    out: dict[str, object] = {"type": "file", "path": file.path, "size": file.size, "oid": file.git_oid}
    if as_lfs(file):
        pointer = _pointer(file)
        out |= {"oid": git_sha1(pointer), "lfs": {"oid": file.digest.split(":")[1], "size": file.size, "pointerSize": len(pointer)}}
    return out


def sibling(file: File, blobs: bool) -> dict[str, object]:
    """A file of a model's information."""
    out: dict[str, object] = {"rfilename": file.path}
    if blobs:
        shown = node(file)
        out |= {"size": file.size, "blobId": shown["oid"]}
        if "lfs" in shown:
            out["lfs"] = {"sha256": file.digest.split(":")[1], "size": file.size, "pointerSize": len(_pointer(file))}
    return out


def tree(files: Sequence[File], prefix: str, recursive: bool) -> list[dict[str, object]]:
    """Files and folders below a folder, in byte order of the files; folders before what is in them."""
    nodes: list[dict[str, object]] = []
    seen: set[str] = set()
    base = f"{prefix}/" if prefix else ""
    for file in files:
        if not file.path.startswith(base):
            continue
        parts = file.path[len(base) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = base + "/".join(parts[:depth])
            if folder not in seen:
                seen.add(folder)
                oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
                nodes.append({"type": "directory", "path": folder, "size": 0, "oid": oid})
        if recursive or len(parts) == 1:
            nodes.append(node(file))
    return nodes


def expanded(nodes: Sequence[dict[str, object]], revision: Revision) -> list[dict[str, object]]:
    """The nodes with the commit that a listing of `expand` shows, which is the revision: files have no history of their own here."""
    last = {"id": revision.commit, "title": f"revision {revision.commit[:12]}", "date": when(revision.at)}
    safe = {"status": "unscanned"}
    return [{**n, "lastCommit": last} | ({"securityFileStatus": safe} if n["type"] == "file" else {}) for n in nodes]


def when(at: float) -> str:
    """A time as the Hub writes it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def asked(raw: bytes, as_json: bool, most: int) -> set[str]:
    """The paths that a client asks for, from JSON or from a form; raises Invalid."""
    if as_json:
        paths = parse_json(raw, "the list of paths").get("paths")
    else:
        try:
            paths = [v for k, v in parse_qsl(raw.decode("utf-8"), max_num_fields=most) if k == "paths"]
        except ValueError as error:
            raise errors.Invalid("the list of paths is not a form", expected="paths=a&paths=b") from error
    listed = paths if isinstance(paths, list) else [paths]
    if not all(isinstance(p, str) for p in listed):
        raise errors.Invalid("paths are not text", expected="a list of strings")
    return set(listed)
