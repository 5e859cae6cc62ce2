"""What the NGC API says, as JSON values: names, envelopes, pages and objects of the shapes that NGC's clients read; pure.

Here because the door (registry/protocols/ngc.py) and the verbs below it speak of the same names. No request, no clock, no right is known here.
"""

from __future__ import annotations

import base64
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar
from urllib.parse import unquote

from artifact.errors import Invalid, NotFound
from artifact.manifest import check_name, ngc_name, parse_json
from artifact.store import File

T = TypeVar("T")
Json = dict[str, object]
ORIGINS = ("ngc/", "nvcr.io/")  # what the canonical name of an artefact has in front of the name that NGC's clients know
READ_ROLE = "REGISTRY_READ"
_ENDS = re.compile(r"\bends on (\S+), in (\d+ days|less than a day)\Z")


@dataclass(frozen=True)
class Shown:
    """One artefact as NGC names it: organisation, team (empty: none) and name, with what listings tell of it."""

    org: str
    team: str
    name: str
    display: str = ""
    public: bool = False
    guest: bool = False
    product: str = ""

    @property
    def id(self) -> str:
        """The name that a client writes."""
        return "/".join(part for part in (self.org, self.team, self.name) if part)

    def named(self) -> Json:
        """The fields that every object has."""
        return {"name": self.name, "orgName": self.org, "teamName": self.team, "displayName": self.display or self.name, "isPublic": self.public}


def split_name(name: str) -> tuple[str, str, str] | None:
    """Organisation, team and name of a canonical name; None where NGC's grammar has no place for it."""
    for origin in ORIGINS:
        name = name.removeprefix(origin)
    parts = name.split("/")
    return (parts[0], "" if len(parts) == 2 else parts[1], parts[-1]) if len(parts) in (2, 3) else None


def model_names(parts: Sequence[str]) -> list[str]:
    """The canonical names that a model of a client may have, in order: the name itself, then `ngc/…`; raises NotFound for what can be none."""
    return _names(parts, ngc_name)


def image_names(parts: Sequence[str]) -> list[str]:
    """The same of an image, whose second form is `nvcr.io/…`."""
    return _names(parts, lambda *given: _own_name("nvcr.io", *given))


def _own_name(*parts: str) -> str:
    return check_name("/".join(parts).lower())


def _names(parts: Sequence[str], second: Callable[..., str]) -> list[str]:
    found = []
    for form in (_own_name, second):
        with suppress(Invalid):
            found.append(form(*parts))
    if not found or any("/" in part or not part or not part.isascii() for part in parts):
        raise NotFound(f"{'/'.join(parts)[:100]!r} is no name of an artefact", expected="org/name or org/team/name", reason="name")
    return found


def override(raw_path: str, query_string: str) -> list[tuple[list[str], str, str]]:
    """The model, version and file that a client with NIM_REPOSITORY_OVERRIDE may mean by a path, in the order in which to try them.

    The object is `org/team/model:version?file=path`, plain, escaped, or escaped twice; of a name with % in it the text of one unescaping comes first.
    """
    once = unquote(raw_path.lstrip("/"))
    out = []
    for text in dict.fromkeys((once, unquote(once))):
        if query_string and "?" not in text:
            text += "?" + unquote(query_string)
        target, mark, path = text.partition("?file=")
        name, colon, ref = target.partition(":")
        if mark and colon and path and ref:
            out.append((name.split("/"), ref, path))
    return out


def warning(text: str) -> str:
    """What ends soon (artifact/grant.py) in the words that NGC's clients know: `the API key expires in 7 days, on …`; other words as they are."""
    return _ENDS.sub(r"expires in \2, on \1", text)


