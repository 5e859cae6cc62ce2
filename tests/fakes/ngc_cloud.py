"""A complete stand-in for the read side of NGC and nvcr.io, as a program of its own: standard library only, no code of the project.

    python tests/fakes/ngc_cloud.py --root DIR [--cert FILE --cert-key FILE] [--log FILE] [--token-life S] [--url-life S] [--throttle BYTES]

Four hosts, each a port: `api` (api.ngc.nvidia.com), `authn` (authn.nvidia.com), `files` (where signed URLs and redirects lead; it refuses a request
with Authorization) and `nvcr` (nvcr.io). Models are DIR/models/<org>/[<team>/]<model>/<version>/<files>, images
DIR/images/<repository>/{tags.json,blobs/<hex>}. DIR/cloud.json, read anew at each request:
    keys    {key: {"org", "teams": [], "type": "PERSONAL_KEY"|"SERVICE_KEY"|"LEGACY", "revoked": bool}}
    models  {id: {"guest": bool, "license": {…}, "accepted": bool, "refuse": {"status", "at": "all"|"files", "code", "words"},
                  "versions": {v: {…}}}}
    images  {repository: {"public": bool, "life": seconds of its tokens as told, "refuse": {"status", "at": "token"|"manifest"}}}
A version's own: "status", "signed"; "unlisted" (listings answer 400 "Org contex missing"), "page" (entries of one), "first_page" (0 or 1),
"total" and "count" (what the listing and the version say of how many), "overlap" (pages repeat an entry), "no_sha256",
"lies" {path: {field: value}}, "nodes" [more entries], "urls" {path: another URL}, "strange" {path: status of its signed URL},
"cut" {path: bytes sent}, "endless" [paths or "pages"], "encode" [paths], "unmarked" [paths without an ETag],
"rangeless" [paths whose host ignores Range], "busy" [paths of which the first request gets 429], "text" (a raw answer about the version),
"html" (the listing is a page for people), "huge" (it is endless), "unsigned" (the listing of URLs alone answers 400),
"redirect_file" {path: where its own route leads}.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import re
import secrets
import ssl
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, quote

from web_host import SLICE, Host, Refused, Server, Shared

DATE = "2026-01-01T00:00:00.000Z"
INDEX = "application/vnd.oci.image.index.v1+json"
CODES = {400: "INVALID_REQUEST", 401: "UNAUTHORIZED", 402: "PAYMENT_REQUIRED", 403: "FORBIDDEN", 404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED",
         412: "INVALID_REQUEST", 416: "INVALID_REQUEST", 429: "TOO_MANY_REQUESTS", 451: "FORBIDDEN", 503: "SERVICE_UNAVAILABLE"}  # fmt: skip


class Cloud(Shared):
    """What the four hosts share: the folder, tokens and signed URLs."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.log, options.throttle)
        self.options, self.root = options, Path(options.root)
        self.tokens: dict[str, tuple[str, float]] = {}
        self.tickets: dict[str, tuple[Path, float, dict]] = {}
        self.places: dict[str, str] = {}
        self.calmed: set[Path] = set()
        self.hashes: dict[tuple[str, int, int], str] = {}

    def told(self) -> dict:
        return json.loads((self.root / "cloud.json").read_text())

    def sha256(self, file: Path) -> str:
        stat = file.stat()
        key = (str(file), stat.st_size, stat.st_mtime_ns)
        if key not in self.hashes:
            with file.open("rb") as source:
                self.hashes[key] = hashlib.file_digest(source, "sha256").hexdigest()
        return self.hashes[key]

    def ticket(self, file: Path, flaws: dict | None = None) -> str:
        """A signed URL of the second host."""
        word = secrets.token_hex(16)
        self.tickets[word] = (file, time.monotonic() + self.options.url_life, flaws or {})
        return f"{self.places['files']}/{quote(file.name)}?ssec-algo=AES256&X-Amz-Signature={word}"

    def token(self, key: str) -> str:
        word = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b'{"alg":"none"}', secrets.token_bytes(12), b"signature"))
        self.tokens[word] = (key, time.monotonic() + self.options.token_life)
        return word


