"""Plays the start of a NIM container: reads its model manifest, takes the profile that is asked for, and fetches its files as the hub client does.

A program of its own that imports no project code. Its one argument is the model manifest (the shape with a list of profiles, as JSON).
What says where to fetch is the container's own environment:
  NGC_API_KEY or NGC_CLI_API_KEY, NGC_API_ENDPOINT, NGC_AUTH_ENDPOINT (host[:port][/prefix]), NGC_API_SCHEME, NIM_MODEL_PROFILE, NIM_CACHE_PATH,
  NIM_SDK_USE_NATIVE_TLS with SSL_CERT_FILE, NIM_REPOSITORY_OVERRIDE (https://…, jfrog://… and s3://BUCKET/, for which AWS_ACCESS_KEY_ID,
  AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL),
  NIM_MODEL_NAME or NIM_MODEL_PATH (a local model directory: nothing is fetched),
and which of the ways that clients of this family differ in: PLAY_PAGED (the listing is asked for by pages from 1), PLAY_TOKEN (the key is exchanged
whatever it looks like), PLAY_ENCODING (plain, once or twice: how an override spells the object), PLAY_STYLE (virtual or path: the bucket's place),
PLAY_HEAD (the object's head is asked for first). With PLAY_HOST every name that ends so is this machine, as the site's name server says.

Without a key it starts as a container of an air-gapped site does: from the cache alone, with the profile pinned. What it served from is printed as
JSON lines {"file", "path", "sha256"}. PLAY_WATCH makes any attempt to open a connection an error of its own.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import socket
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from blake3 import blake3

MAX_HOPS = 5
NO_KEY = "The requested operation requires an API key, but none was found"
BAD_KEY = "Authentication Error"
FORBIDDEN = (
    "Permission error: The requested operation requires permissions that the user does not have. "
    "This may be due to the user not being a member of the organization that owns the repo."
)


class Failed(Exception):
    """What the container prints before it ends."""


class Answer:
    """One answer, read whole."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes, url: str) -> None:
        self.status, self.headers, self.body, self.url = status, headers, body, url

    def told(self) -> str:
        """The words of a refusal, from the envelope that every NGC answer has."""
        try:
            return str(json.loads(self.body)["requestStatus"].get("statusDescription", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Failed(f"{self.url}: {self.status} without a requestStatus: {self.body[:200]!r}") from error

    def good(self) -> Answer:
        """The answer, where it is one; raises Failed with the words that users know."""
        if self.status in (200, 206):
            return self
        otherwise = f"HTTP status client error ({self.status} {http.client.responses.get(self.status, '')}) for url ({self.url})"
        words = {401: BAD_KEY, 403: FORBIDDEN}.get(self.status, otherwise)
        raise Failed(f"{words} [{self.told()}]")


class Nim:
    """One container."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.key = (environ.get("NGC_CLI_API_KEY") or environ.get("NGC_API_KEY", "")).strip()
        scheme = environ.get("NGC_API_SCHEME", "https")
        self.api = f"{scheme}://{environ.get('NGC_API_ENDPOINT', 'api.ngc.nvidia.com')}".rstrip("/")
        self.auth = f"{scheme}://{environ.get('NGC_AUTH_ENDPOINT', 'authn.nvidia.com')}".rstrip("/")
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the system's store a private authority is unknown
        if environ.get("NIM_SDK_USE_NATIVE_TLS") == "1":
            self.tls.load_verify_locations(environ["SSL_CERT_FILE"])
        self.tokens: dict[str, str] = {}
        self.filemaps: dict[str, dict[str, str]] = {}

    def fetch(self, url: str, bearer: str = "", basic: str = "") -> Answer:
        """GET with redirects, of which one to another host never gets the key along."""
        headers = {"Authorization": f"Bearer {bearer}" if bearer else f"Basic {basic}"} if bearer or basic else {}
        for _ in range(MAX_HOPS):
            at = urlsplit(url)
            kind: Any = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
            connection = kind(at.netloc, timeout=60, **({"context": self.tls} if at.scheme == "https" else {}))
            try:
                connection.request("GET", (at.path or "/") + (f"?{at.query}" if at.query else ""), headers=headers)
                answer = connection.getresponse()
                got = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read(), url)
            except ssl.SSLCertVerificationError as error:
                raise Failed(f"invalid peer certificate: UnknownIssuer for url ({url})") from error
            except OSError as error:
                raise Failed(f"error sending request for url ({url}): {error}") from error
            finally:
                connection.close()
            if got.status not in (301, 302, 303, 307, 308):
                return got
            url = urljoin(url, got.headers["location"])
            if urlsplit(url).netloc != at.netloc:
                headers = {}
        raise Failed(f"too many redirects for url ({url})")

    def bearer(self, org: str, team: str) -> str:
        """The key itself, or for one of the older kind what the auth host gives for it."""
        if not self.key:
            raise Failed(NO_KEY)
        if self.key.startswith("nvapi-") and not self.environ.get("PLAY_TOKEN"):
            return self.key
        scope = f"group/ngc:{org}{f'/{team}' if team else ''}"
        if scope not in self.tokens:
            basic = base64.b64encode(f"$oauthtoken:{self.key}".encode()).decode()
            got = self.fetch(f"{self.auth}/token?service=ngc&scope={quote(scope, safe='')}", basic=basic).good()
            self.tokens[scope] = json.loads(got.body)["token"]
        return self.tokens[scope]

    def filemap(self, name: str, version: str) -> dict[str, str]:
        """Path to URL of a version's files; a URL of the fallback needs the key, and begins with the API's own address."""
        if f"{name}:{version}" not in self.filemaps:
            self.filemaps[f"{name}:{version}"] = self._filemap(name, version)
        return self.filemaps[f"{name}:{version}"]

    def _filemap(self, name: str, version: str) -> dict[str, str]:
        org, *team, model = name.split("/")
        base = f"{self.api}/v2/org/{org}{f'/team/{team[0]}' if team else ''}/models/{model}"
        bearer, out, page = self.bearer(org, team[0] if team else ""), dict[str, str](), 1
        print(f"fetching filemap from: {base}/{version}/files", flush=True)
        while True:
            paged = f"?page-size=500&page-number={page}" if self.environ.get("PLAY_PAGED") else ""
            got = self.fetch(f"{base}/{quote(version)}/files{paged}", bearer)
            if got.status in (400, 401) and self.environ.get("PLAY_PAGED"):
                return self._fallback(f"{base}/versions/{quote(version)}/files", bearer)
            doc = json.loads(got.good().body)
            if doc["requestStatus"]["statusCode"] != "SUCCESS" or len(doc["urls"]) != len(doc["filepath"]) or not doc["urls"]:
                raise Failed(f"the filemap of {name}:{version} is not usable: {got.body[:200]!r}")
            out |= dict(zip(doc["filepath"], doc["urls"], strict=True))
            if not paged or page >= doc["paginationInfo"]["totalPages"]:
                return out
            page += 1

    def _fallback(self, base: str, bearer: str) -> dict[str, str]:
        """The files that checksums.blake3 lists, each by its own URL, which is built without escaping what is in the path."""
        lines = self.fetch(f"{base}/checksums.blake3", bearer).good().body.decode().splitlines()
        return {path: f"{base}/{quote(path, safe='/%')}" for _, _, path in (line.partition("  ") for line in lines)}

    def bucket(self, place: str, uri: str) -> bytes:
        """An object by NIM_REPOSITORY_OVERRIDE=s3://BUCKET/: its key is all after ngc://, percent-encoded whole."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        style = self.environ.get("PLAY_STYLE", "virtual")
        config = Config(signature_version="s3v4", s3={"addressing_style": style}, retries={"max_attempts": 1})
        trusted = self.environ["SSL_CERT_FILE"] if self.environ.get("NIM_SDK_USE_NATIVE_TLS") == "1" else None
        client = boto3.client("s3", region_name=self.environ.get("AWS_REGION", "us-east-1"), config=config, verify=trusted)
        wanted = {"Bucket": urlsplit(place).netloc, "Key": quote(uri.removeprefix("ngc://"), safe="")}
        try:
            if self.environ.get("PLAY_HEAD"):
                client.head_object(**wanted)
            return bytes(client.get_object(**wanted)["Body"].read())
        except (ClientError, BotoCoreError) as error:
            raise Failed(f"error fetching {place}{wanted['Key']}: {error}") from error

    def overridden(self, place: str, uri: str) -> Answer:
        """An object by NIM_REPOSITORY_OVERRIDE, its key being all after ngc://, spelled in one of the three known ways."""
        key, way = uri.removeprefix("ngc://"), self.environ.get("PLAY_ENCODING", "once")
        once = quote(key, safe="")
        spelled = {"plain": key, "once": once, "twice": quote(once, safe="")}[way]
        return self.fetch(f"{place.replace('jfrog://', 'https://', 1).rstrip('/')}/{spelled}", self.key)

    def file(self, uri: str) -> bytes:
        """The bytes of ngc://org/team/model:version?file=path."""
        place = self.environ.get("NIM_REPOSITORY_OVERRIDE", "")
        if place.startswith("s3://"):
            return self.bucket(place, uri)
        if place:
            return self.overridden(place, uri).good().body
        target, _, path = uri.removeprefix("ngc://").partition("?file=")
        name, _, version = target.partition(":")
        urls = self.filemap(name, version)
        if path not in urls:
            raise Failed(f"{uri} is not in the filemap")
        own = urls[path].startswith(f"{self.api}/v2/")
        org, *team, _ = name.split("/")
        return self.fetch(urls[path], self.bearer(org, team[0] if team else "") if own else "").good().body

    def place(self, uri: str) -> Path:
        """Where the cache has a file of ngc://org/team/model:version?file=path, or of the Hub's like, by the layout of each hub client."""
        scheme, _, rest = uri.partition("://")
        target, _, path = rest.partition("?file=")
        name, _, version = target.partition(":")
        hub = Path(self.environ["NIM_CACHE_PATH"]) / ("ngc" if scheme == "ngc" else "huggingface") / "hub"
        repo = hub / f"models--{name.replace('/', '--')}"
        reference = repo / "refs" / version
        if scheme == "hf" and reference.is_file():
            version = reference.read_text()
        return repo / "snapshots" / version / path

    def offline(self, profile: Mapping[str, Any]) -> None:
        """Takes each file from the cache; what is not there would have to be asked for, and nobody may be asked without a key."""
        errors = []
        for inside, entry in sorted(profile["workspace"]["files"].items()):
            at = self.place(entry["uri"])
            repo = at.parents[len(entry["uri"].partition("?file=")[2].split("/")) + 1]
            try:
                inode = at.resolve(strict=True)
                raw = inode.read_bytes()
            except OSError as error:
                errors.append(f"{entry['uri']}: {error.strerror}: {NO_KEY}")
                continue
            if not at.is_symlink() or inode.parent != (repo / "blobs").resolve() or Path(at.readlink()).is_absolute():
                errors.append(f"{entry['uri']}: {at} is no link into the blobs of its model")
            if "checksum" in entry and blake3(raw).hexdigest() != entry["checksum"]:
                errors.append(f"checksum mismatch of {entry['uri']}")
            print(f"INFO File: {inside} found in cache: {json.dumps(str(at))}")
            print(json.dumps({"file": inside, "path": str(at), "sha256": hashlib.sha256(raw).hexdigest()}))
        if errors:
            raise Failed("One or more errors fetching files:\n" + "\n".join(errors))

    def local(self, folder: Path, profile: Mapping[str, Any] | None) -> None:
        """Serves a model directory in place; the profile, where one is pinned, says which files must be there."""
        if not folder.is_absolute() or not folder.is_dir():
            raise Failed(f"{folder} is no model directory")
        found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        lacking = sorted(set(profile["workspace"]["files"]) - set(found)) if profile else []
        if lacking or not found:
            raise Failed(f"{folder} is without {', '.join(lacking) or 'any file'}")
        for inside, path in sorted(found.items()):
            print(json.dumps({"file": inside, "path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))

    def run(self, manifest: Mapping[str, Any]) -> None:
        """Fetches the chosen profile into the cache, or starts from what is there; raises Failed."""
        wanted = self.environ.get("NIM_MODEL_PROFILE", "")
        profile = next((p for p in manifest["profiles"] if p["id"] == wanted), None)
        folder = self.environ.get("NIM_MODEL_PATH") or self.environ.get("NIM_MODEL_NAME", "")
        if folder.startswith("/"):
            return self.local(Path(folder), profile)
        if profile is None:
            raise Failed("Could not match a profile in manifest")
        if not self.key and not self.environ.get("NIM_REPOSITORY_OVERRIDE") and (Path(self.environ["NIM_CACHE_PATH"]) / "ngc").is_dir():
            return self.offline(profile)
        return self.download(profile)

    def download(self, profile: Mapping[str, Any]) -> None:
        """Fetches every file of a profile; raises Failed with all that went wrong."""
        errors = []
        for _, entry in sorted(profile["workspace"]["files"].items()):
            uri = entry["uri"]
            try:
                raw = self.file(uri)
                if "checksum" in entry and blake3(raw).hexdigest() != entry["checksum"]:
                    raise Failed(f"checksum mismatch of {uri}")
            except Failed as error:
                errors.append(str(error))
                continue
            into = self.place(uri)
            into.parent.mkdir(parents=True, exist_ok=True)
            into.write_bytes(raw)
        if errors:
            raise Failed("One or more errors fetching files:\n" + "\n".join(errors))


def watched(*_: object, **__: object) -> Any:
    """Takes the place of every way to a connection."""
    raise RuntimeError("a connection was opened")


def _name_server(domain: str) -> None:
    """Every name below a domain is this machine, as the site's name server says."""
    real = socket.getaddrinfo

    def find(host: Any, *args: Any, **more: Any) -> Any:
        return real("127.0.0.1" if isinstance(host, str) and host.endswith(domain) else host, *args, **more)

    socket.getaddrinfo = find


def main() -> int:
    """The container's exit status."""
    if os.environ.get("PLAY_WATCH"):
        socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = watched  # type: ignore[assignment, method-assign]
    if domain := os.environ.get("PLAY_HOST"):
        _name_server(domain)
    try:
        Nim(os.environ).run(json.loads(Path(sys.argv[1]).read_text()))
    except Failed as error:
        print(f"Download failed after 1 attempts. Last exception: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
