"""Which route a request path belongs to, as the template that metrics and traces may show: never a name, reference or digest; pure.

Here because labels must be bounded: a path that is no route is `other`, whatever a client sends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(frozen=True)
class Route:
    """One route: the door that serves it, its template, and what a successful GET of it hands out."""

    door: str
    template: str
    kind: str = ""


OTHER = Route("other", "other")
_NGC = (
    (re.compile(r"/dl/."), Route("ngc", "/dl/{ticket}", "file")),
    (re.compile(r"/token\Z"), Route("ngc", "/token")),
    (re.compile(r"/v3/keys/get-caller-info\Z"), Route("ngc", "/v3/keys/get-caller-info")),
    (re.compile(r"/v2/search/"), Route("ngc", "/v2/search/…")),
    (re.compile(r"/v2/(?:org/.+/|)models/.+/versions/[^/]+/files\Z"), Route("ngc", "/v2/…/models/{model}/versions/{version}/files")),
    (re.compile(r"/v2/(?:org/.+/|)models/.+/versions/[^/]+/files/."), Route("ngc", "/v2/…/models/{model}/versions/{version}/files/{path}", "file")),
    (re.compile(r"/v2/(?:org/.+/|)models/.+/files\Z"), Route("ngc", "/v2/…/models/{model}/{version}/files")),
    (re.compile(r"/v2/(?:org/.+/|)models/."), Route("ngc", "/v2/…/models/{model}/…")),
    (re.compile(r"/v2/(?:org/.+/|)repos/."), Route("ngc", "/v2/…/repos/{image}/…")),
    (re.compile(r""), Route("ngc", "other")),
)
_S3 = (
    (re.compile(r"/*\Z"), Route("s3", "/")),
    (re.compile(r""), Route("s3", "/{bucket}/{key}", "file")),
)
_OCI = (
    (re.compile(r"/v2/?\Z"), Route("oci", "/v2/")),
    (re.compile(r"/v2/_catalog\Z"), Route("oci", "/v2/_catalog")),
    (re.compile(r"/v2/.+/blobs/uploads/?\Z"), Route("oci", "/v2/{name}/blobs/uploads/")),
    (re.compile(r"/v2/.+/blobs/uploads/[^/]+\Z"), Route("oci", "/v2/{name}/blobs/uploads/{id}")),
    (re.compile(r"/v2/.+/blobs/[^/]+\Z"), Route("oci", "/v2/{name}/blobs/{digest}", "blob")),
    (re.compile(r"/v2/.+/manifests/[^/]+\Z"), Route("oci", "/v2/{name}/manifests/{reference}", "manifest")),
    (re.compile(r"/v2/.+/tags/list\Z"), Route("oci", "/v2/{name}/tags/list")),
    (re.compile(r"/v2/.+/referrers/[^/]+\Z"), Route("oci", "/v2/{name}/referrers/{digest}")),
    (re.compile(r"/v2/"), Route("oci", "other")),
)
_ADMIN = re.compile(r"/airlock/v1/([a-z.]{1,20})(/|\Z)")
_ADMIN_WORDS = frozenset(
    [
        "whoami",
        "leases",
        "standing",
        "verified",
        "unsigned",
        "revocations",
        "catalog",
        "openapi.json",
        "search",
        "audit",
        "remove",
        "history",
        "rollback",
        "immutable",
        "quota",
        "retention",
        "gc",
        "orgs",
        "teams",
        "members",
        "keys",
        "grants",
        "entitlements",
        "receipts",
        "expiring",
        "report",
        "upstream",
        "require",
        "terms",
    ]
)
_AT = r"(?:/v1/hf)?(?:/[^/]+)?"  # where a Hub endpoint may begin
_HUB = (
    (re.compile(_AT + r"/api/whoami-v2\Z"), Route("hub", "/api/whoami-v2")),
    (re.compile(_AT + r"/api/repos/(?:create|delete)\Z"), Route("hub", "/api/repos/{verb}")),
    (re.compile(_AT + r"/api/models/.+/tree/"), Route("hub", "/api/models/{id}/tree/{ref}")),
    (re.compile(_AT + r"/api/models/.+/paths-info/"), Route("hub", "/api/models/{id}/paths-info/{ref}")),
    (re.compile(_AT + r"/api/models/.+/refs\Z"), Route("hub", "/api/models/{id}/refs")),
    (re.compile(_AT + r"/api/models/.+/commits/"), Route("hub", "/api/models/{id}/commits/{ref}")),
    (re.compile(_AT + r"/api/models/.+/preupload/"), Route("hub", "/api/models/{id}/preupload/{ref}")),
    (re.compile(_AT + r"/api/models/.+/commit/"), Route("hub", "/api/models/{id}/commit/{ref}")),
    (re.compile(_AT + r"/api/models/.+/(?:branch|tag)/"), Route("hub", "/api/models/{id}/{kind}/{ref}")),
    (re.compile(_AT + r"/api/models/."), Route("hub", "/api/models/{id}")),
    (re.compile(_AT + r"/api/"), Route("hub", "/api/other")),
    (re.compile(r"/.+\.git/info/lfs/objects/batch\Z"), Route("hub", "/{id}.git/info/lfs/objects/batch")),
    (re.compile(r"/.+\.git/info/lfs/objects/."), Route("hub", "/{id}.git/info/lfs/objects/{oid}")),
    (re.compile(r"/.+/resolve/.+/."), Route("hub", "/{id}/resolve/{ref}/{path}", "file")),
)


def route(path: str, door: str = "") -> Route:
    """The route of a decoded path, with `door` on that door's own listener; OTHER for what no door serves."""
    if door == "ngc":
        return _first(_NGC, "/" + path.lstrip("/"))
    if door == "s3":
        return _first(_S3, path)
    if path.startswith("/v2"):
        return _first(_OCI, path)
    if path in ("/token", "/proxy_auth"):
        return Route("token", path)
    if path == "/healthz":
        return Route("admin", "/healthz")
    if path.startswith("/airlock/"):
        word = _ADMIN.match(path)
        known = word is not None and word[1] in _ADMIN_WORDS
        more = "/…" if word and word[2] and len(path) > word.end() else ""
        return Route("admin", f"/airlock/v1/{word[1]}{more}") if word and known else Route("admin", "other")
    return _first(_HUB, path)


def _first(table: tuple[tuple[re.Pattern[str], Route], ...], path: str) -> Route:
    return next((found for pattern, found in table if pattern.match(path)), OTHER)