class Ngc(Host):
    """One of the hosts; a refusal has NGC's envelope."""

    do_PUT = Host.answer

    @property
    def cloud(self) -> Cloud:
        assert isinstance(self.server.shared, Cloud)
        return self.server.shared

    def refuse(self, refused: Refused) -> None:
        code = refused.code or CODES.get(refused.status, "UNKNOWN")
        status = {"statusCode": code, "statusDescription": refused.words, "requestId": secrets.token_hex(8), "serverId": "fake"}
        self.reply(refused.status, json.dumps({"requestStatus": status}).encode(), refused.headers)

    def noted(self) -> dict:
        return {"authorization": self.headers.get("Authorization", "").partition(" ")[0], "guest": "X-NGC-Guest-Token" in self.headers}

    def say(self, **doc: object) -> None:
        self.reply(
            200, json.dumps(doc | {"requestStatus": {"statusCode": "SUCCESS", "requestId": secrets.token_hex(8), "serverId": "fake"}}).encode()
        )

    def send_file(self, file: Path, flaws: dict | None = None) -> None:
        flaws, size = flaws or {}, file.stat().st_size
        lo, hi, status, headers = 0, size, 200, {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if not flaws.get("unmarked"):
            headers["ETag"] = f'"{self.cloud.sha256(file)[:32]}"'
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if match and not flaws.get("rangeless"):
            lo, hi, status = int(match[1]), min(size, int(match[2]) + 1), 206
            if lo >= size:
                return self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {lo}-{hi - 1}/{size}"
        if flaws.get("encode"):
            return self.reply(status, gzip.compress(bytes(16 * 1024 * 1024)), headers | {"Content-Encoding": "gzip"})
        self.start(status, None if flaws.get("endless") else hi - lo, headers)
        if self.command == "HEAD":
            return None
        end = min(hi, lo + flaws["cut"]) if "cut" in flaws else hi
        with file.open("rb") as source:
            source.seek(lo)
            self.pour(source, end - lo, bool(flaws.get("endless")))
        self.close_connection = self.close_connection or end < hi
        return None

    def basic(self) -> str:
        """The key that came as the password of $oauthtoken; empty without one."""
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        try:
            user, _, key = base64.b64decode(value).decode().partition(":")
        except ValueError:
            user, key = "", ""
        return key if kind == "Basic" and user == "$oauthtoken" else ""


class Authn(Ngc):
    """The token service of legacy keys."""

    host = "authn"

    def route(self) -> None:
        if self.parts != ["token"] or self.command != "GET":
            raise Refused(404, "no such route")
        key = self.cloud.told()["keys"].get(self.basic())
        if not key or key.get("revoked") or key["type"] != "LEGACY" or self.query.get("service") != ["ngc"]:
            raise Refused(401, "Invalid apikey")
        for scope in self.query.get("scope", []):
            if not re.fullmatch(rf"group/ngc:{re.escape(key['org'])}(/[^/]+)?", scope):
                raise Refused(401, f"no such scope for this key: {scope}")
        self.reply(200, json.dumps({"token": self.cloud.token(self.basic()), "expires_in": int(self.cloud.options.token_life)}).encode())


class Files(Ngc):
    """The second host: signed URLs only, and like an object store it refuses a request that carries Authorization."""

    host = "files"

    def route(self) -> None:
        if "Authorization" in self.headers:
            return self.reply(400, b"<Error><Code>InvalidArgument</Code></Error>", {"Content-Type": "application/xml"})
        file, until, flaws = self.cloud.tickets.get(self.query.get("X-Amz-Signature", [""])[0], (None, 0.0, {}))
        if file is None or time.monotonic() > until:
            return self.reply(
                403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", {"Content-Type": "application/xml"}
            )
        if flaws.get("busy") and file not in self.cloud.calmed:
            self.cloud.calmed.add(file)
            return self.reply(429, b"", {"Retry-After": "1"})
        if "status" in flaws:
            return self.reply(flaws["status"], b"<Error/>", {"Content-Type": "application/xml"})
        return self.send_file(file, flaws)


class Api(Ngc):
    """NGC's API."""

    host = "api"

    def route(self) -> None:
        parts = self.parts
        if parts == ["v3", "keys", "get-caller-info"]:
            return self.caller_info()
        self.key = self.caller()
        if parts == ["roles"]:
            return self.say(roles=[{"name": "REGISTRY_READ", "allowedActions": [{"service": "MODEL"}, {"service": "CONTAINER"}]}])
        if parts[:1] != ["v2"]:
            raise Refused(404, "no such route")
        parts = parts[1:]
        if parts == ["products"]:
            return self.say(products=[{"name": "nim-dev"}])
        if parts == ["users", "me"]:
            return self.say(user=self.user(self.known()))
        if parts == ["orgs"]:
            org = self.known()["org"]
            return self.say(organizations=[{"id": 1, "name": org, "displayName": org, "type": "ENTERPRISE"}], paginationInfo=pages(1, 500, 0))
        if parts[:1] == ["catalog"] and parts[2:] == ["public-key"]:
            return self.reply(200, (self.cloud.root / f"{parts[1]}.pem").read_bytes(), {"Content-Type": "text/plain"})
        if parts[:1] == ["search"]:
            return self.search(parts[1:])
        guest = parts[:1] in (["models"], ["repos"])
        if guest and parts[:2] == ["models", "org"]:  # where a guest asks for the URLs
            parts, guest = parts[1:], False
            below = parts[2:] if parts[2:3] != ["team"] else parts[4:]
            owner = [parts[1], *(parts[3:4] if parts[2:3] == ["team"] else [])]
            return self.urls([*owner, below[0]], below[1])
        if guest:
            at = next((i for i, p in enumerate(parts) if p in ("versions", "images", "tags", "signature") and i > 2), len(parts))
            return self.below(parts[0], parts[1:at], parts[at:])
        if parts[:1] != ["org"] or len(parts) < 3:
            raise Refused(404, "no such route")
        if not self.key:
            raise Refused(401, "Unauthorized: sign in, or use the routes of guests")
        if parts[2:] == ["teams"]:
            return self.say(teams=[{"id": i, "name": t} for i, t in enumerate(self.key.get("teams", []), 1)], paginationInfo=pages(1, 500, 0))
        team = parts[3:4] if parts[2] == "team" else []
        kind, name, *rest = parts[4:] if team else parts[2:]
        return self.below(kind, [parts[1], *team, name], rest)

    def caller(self) -> dict | None:
        """The record of the key or token that came; None for a guest."""
        given = self.headers.get("Authorization", "")
        if not given:
            return None
        word, keys = given.removeprefix("Bearer "), self.cloud.told()["keys"]
        name, until = self.cloud.tokens.get(word, ("", 0.0))
        found = keys.get(word) if word.startswith("nvapi-") else keys.get(name) if time.monotonic() < until else None
        if not given.startswith("Bearer ") or not found or found.get("revoked"):
            raise Refused(401, "Unauthorized: the key or token is not valid")
        return found

    def known(self) -> dict:
        if not self.key:
            raise Refused(401, "Unauthorized")
        return self.key

    def user(self, key: dict) -> dict:
        roles = [{"org": {"name": key["org"], "displayName": key["org"]}, "orgRoles": ["REGISTRY_READ"]}]
        roles += [
            {"org": {"name": key["org"]}, "orgRoles": ["REGISTRY_READ"], "team": {"name": t}, "teamRoles": ["REGISTRY_READ"]}
            for t in key.get("teams", [])
        ]
        return {"id": 1, "name": "Ada", "email": "ada@example.org", "roles": roles}

    def caller_info(self) -> None:
        word = parse_qs(self.body.decode()).get("credentials", [self.headers.get("Authorization", "").removeprefix("Bearer ")])[0]
        key = self.cloud.told()["keys"].get(word)
        if not key or key.get("revoked") or key["type"] == "LEGACY" or self.command != "POST":
            raise Refused(401, "Invalid API key.")
        self.say(
            type=key["type"], orgName=key["org"], keyId="k1", userId="1", products=[], user=self.user(key) if key["type"] == "PERSONAL_KEY" else None
        )

    def below(self, kind: str, target: list[str], rest: list[str]) -> None:
        if kind == "repos":
            return self.image(target, rest)
        if kind != "models":
            raise Refused(404, "not found")
        if not rest:
            model = self.model(target)
            return self.say(model=self.shown(target, model), modelVersions=[])
        if rest == ["license", "acceptance"] and self.command == "POST":
            told = self.cloud.told()
            told["models"]["/".join(target)]["accepted"] = True
            (self.cloud.root / "cloud.json").write_text(json.dumps(told))
            return self.say()
        if len(rest) == 2 and rest[1] == "files":
            return self.urls(target, rest[0])
        if rest == ["versions"]:
            model = self.model(target)
            found = [self.version_shown(target, v, facts) for v, facts in model["versions"].items()]
            return self.say(model=self.shown(target, model), modelVersions=found, paginationInfo=pages(len(found), 1000, 0))
        if rest[0] != "versions":
            raise Refused(404, "no such route")
        return self.version(target, rest[1], rest[2:])

    # ---- models

    def model(self, target: list[str], at: str = "all") -> dict:
        """What the cloud knows of a model, if this caller may see it."""
        found = self.cloud.told()["models"].get("/".join(target))
        if found is None:
            raise Refused(404, f"Model {'/'.join(target)} not found")
        no = found.get("refuse", {})
        if no and no.get("at", "all") in ("all", at):
            raise Refused(no["status"], no.get("words", "Access denied"), no.get("code", ""))
        if self.key is None and not found.get("guest"):
            raise Refused(401, "Unauthorized: sign in to see this artifact")
        if self.key is not None and not found.get("guest") and target[0] not in (self.key["org"], *self.key.get("shared", [])):
            raise Refused(403, "Access denied: your organization is not entitled to this artifact")
        if at == "files" and found.get("license") and not found.get("accepted"):
            raise Refused(412, "License terms were not accepted")
        return found

    def at_version(self, target: list[str], version: str, at: str = "all") -> tuple[dict, Path]:
        model = self.model(target, at)
        if version not in model["versions"]:
            raise Refused(404, f"Version {version} not found")
        return model["versions"][version], self.cloud.root / "models" / "/".join(target) / version

    def shown(self, target: list[str], model: dict) -> dict:
        public = bool(model.get("guest"))
        terms = [model["license"] | {"needsAcceptance": not model.get("accepted")}] if model.get("license") else []
        return {"name": target[-1], "orgName": target[0], "teamName": target[1] if len(target) == 3 else "", "displayName": target[-1],
                "application": "LLM", "framework": "PyTorch", "modelFormat": "safetensors", "precision": "BF16", "shortDescription": "s",
                "description": model.get("description", "d"), "latestVersionIdStr": list(model["versions"])[-1], "isPublic": public,
                "canGuestDownload": public, "labels": [], "licenseTerms": terms, "createdDate": DATE, "updatedDate": DATE}  # fmt: skip

    def version_shown(self, target: list[str], version: str, facts: dict) -> dict:
        files = self.files(target, version)
        return {"versionId": version, "status": facts.get("status", "UPLOAD_COMPLETE"), "storageVersion": "V2",
                "totalFileCount": facts.get("count", len(files)), "totalSizeInBytes": sum(p.stat().st_size for p in files.values()),
                "isSigned": bool(facts.get("signed")), "malwareScanStatus": facts.get("scan", "CLEAN"), "createdDate": DATE}  # fmt: skip

    def files(self, target: list[str], version: str) -> dict[str, Path]:
        folder = self.cloud.root / "models" / "/".join(target) / version
        return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "result.sigstore"}

    def version(self, target: list[str], version: str, rest: list[str]) -> None:
        facts, folder = self.at_version(target, version, "files" if rest[:1] == ["files"] else "all")
        if not rest and "text" in facts:
            return self.reply(200, facts["text"].encode())
        if not rest:
            model = self.cloud.told()["models"]["/".join(target)]
            return self.say(model=self.shown(target, model), modelVersion=self.version_shown(target, version, facts))
        if rest == ["signature"]:
            if not facts.get("signed"):
                raise Refused(404, "not signed")
            return self.say(url=facts.get("urls", {}).get("result.sigstore") or self.cloud.ticket(folder / "result.sigstore"))
        if rest == ["files"]:
            return self.listing(target, version, facts)
        if rest[0] != "files" or rest[1:] == []:
            raise Refused(404, "no such route")
        path = "/".join(rest[1:])
        file = self.files(target, version).get(path)
        if file is None:
            raise Refused(404, f"{path} not found")
        if "Range" not in self.headers and path == "checksums.blake3":
            return self.send_file(file, flaws_of(facts, path))
        where = facts.get("redirect_file", {}).get(path) or self.cloud.ticket(file, flaws_of(facts, path))
        return self.reply(302, b"", {"Location": where})

    def listing(self, target: list[str], version: str, facts: dict) -> None:
        if facts.get("unlisted"):
            raise Refused(400, "Org contex missing")
        if facts.get("html"):
            return self.reply(200, b"<html><title>Sign in</title></html>", {"Content-Type": "text/html"})
        if facts.get("huge"):
            self.start(200, None, {})
            while True:
                self.wfile.write(b" " * SLICE)
                self.sent += SLICE
        entries = []
        for path, file in self.files(target, version).items():
            sha256 = base64.b64encode(bytes.fromhex(self.cloud.sha256(file))).decode()
            entry = {
                "path": path,
                "sizeInBytes": file.stat().st_size,
                "sha256_base64": None if facts.get("no_sha256") else sha256,
                "createdDate": DATE,
            }
            entries.append(entry | facts.get("lies", {}).get(path, {}))
        self.paged("modelFiles", entries + facts.get("nodes", []), facts, int(self.query.get("page-size", ["100"])[0]))

    def paged(self, name: str, entries: list, facts: dict, size: int, **more: list) -> None:
        size = min(size, facts.get("page", 1000))
        number = int(self.query.get("page-number", [str(facts.get("first_page", 0))])[0]) - facts.get("first_page", 0)
        if "pages" in facts.get("endless", []):
            entries = [{"path": f"{secrets.token_hex(8)}", "sizeInBytes": 1, "sha256_base64": None, "createdDate": DATE} for _ in range(size)]
            return self.say(**{name: entries}, paginationInfo=pages(10**9, size, number))
        lo = max(0, number * size - (1 if facts.get("overlap") else 0))
        cut = {key: values[lo : number * size + size] if number >= 0 else [] for key, values in ({name: entries} | more).items()}
        return self.say(**cut, paginationInfo=pages(facts.get("total", len(entries)), size, number))

    def urls(self, target: list[str], version: str) -> None:
        facts, _ = self.at_version(target, version, "files")
        if facts.get("unlisted") or facts.get("unsigned"):
            raise Refused(400, "Org contex missing")
        files, only = self.files(target, version), self.query.get("path", [""])[0]
        if only and only not in files:
            raise Refused(404, f"{only} not found")
        files = {only: files[only]} if only else files
        urls = [facts.get("urls", {}).get(path) or self.cloud.ticket(file, flaws_of(facts, path)) for path, file in files.items()]
        if only:
            return self.say(urls=urls, filepath=[only], paginationInfo=pages(1, 1, 0))
        return self.paged("urls", urls, facts, int(self.query.get("page-size", ["1000"])[0]), filepath=list(files))

    def search(self, parts: list[str]) -> None:
        """Model search, which finds by the id that the query names, with a * at its end or without."""
        asked = json.loads(self.query["q"][0])
        pattern = asked["query"].removeprefix("resourceId:")
        found = []
        for name, model in self.cloud.told()["models"].items():
            mine = model.get("guest") or (self.key and name.split("/")[0] == self.key["org"])
            if not mine or not re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name):
                continue
            target, public = name.split("/"), bool(model.get("guest"))
            attributes = [{"key": "latestVersionIdStr", "value": list(model["versions"])[-1]}]
            found.append({"resourceId": name, "name": target[-1], "displayName": target[-1], "orgName": target[0],
                          "teamName": target[1] if len(target) == 3 else "", "resourceType": "MODEL", "description": "d", "isPublic": public,
                          "guestAccess": public, "labels": [], "sharedWithOrgs": [], "sharedWithTeams": [], "attributes": attributes,
                          "dateCreated": DATE, "dateModified": DATE})  # fmt: skip
        groups = [{"groupValue": "MODEL", "totalCount": len(found), "resources": found}] if found else []
        return self.say(results=groups, resultTotal=len(found), resultPageTotal=1, params={"page": 0})

    # ---- images, as the API shows them

    def image(self, target: list[str], rest: list[str]) -> None:
        name, at = "/".join(target), {"name": target[-1], "orgName": target[0], "teamName": target[1] if len(target) == 3 else ""}
        folder = self.cloud.root / "images" / name
        if not (folder / "tags.json").exists():
            raise Refused(404, f"{name} not found")
        tags = json.loads((folder / "tags.json").read_text())

        def variant(tag: str) -> dict:
            return {"architecture": "amd64", "os": "linux", "digest": tags[tag], "imageSize": 10}

        if not rest:
            return self.say(
                **at,
                displayName=at["name"],
                latestTag=list(tags)[-1],
                latestImageSize=10,
                labels=[],
                isPublic=False,
                createdDate=DATE,
                updatedDate=DATE,
            )
        if len(rest) == 2 and rest[1] not in tags:
            raise Refused(404, f"{name}:{rest[1]} not found")
        if rest == ["images"]:
            images = [
                {"tag": t, "digest": d, "size": 10, "isSigned": False, "updatedDate": DATE, "architectureVariants": [variant(t)]}
                for t, d in tags.items()
            ]
            return self.say(images=images, paginationInfo=pages(len(images), 100, 0))
        if rest[0] == "images":
            return self.say(name=at["name"], tag=rest[1], architecture="amd64", fsLayers=[], schemaVersion=2)
        if rest[0] == "tags":
            return self.say(tag=rest[1], digest=tags[rest[1]], isSigned=False, architectureVariants=[variant(rest[1])])
        raise Refused(404, "no such route")


