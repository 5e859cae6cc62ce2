"""A licence that nobody accepted and a block by the law, as each door tells them: the same decision, in each protocol's form."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import pytest

from artifact.upstream import check_fact
from registry import tables as t
from registry.settings import Settings
from registry.wiring import open_site
from tests.conftest import airlock
from tests.contracts.doors import sha
from tests.contracts.ngc import FILES, MIRRORED
from tests.contracts.s3 import S3Door, door, signed

pytestmark = pytest.mark.server
__all__ = ["door"]  # a fixture
LICENSE, WHO, CONFIG = "NVIDIA AI Product Agreement", "Ada Lovelace <ada@example.org>", FILES["config.json"]


@pytest.fixture(autouse=True)
def free(door: S3Door) -> Iterator[None]:
    yield
    say(door, license="", blocked="")


def say(door: S3Door, status: int = 200, who: str = "root", name: str = MIRRORED, **body: Any) -> dict[str, Any]:
    done = door.main.ask("POST", "/airlock/v1/terms", json.dumps({"name": name, **body}), who)
    assert done.status == status, done.body
    return dict(done.json())


def told(door: S3Door) -> dict[str, tuple[int, str, str]]:
    """What each door says of the same model to the same key: status, code, words; the file that it gives, where it does, is that one."""
    out: dict[str, tuple[int, str, str]] = {}
    given: list[bytes] = []
    for kind, path in (("oci", "manifests/fp16"), ("oci blob", f"blobs/{sha(CONFIG)}")):
        oci = door.main.ask("GET", f"/v2/{MIRRORED}/{path}", None, "low")
        out[kind] = (oci.status, oci.code, oci.json()["errors"][0]["message"]) if oci.status != 200 else (200, "", "")
    given.append(oci.body)
    for kind, method in (("hub", "HEAD"), ("hub file", "GET")):
        hub = door.main.ask(method, f"/{MIRRORED}/resolve/fp16/config.json", None, "low")
        out[kind] = hub.status, hub.headers.get("x-error-code", ""), hub.headers.get("x-error-message", "")
    given.append(hub.body)
    for kind, path in (("ngc", "fp16/files"), ("ngc file", "versions/fp16/files/config.json")):
        ngc = door.ngc.ask("GET", f"/v2/org/nim/team/meta/models/llama/{path}", None, "low")
        status = ngc.json()["requestStatus"] if ngc.status != 200 else {"statusCode": "", "statusDescription": ""}
        out[kind] = ngc.status, status["statusCode"], status["statusDescription"]
    given.append(ngc.body)
    s3 = door.ask("GET", signed(door, url=60)[0])
    error = ET.fromstring(s3.body if s3.status != 200 else b"<Error><Code/><Message/></Error>")
    out["s3"] = s3.status, error.findtext("Code", ""), error.findtext("Message", "")
    given.append(s3.body)
    assert [raw == CONFIG for raw in given] == [out[kind][0] == 200 for kind in ("oci blob", "hub file", "ngc file", "s3")]
    return out


def codes(found: dict[str, tuple[int, str, str]]) -> dict[str, tuple[int, str]]:
    return {kind: answer[:2] for kind, answer in found.items()}


def shut(ngc: int) -> dict[str, tuple[int, str]]:
    """The refusal at every door, for which NGC has a status of its own."""
    hub, own = (403, "GatedRepo"), (ngc, "FORBIDDEN")
    denied = {"oci": (403, "DENIED"), "oci blob": (403, "DENIED"), "s3": (403, "AccessDenied")}
    return denied | {"hub": hub, "hub file": hub, "ngc": own, "ngc file": own}


OPEN = dict.fromkeys(shut(0), (200, ""))


def test_a_licence_that_nobody_accepted(door: S3Door) -> None:
    assert codes(told(door)) == OPEN
    assert say(door, license=LICENSE)["accepted_by"] == ""
    found = told(door)
    assert codes(found) == shut(412)
    assert all(LICENSE in words and "--accepted-by" in words for _, _, words in found.values()), found
    row = door.main.ask("GET", f"/airlock/v1/catalog/{MIRRORED}", None, "low").json()
    assert (row["entitled"], row["reason"], row["unaccepted"]) == (False, "license_unaccepted", LICENSE)
    accepted = say(door, accepted_by=WHO)
    assert accepted["accepted_by"] == WHO and accepted["accepted_at"] > 0 and codes(told(door)) == OPEN
    say(door, license="another licence")
    assert codes(told(door)) == shut(412), "what was accepted was the other one"


def test_a_block_by_the_law(door: S3Door) -> None:
    ticket = door.ngc.get("/v2/org/nim/team/meta/models/llama/fp16/files", "low")["urls"][0]
    say(door, license=LICENSE, accepted_by=WHO, blocked="export control: not for region X")
    found = told(door)
    assert codes(found) == shut(451) and all("export control: not for region X" in words for _, _, words in found.values()), found
    assert door.ngc.bytes_of(ticket).status == 451, "a URL that was given before ends too"
    assert door.main.ask("GET", f"/v2/{MIRRORED}/manifests/fp16", None, "root").status == 403, "nobody reads it, its administrator neither"
    listed = door.client("low").list_objects_v2(Bucket="models", Prefix=MIRRORED)
    assert listed["KeyCount"] == 0
    hidden = door.ngc.ask("GET", "/v2/org/nim/team/meta/models/llama", None, "other")
    assert hidden.status == 404, "who may not see the name is not told that it is blocked"
    say(door, blocked="")
    assert codes(told(door)) == OPEN


def test_what_a_bundle_told_of_an_acceptance_counts(door: S3Door) -> None:
    fact = {"name": MIRRORED, "ref": "fp16", "digest": "sha256:" + "0" * 64, "license": LICENSE, "accepted_by": WHO, "accepted_at": 1_700_000_000}
    with open_site(Settings.load(door.main.data, environ=dict(os.environ)), background=False) as site, site.catalog.writing() as conn:
        conn.execute(t.upstream_record.insert().values(**vars(check_fact(fact)), sender="s", sequence=1, at=1.0))
    assert say(door, license=LICENSE) == {"name": MIRRORED, "license": LICENSE, "accepted_by": WHO, "blocked": "", "accepted_at": 1_700_000_000}
    assert codes(told(door)) == OPEN


def test_who_may_say_so_and_what_is_recorded(door: S3Door) -> None:
    for who, status in (("low", 403), ("acme", 404), ("other", 404)):
        say(door, status, who, license=LICENSE)
    say(door, 404, name="no/such", license=LICENSE)
    own = say(door, who="acme", name="acme/open/free", license=LICENSE)
    assert own["license"] == LICENSE, "an organisation's own name is its administrator's"
    say(door, who="acme", name="acme/open/free", license="")
    for words in ("a court", ""):
        say(door, 403, who="acme", name="acme/open/free", blocked=words)
    assert say(door, name="acme/open/free", blocked="a court")["blocked"] == "a court"
    say(door, 403, who="acme", name="acme/open/free", license="", blocked="")
    say(door, name="acme/open/free", blocked="")
    say(door, 400, accepted_by=WHO)
    for bad in ({"license": 1}, {"license": "x" * 201}, {"blocked": "a\nb"}, {"accepted_by": None}):
        say(door, 400, **bad)
    say(door, license=LICENSE, accepted_by=WHO)
    rows = door.main.ask("GET", "/airlock/v1/audit?limit=1000", None, "root").json()["items"]
    mine = [row for row in rows if row["event"] == "terms" and row["ref"] == MIRRORED]
    assert (mine[-1]["license"], mine[-1]["license_by"], mine[-1]["before_license"]) == (LICENSE, WHO, "")


def test_a_profile_is_under_the_terms_of_its_model(door: S3Door) -> None:
    door.main.image(f"{MIRRORED}/profiles", "fp16", [b"a profile"], "root")
    say(door, blocked="a court")
    assert door.main.ask("GET", f"/v2/{MIRRORED}/profiles/manifests/fp16", None, "root").status == 403
    say(door, blocked="")
    assert door.main.ask("GET", f"/v2/{MIRRORED}/profiles/manifests/fp16", None, "root").status == 200


def test_the_command(door: S3Door) -> None:
    env = {"AIRLOCK_REGISTRY": door.main.url, "AIRLOCK_KEY": door.main.keys["root"]}
    said = airlock("catalog", "terms", MIRRORED, "--license", "another licence", **env).stdout
    assert said == f"{MIRRORED}: licence another licence, not accepted: nobody reads it\n"
    assert f"accepted by {WHO}" in airlock("catalog", "terms", MIRRORED, "--accepted-by", WHO, **env).stdout
    assert "blocked: a court" in airlock("catalog", "terms", MIRRORED, "--block", "a court", **env).stdout
    assert "blocked:    a court" in airlock("catalog", "show", MIRRORED, **env).stdout
    assert "blocked" not in airlock("catalog", "terms", MIRRORED, "--unblock", **env).stdout
    assert airlock("catalog", "terms", MIRRORED, check=False, **env).returncode == 6
