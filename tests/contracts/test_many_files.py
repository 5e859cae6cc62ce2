"""As many files as a model may have, and one more, pushed at the OCI door of a real process."""

from __future__ import annotations

import json

import pytest

from artifact.manifest import FACTS_TYPE, build_model, canonical_json, digest_of
from artifact.store import Descriptor, File
from tests.contracts.doors import MANIFEST, Door, sha

pytestmark = [pytest.mark.server, pytest.mark.slow]
MOST = 10_000  # docs/format.md section 3


def manifest(count: int) -> bytes:
    """A model of that many small files with the same bytes: what `build_model` makes of the most, and files put in beside them by hand."""
    facts = canonical_json({"schema": 1})
    files = [File(f"d{n % 100:02}/f{n:05}.json", digest_of(b"{}"), 2) for n in range(MOST)]
    doc = json.loads(build_model(files, Descriptor(FACTS_TYPE, digest_of(facts), len(facts)), {}))
    for n in range(MOST, count):
        layer, title = dict(doc["layers"][0]), f"f{n:05}.json"
        layer["annotations"] = dict.fromkeys(layer["annotations"], title)
        doc["layers"].insert(-1, layer)
    return json.dumps(doc, separators=(",", ":")).encode()


def test_ten_thousand_files_are_kept_and_one_more_is_refused(door: Door) -> None:
    facts = canonical_json({"schema": 1})
    for name in ("acme/most", "acme/toomany"):
        for raw in (facts, b"{}"):
            door.blob(name, raw)
    whole, more = manifest(MOST), manifest(MOST + 1)
    done = door.ask("PUT", "/v2/acme/most/manifests/1", whole, Content_Type=MANIFEST)
    assert (done.status, done.headers["docker-content-digest"]) == (201, sha(whole)), done.body
    refused = door.ask("PUT", "/v2/acme/toomany/manifests/1", more, Content_Type=MANIFEST)
    assert (refused.status, refused.code) == (400, "MANIFEST_INVALID"), refused.body
    error = refused.json()["errors"][0]
    assert str(MOST + 1) in error["message"] and str(MOST) in error["message"].replace(str(MOST + 1), "") and error["detail"]["reason"] == "files"

    assert door.ask("GET", "/v2/acme/most/manifests/1").body == whole
    listed, url = 0, "/api/models/acme/most/tree/1?recursive=true"
    while url:
        page = door.ask("GET", url)
        listed += sum(node["type"] == "file" for node in page.json())
        url = page.headers.get("link", "").partition(">")[0].removeprefix(f"<{door.url}")
    assert listed == MOST and door.ask("GET", "/acme/most/resolve/1/d99/f09999.json").body == b"{}"
    assert door.ask("GET", f"/v2/acme/toomany/manifests/{sha(more)}").status == 404, "nothing of it is kept"
    assert door.ask("GET", "/v2/acme/toomany/tags/list").json()["tags"] == []