def when(at: float) -> str:
    """Seconds since 1970 in NGC's form."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def page_of(items: Sequence[T], index: int, size: int) -> tuple[Sequence[T], Json]:
    """One page of a listing and its paginationInfo; the only page is also page 1, since some clients count from there."""
    size = max(1, size)
    pages = max(1, -(-len(items) // size))
    index = 0 if pages == 1 and index == 1 else index
    return items[index * size : (index + 1) * size], {"index": index, "size": size, "totalPages": pages, "totalResults": len(items)}


def newest_first(versions: list[Json]) -> list[Json]:
    """Versions by their numbers, the highest first."""
    return sorted(versions, key=lambda v: _semver(str(v["ref"])), reverse=True)


def _semver(text: str) -> list[tuple[int, int, str]]:
    parts = [(1, int(part), "") if part.isdigit() and part.isascii() else (0, 0, part) for part in re.split(r"[._+-]", text[:255])]
    return [*parts, (0, 1, "")]  # a release comes behind its candidates


def model(shown: Shown, versions: Sequence[Json]) -> Json:
    """A model, its latest version being the one that was set last."""
    last: Mapping[str, object] = max(versions, key=lambda v: (float(str(v["at"])), str(v["ref"])), default={"ref": "", "bytes": 0, "at": 0.0})
    times = [float(str(v["at"])) for v in versions] or [0.0]
    out = shown.named() | {"canGuestDownload": shown.guest, "latestVersionIdStr": last["ref"], "latestVersionSizeInBytes": last["bytes"]}
    out |= {
        "hasSignedVersion": any(v["signed"] for v in versions),
        "labels": [],
        "licenseTerms": [],
        "productNames": [shown.product] if shown.product else [],
    }
    out |= dict.fromkeys(("application", "framework", "modelFormat", "precision", "shortDescription", "description"), "")
    return out | {"createdDate": when(min(times)), "updatedDate": when(max(times))}


def version(facts: Json) -> Json:
    """A version, which is always whole here."""
    out: Json = {"versionId": facts["ref"], "status": "UPLOAD_COMPLETE", "storageVersion": "V2", "isSigned": facts["signed"], "policy": []}
    return out | {"totalFileCount": facts["files"], "totalSizeInBytes": facts["bytes"], "createdDate": when(float(str(facts["at"])))}


def model_file(file: File, at: float) -> Json:
    """A file of a version; its SHA-256 in base64 of the raw digest."""
    raw = bytes.fromhex(file.digest.partition(":")[2])
    sums: Json = {"sha256_base64": base64.b64encode(raw).decode()} if file.digest.startswith("sha256:") else {}
    return {"path": file.path, "sizeInBytes": file.size, "createdDate": when(at)} | sums


def caller(key_id: str, org: str, kind: str, member: str, teams: Sequence[str], products: Sequence[str]) -> Json:
    """Who presented a key: a personal key with its member's teams, or a service key."""
    personal = kind == "personal"
    out: Json = {"type": "PERSONAL_KEY" if personal else "SERVICE_KEY", "orgName": org, "keyId": key_id, "products": [{"name": p} for p in products]}
    return out | {"userId": member or key_id, "user": user(key_id, org, member, teams)["user"] if personal else None}


def user(key_id: str, org: str, member: str, teams: Sequence[str]) -> Json:
    """The user of a key, with one role in its organisation and in each team."""
    role: Json = {"org": {"name": org, "displayName": org}, "orgRoles": [READ_ROLE], "teamRoles": []}
    roles = [role, *(role | {"team": {"name": team}, "teamRoles": [READ_ROLE]} for team in teams)]
    return {"user": {"id": 1, "name": member or key_id, "email": "", "roles": roles}}


def found(shown: Shown, kind: str, latest: str, at: float) -> Json:
    """An artefact in an answer of the search."""
    out = shown.named() | {"resourceId": shown.id, "resourceType": kind, "description": "", "guestAccess": shown.guest}
    out |= {"labels": [], "sharedWithOrgs": [], "sharedWithTeams": [], "dateCreated": when(at), "dateModified": when(at)}
    return out | {"attributes": [{"key": key, "value": latest} for key in ("latestVersionIdStr", "latestTag")] if latest else []}


@dataclass(frozen=True)
class Query:
    """What a search asks for: patterns over resource id, organisation, team and name, words anywhere, and the page, from 0."""

    patterns: Mapping[str, str]
    words: tuple[str, ...] = ()
    page: int = 0
    size: int = 100

    def takes(self, shown: Shown) -> bool:
        """Whether an artefact is among what is asked for."""
        have = {"resourceId": shown.id, "orgName": shown.org, "teamName": shown.team, "name": shown.name}
        if not all(fnmatch.fnmatchcase(have[field], pattern) for field, pattern in self.patterns.items()):
            return False
        text = f"{shown.id} {shown.display}".lower()
        return all(word in text for word in self.words)


def query(text: str) -> Query:
    """The query of a search's `q`; fields that are not ours are ignored, as its order and its fields; raises Invalid, TooLarge."""
    doc = parse_json(text.encode("utf-8", "replace"), "q", 16384) if text else {}
    patterns: dict[str, str] = {}
    words: list[str] = []
    asked = doc.get("query")
    for part in (asked if isinstance(asked, str) else "").replace('"', "").split()[:20]:
        field, colon, value = part.partition(":")
        if colon and field in ("resourceId", "orgName", "teamName", "name"):
            patterns[field] = value.replace("\\", "")[:300].lower().replace("[", "[[]")
        elif part not in ("AND", "*", "*:*") and not colon:
            words.append(part.strip("*").lower())
    numbers = [doc.get(name) for name in ("page", "pageSize")]
    page, size = (n if type(n) is int and 0 <= n <= 10**6 else None for n in numbers)
    return Query(patterns, tuple(words), page or 0, min(size or 100, 1000))


def search_page(kind: str, items: Sequence[Json], asked: Query) -> Json:
    """An answer of the search; one page past the last has no results."""
    here = items[asked.page * asked.size : (asked.page + 1) * asked.size]
    pages = -(-len(items) // asked.size)
    groups = [{"groupValue": kind, "totalCount": len(items), "resources": list(here)}] if items else []
    return {"results": groups, "resultTotal": len(items), "resultPageTotal": pages, "params": {"page": asked.page}}


def image_variant(digest: str, platform: Mapping[str, object], size: int) -> Json:
    """One architecture of an image."""
    texts = {key: value if isinstance(value := platform.get(key), str) else "" for key in ("architecture", "os")}
    return {"digest": digest, "imageSize": size, **texts}