class Nvcr(Ngc):
    """nvcr.io: its challenge names neither service nor scope and its body is HTML; an expired token is sent to another realm, which is of no use."""

    host = "nvcr"

    def refuse(self, refused: Refused) -> None:
        if refused.status == 401 and refused.code == "HTML":
            return self.reply(401, b"<html><title>401</title></html>", refused.headers | {"Content-Type": "text/html"})
        body = json.dumps({"errors": [{"code": {404: "NAME_UNKNOWN", 401: "UNAUTHORIZED"}.get(refused.status, "DENIED"), "message": refused.words}]})
        return self.reply(refused.status, body.encode(), refused.headers)

    def challenge(self) -> Refused:
        return Refused(401, "", "HTML", WWW_Authenticate=f'Bearer realm="{self.cloud.places["nvcr"]}/proxy_auth"')

    def route(self) -> None:
        if self.parts == ["proxy_auth"]:
            return self.proxy_auth()
        if self.parts[:1] != ["v2"]:
            raise Refused(404, "not found")
        given = self.headers.get("Authorization", "")
        if not given.startswith("Bearer "):
            raise self.challenge()
        grant, until = self.cloud.tokens.get(given.removeprefix("Bearer "), ("", 0.0))
        if time.monotonic() > until:
            elsewhere = f'Bearer realm="{self.cloud.places["authn"]}/token",service="registry",error="invalid_token"'
            raise Refused(401, "token expired", WWW_Authenticate=elsewhere)
        if len(self.parts) == 1:
            return self.reply(200, b"{}")
        match = re.fullmatch(r"v2/(.+)/(manifests|blobs|referrers|tags)/([^/]+)", "/".join(self.parts))
        if not match or grant != f"nvcr {match[1]}":
            raise Refused(403, "Access Denied")
        return self.read(match[1], match[2], match[3])

    def proxy_auth(self) -> None:
        scope = re.fullmatch(r"repository:(.+):pull", self.query.get("scope", [""])[0])
        if not scope:
            raise Refused(401, "authentication required")
        told = self.cloud.told()
        image, key = told["images"].get(scope[1], {}), told["keys"].get(self.basic(), {})
        if "Authorization" in self.headers and (not key or key.get("revoked")):
            raise Refused(401, "authentication required")
        no = image.get("refuse", {})
        if no.get("at") == "token":
            raise Refused(no["status"], no.get("words", "refused"))
        if not key and not image.get("public"):
            raise Refused(403, "Forbidden")
        body = json.dumps({"token": self.cloud.token(f"nvcr {scope[1]}")} | ({"expires_in": image["life"]} if "life" in image else {}))
        return self.reply(200, body.encode(), {"Content-Type": "text/plain; charset=utf-8"})

    def read(self, repo: str, kind: str, ref: str) -> None:
        no = self.cloud.told()["images"].get(repo, {}).get("refuse", {})
        if no.get("at") == "manifest":
            raise Refused(no["status"], no.get("words", "Access Denied"))
        folder = self.cloud.root / "images" / repo
        tags = json.loads((folder / "tags.json").read_text()) if (folder / "tags.json").exists() else {}
        if kind == "tags":
            return self.reply(200, json.dumps({"name": repo, "tags": sorted(tags)}).encode())
        blob = folder / "blobs" / tags.get(ref, ref).removeprefix("sha256:")
        if kind == "referrers" or not re.fullmatch(r"[0-9a-f]{64}", blob.name) or not blob.is_file():
            raise Refused(404, "not found")
        if kind == "manifests":
            raw = blob.read_bytes()
            media = json.loads(raw).get("mediaType", INDEX)
            return self.reply(200, raw, {"Content-Type": media, "Docker-Content-Digest": f"sha256:{blob.name}"})
        if self.command == "HEAD":
            return self.send_file(blob)
        return self.reply(307, b"", {"Location": self.cloud.ticket(blob)})


