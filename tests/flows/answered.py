"""Whether every request of a client was answered by a route that we have: a probe that meets none is a gap in a door.

What is served is said here once more, by what follows a door's first words, so that a door that forgets a route does not hide the gap. A path with
the shape of a served one is answered whatever its status, since a model, revision or file that is not there is an answer; of S3 any path is a key,
so only its verbs and subresources can be gaps. 405 and 501 are gaps at every door.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from registry.routes import route

NO_VERB = (405, 501)
_PART = r"[^/]+"
_VERSION = rf"versions(?:/{_PART}(?:/(?:files(?:/.+)?|signature))?)?"
_MODEL = rf"(?:/(?:{_VERSION}|{_PART}/files))?"
_IMAGE = rf"(?:/(?:images(?:/{_PART})?|tags/{_PART}))?"
_OWNER = rf"org/{_PART}(?:/team/{_PART})?"
_NGC = (
    rf"/dl/{_PART}|/token|/roles|/v3/keys/get-caller-info",
    r"/v2/(?:orgs|users/me|products)",
    r"/v2/catalog/(?:models|resources|containers)/public-key",
    rf"/v2/search/(?:catalog|subscriber/catalog|{_OWNER})/resources/{_PART}",
    rf"/v2/org/{_PART}/teams",
    rf"/v2/{_OWNER}/models/{_PART}{_MODEL}",
    rf"/v2/models/{_OWNER}/{_PART}/{_PART}/files",
    rf"/v2/models/(?!org/){_PART}(?:/{_PART}){{1,2}}(?:/{_VERSION})?",
    rf"/v2/{_OWNER}/repos/{_PART}{_IMAGE}",
    rf"/v2/repos/{_PART}(?:/{_PART}){{1,2}}{_IMAGE}",
    r"/[^:]+(?:/|%2[fF])[^:]+(?::|%3[aA]).+",  # what NIM_REPOSITORY_OVERRIDE makes of org/team/model:version
)
_OCI = (
    r"/v2/?|/v2/_catalog/?",
    rf"/v2/.+/(?:blobs|manifests|referrers)/{_PART}",
    rf"/v2/.+/blobs/uploads/(?:{_PART})?",
    r"/v2/.+/tags/list",
)
_AT = rf"(?:/v1/hf)?(?:/(?!v1/|v2/|v3/|api/|datasets/|spaces/){_PART})?"  # where a Hub endpoint may begin
_WORD = r"(?:(?:tree|revision|paths-info|commits|preupload|commit|branch|tag)/.+|refs|auth-check|xet-(?:read|write)-token(?:/.+)?)"
_REPO = r"/(?!api/|v1/|datasets/|spaces/).+"
_HUB = (
    rf"{_AT}/api/(?:whoami-v2|agent-harnesses|telemetry/.+|validate-yaml|repos/(?:create|delete)|models|models/{_PART}(?:/{_PART})?)",
    rf"{_AT}/api/models/(?:{_PART}/){{1,8}}{_WORD}",
    rf"{_AT}{_REPO}/resolve/{_PART}/.+",
    rf"{_AT}{_REPO}\.git/info/lfs/objects/(?:batch|{_PART}(?:/{_PART})?)",
)
_READ = re.compile(r".+/resolve/")  # of the Hub's other routes each tells by 405 what it takes
_SERVED = {door: re.compile(rf"(?:{'|'.join(shapes)})\Z") for door, shapes in (("ngc", _NGC), ("oci", _OCI), ("hub", _HUB))}


def served(method: str, path: str, door: str = "") -> bool:
    """Whether a decoded path has the shape of a route of the door that takes it."""
    if door == "ngc":
        return _SERVED["ngc"].match("/" + path.lstrip("/")) is not None
    if door == "s3":
        return True
    if re.match(r"/v2(?:/|\Z)", path):
        return _SERVED["oci"].match(path) is not None
    if re.match(r"/(?:airlock|healthz)(?:/|\Z)", path):
        return not route(path).template.endswith("other")
    if path in ("/token", "/proxy_auth"):
        return True
    return _SERVED["hub"].match(path) is not None and (method in ("GET", "HEAD") or not _READ.match(path))


def unanswered(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The requests among access lines that no route of ours took: what a refusal of a known route says is an answer."""
    out = []
    for line in lines:
        known = served(line["method"], line["path"], line.get("door", ""))
        if line["status"] in NO_VERB or (line["status"] == 404 and not known):
            out.append(f"{line['method']} {line['path']} -> {line['status']}")
    return out


def accessed(log: Path, door: str = "") -> list[dict[str, Any]]:
    """The access lines of a server's log, or those of one listener beside the main one, once it rests: a line comes after its answer."""
    size, rested = -1, 0
    while rested < 3:
        time.sleep(0.03)
        before, size = size, log.stat().st_size
        rested = rested + 1 if size == before else 0
    return access_lines(log, door)


def access_lines(log: Path, door: str = "") -> list[dict[str, Any]]:
    """Those that are there now, without one that is being written."""
    whole = log.read_text(errors="replace").rpartition("\n")[0]
    lines = (json.loads(line) for line in whole.split("\n") if line.startswith("{"))
    return [line for line in lines if line.get("log") == "airlock.access" and (not door or line.get("door") == door)]


def gaps(log: Path) -> list[str]:
    """The requests that no route of ours took among all that a server's log has."""
    return unanswered(accessed(log))
