"""Plays NVIDIA's ModelExpress fetching a model from NGC: the requests that its source makes, in their order, and what it does with the answers.

A program of its own that imports no project code, written after reading modelexpress_common/src/providers/ngc.rs of github.com/ai-dynamo/modelexpress
(commit 3db6bdc4). Arguments: the model's name and the folder of its cache. The environment is ModelExpress's own: NGC_API_ENDPOINT, NGC_AUTH_ENDPOINT
(whole URLs), NGC_API_KEY, NGC_CLI_API_KEY; SSL_CERT_FILE. PLAY_BLOCKED=1: the listing counts as refused, as for an organisation that gates it.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlencode, urljoin, urlsplit

PAGE = 500
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".ico", ".bmp", ".tiff", ".tif"}


class Failed(Exception):
    """What the client ends with."""


@dataclass(frozen=True)
class Artifact:
    """A name in one of its spellings."""

    org: str
    team: str
    kind: str
    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Artifact:
        """`org/name/version`, `org/team/name/version`, `org/team/kind/name/version`, `ngc://org/team/name:version`."""
        parts = text.strip().removeprefix("ngc://").split("/")
        if {".", ".."} & set(parts):
            raise Failed("a segment is . or ..")
        if len(parts) == 3 and ":" in parts[2]:
            name, _, version = parts[2].partition(":")
            return cls(parts[0], parts[1], "models", name, version)
        if len(parts) == 3:
            return cls(parts[0], "", "models", parts[1], parts[2])
        if len(parts) == 4:
            return cls(parts[0], parts[1], "models", parts[2], parts[3])
        if len(parts) == 5:
            return cls(*parts)
        raise Failed(f"{text} is no name of NGC")

    @property
    def path(self) -> str:
        team = f"/team/{self.team}" if self.team else ""
        return f"/v2/org/{self.org}{team}/{self.kind}/{self.name}"

    def folder(self, root: Path) -> Path:
        return root.joinpath("ngc", self.org, *filter(None, [self.team]), self.kind, self.name, self.version)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


class ModelExpress:
    """One run."""

    def __init__(self, artifact: Artifact, environ: dict[str, str]) -> None:
        self.artifact = artifact
        self.api = environ.get("NGC_API_ENDPOINT", "https://api.ngc.nvidia.com")  # a slash at its end stays, as there
        self.auth = environ.get("NGC_AUTH_ENDPOINT", "https://authn.nvidia.com")
        self.key = next((environ[n].strip() for n in ("NGC_API_KEY", "NGC_CLI_API_KEY") if environ.get(n, "").strip()), "")
        self.blocked = environ.get("PLAY_BLOCKED") == "1"
        context = ssl.create_default_context(cafile=environ.get("SSL_CERT_FILE"))
        self.open = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _Stay(), urllib.request.ProxyHandler({})).open

    def get(self, url: str, authorization: str = "") -> tuple[int, bytes]:
        """GET that follows redirects, and takes the key to no other host."""
        for _ in range(10):
            request = urllib.request.Request(url, headers={"Accept": "*/*", **({"Authorization": authorization} if authorization else {})})
            try:
                with self.open(request, timeout=60) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                target = error.headers.get("Location", "")
                if error.code not in (301, 302, 303, 307, 308) or not target:
                    return error.code, error.read()
                there = urljoin(url, target)
                authorization = authorization if urlsplit(there).netloc == urlsplit(url).netloc else ""
                url = there
        raise Failed("too many redirects")

    def token(self) -> str:
        """A key of the nvapi- kind is its own token; another is exchanged."""
        if not self.key:
            raise Failed("NGC API key not set")
        if self.key.startswith("nvapi-"):
            return self.key
        scope = f"group/ngc:{self.artifact.org}" + (f"/{self.artifact.team}" if self.artifact.team else "")
        basic = base64.b64encode(f"$oauthtoken:{self.key}".encode()).decode()
        status, body = self.get(f"{self.auth}/token?{urlencode({'service': 'ngc', 'scope': scope})}", f"Basic {basic}")
        if not 200 <= status < 300:
            raise Failed(f"NGC token endpoint returned {status}")
        return str(json.loads(body)["token"])

    def listed(self, bearer: str) -> tuple[list[tuple[str, str]], bool]:
        """URL and path of each file, and whether the URLs want the key: those of the second way do."""
        out: list[tuple[str, str]] = []
        page = 1
        while not self.blocked:
            query = f"page-size={PAGE}&page-number={page}"
            status, body = self.get(f"{self.api}{self.artifact.path}/{self.artifact.version}/files?{query}", bearer)
            if status in (400, 401):
                break
            if not 200 <= status < 300:
                raise Failed(f"NGC API returned {status}: {body.decode()}")
            doc = json.loads(body)
            if (doc.get("requestStatus") or {}).get("statusCode", "SUCCESS") != "SUCCESS":
                raise Failed(f"NGC API error ({doc['requestStatus']['statusCode']})")
            urls, paths = doc.get("urls") or [], doc.get("filepath") or []
            if len(urls) != len(paths):
                raise Failed("mismatched url/filepath counts")
            out += zip(urls, paths, strict=True)
            if page >= ((doc.get("paginationInfo") or {}).get("totalPages") or 1):
                if not out:
                    raise Failed("NGC artifact has no files")
                return out, False
            page += 1
        base = f"{self.api}{self.artifact.path}/versions/{self.artifact.version}/files"
        status, body = self.get(f"{base}/checksums.blake3", bearer)
        if not 200 <= status < 300:
            raise Failed(f"NGC checksum manifest unavailable ({status})")
        found = [line.strip().split("  ", 1)[1].strip() for line in body.decode().splitlines() if "  " in line.strip()]
        if not found:
            raise Failed("NGC checksum manifest is empty")
        return [(f"{base}/{path}", path) for path in found], True  # paths go into the URL as they are

    def download(self, root: Path) -> int:
        """Fetches what is wanted and not there yet; how many files the model has then."""
        bearer = f"Bearer {self.token()}"
        files, keyed = self.listed(bearer)
        folder = self.artifact.folder(root)

        def one(url: str, path: str) -> None:
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            status, body = self.get(url, bearer if keyed else "")
            if not 200 <= status < 300:
                raise Failed(f"Failed to download {path}: HTTP {status}")
            partial = place.with_suffix(".tmp")
            partial.write_bytes(body)
            partial.rename(place)

        wanted = [(url, path) for url, path in files if _wanted(path) and not (folder / path).exists()]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda file: one(*file), wanted))
        return len(list(_present(folder)))


def _wanted(path: str) -> bool:
    name = PurePosixPath(path).name
    return not name.startswith(".") and name != "README.md" and PurePosixPath(path).suffix.lower() not in PICTURES


def _present(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_file())


if __name__ == "__main__":
    try:
        print("files", ModelExpress(Artifact.parse(sys.argv[1]), dict(os.environ)).download(Path(sys.argv[2])))
    except Failed as error:
        sys.exit(f"error: {error}")