def flaws_of(facts: dict, path: str) -> dict:
    """What is to go wrong with a file."""
    out = {name: True for name in ("endless", "encode", "unmarked", "rangeless", "busy") if path in facts.get(name, [])}
    out |= {"cut": facts["cut"][path]} if path in facts.get("cut", {}) else {}
    return out | ({"status": facts["strange"][path]} if path in facts.get("strange", {}) else {})


def pages(total: int, size: int, index: int) -> dict:
    return {"index": index, "size": size, "totalPages": max(1, -(-total // size)), "totalResults": total}


def main() -> None:
    """Starts the four hosts, prints where they are as one JSON line, and serves until it is killed."""
    options = argparse.ArgumentParser(description="a stand-in NGC")
    options.add_argument("--root", required=True)
    options.add_argument("--cert", default="")
    options.add_argument("--cert-key", default="")
    options.add_argument("--log", default="")
    options.add_argument("--token-life", type=float, default=900.0, help="seconds that a token lives")
    options.add_argument("--url-life", type=float, default=3600.0, help="seconds that a signed URL lives")
    options.add_argument("--throttle", type=int, default=0, help="bytes a second, all connections together")
    cloud = Cloud(options.parse_args())
    for host in (Api, Authn, Files, Nvcr):
        server = Server(0, host, cloud)
        if cloud.options.cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cloud.options.cert, cloud.options.cert_key)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        cloud.places[host.host] = f"http{'s' if cloud.options.cert else ''}://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps(cloud.places), flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
