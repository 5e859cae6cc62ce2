"""Documents in the bundle's index: carried by the mirror, taken in with the names, refused one by one, and a bad signature that refuses all."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from artifact import documents as d
from artifact import medium, trust
from artifact.errors import Conflict, Invalid, Mismatch, NotFound
from artifact.manifest import canonical_json
from mirror import documents
from mirror.commands.document import main
from mirror.home import MirrorHome
from mirror.pack import pack
from registry import tables as t
from registry.home import Home
from registry.importer import import_bundle
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.unit.test_bundle import NOW, audit_rows, located, stage_model
from tests.unit.test_documents import REVOKED, RIGHTS

KEY = trust.generate_key()
PEM = trust.public_pem(KEY)


@pytest.fixture
def mirror(tmp_path: Path) -> MirrorHome:
    home = MirrorHome.init(tmp_path / "mirror")
    stage_model(home, "hf/acme/m", "main", {"w.safetensors": b"w" * 1000})
    return home


@pytest.fixture
def site(tmp_path: Path, mirror: MirrorHome) -> Iterator[Site]:
    home = Home.open(tmp_path / "site", create=True)
    home.pin_root(mirror.root)
    home.pin_issuer(PEM, trust.spki_sha256(PEM).hex())
    with open_site(Settings(tmp_path / "site"), background=False) as opened:
        yield opened


def licence(site: Site, serial: int, key: bytes = KEY, **change: Any) -> str:
    claims = d.entitlement_claims("vendor", site.home.instance, "acme", serial, NOW - 60, RIGHTS, NOW - 60, NOW + 86400) | change
    return d.sign(key, d.ENTITLEMENT, claims).head.token


def revoking(serial: int, **revoked: list[str]) -> str:
    return d.sign(KEY, d.REVOCATIONS, d.revocation_claims("vendor", serial, NOW - 60, revoked, None, NOW + 86400)).head.token


def carried(mirror: MirrorHome, to: Path, *tokens: str) -> Path:
    """A bundle with exactly these documents."""
    for found in documents.listed(mirror):
        documents.remove(mirror, found.head.jti)
    for token in tokens:
        documents.add(mirror, d.armour(token, d.unverified(token).head.kind))
    assert pack(mirror, to, NOW)["documents"] == len(tokens)
    return to


def serials(site: Site) -> list[int]:
    with site.catalog.reading() as conn:
        return list(conn.execute(select(t.entitlement.c.serial).order_by(t.entitlement.c.serial)).scalars())


def told(report: dict[str, object]) -> list[tuple[object, object, object]]:
    found = report["documents"]
    assert isinstance(found, list)
    return [(one["document"], one.get("serial"), one.get("reason", one["state"])) for one in found]


def test_documents_come_in_with_the_names(site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    eight, seven, listed = licence(site, 8), licence(site, 7), revoking(3, **REVOKED)
    disk = carried(mirror, tmp_path / "disk", eight, listed, seven)
    report = import_bundle(site, disk, NOW)
    assert told(report) == [("revocations", 3, "applied"), ("entitlement", 7, "applied"), ("entitlement", 8, "applied")]
    assert serials(site) == [7, 8] and site.documents.revocation_serial() == 3 and located(site, "hf/acme/m", "main")
    assert [row["source"] for row in audit_rows(site, "entitlement_import")] == [f"bundle {mirror.id}/1"] * 2
    receipt = json.loads((disk / "receipt.json").read_text())
    said = trust.verify_jws(receipt["receipt"], "receipt+jwt", site.home.site_trust().release_keys, NOW)
    assert said["documents"] == {"taken": 3, "refused": []}
    again = import_bundle(site, disk, NOW)
    assert not again["imported"] and [state for _, _, state in told(again)] == ["known"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "moves"), [(3600, True), (40 * 86400, False)])
def test_the_floor_follows_a_senders_time_but_not_a_wrong_clock(site: Site, mirror: MirrorHome, tmp_path: Path, ahead: int, moves: bool) -> None:
    now = time.time()
    pack(mirror, tmp_path / "disk", now + ahead)
    assert import_bundle(site, tmp_path / "disk", now)["imported"]
    assert (site.floor.at == int(now + ahead)) is moves and site.floor.at < now + 86400


def test_a_refused_document_is_told_and_stops_nothing_else(site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    other = trust.generate_key()
    unknown, foreign, good = licence(site, 9, key=other), licence(site, 2, aud="another"), licence(site, 1)
    revoked = licence(site, 3)
    disk = carried(mirror, tmp_path / "disk", unknown, foreign, good, revoked, revoking(1, jti=[d.unverified(revoked).head.jti]))
    report = import_bundle(site, disk, NOW)
    assert report["imported"] and located(site, "hf/acme/m", "main") and serials(site) == [1]
    reasons = sorted(str(reason) for _, _, reason in told(report))
    assert reasons == ["applied", "applied", "audience", "issuer_unknown", "revoked"]
    assert sorted(str(row["reason"]) for row in audit_rows(site, "document_refused")) == ["audience", "issuer_unknown", "revoked"]
    receipt = json.loads((disk / "receipt.json").read_text())
    said = trust.verify_jws(receipt["receipt"], "receipt+jwt", site.home.site_trust().release_keys, NOW)
    assert isinstance(said["documents"], dict) and said["documents"]["taken"] == 2 and len(said["documents"]["refused"]) == 3
    pem = trust.public_pem(other)
    site.home.pin_issuer(pem, trust.spki_sha256(pem).hex())
    again = import_bundle(site, disk, NOW)
    assert not again["imported"] and serials(site) == [1, 9], "the same bundle once more, its issuer pinned meanwhile"


@pytest.mark.slow
def test_an_altered_document_refuses_the_whole_bundle(site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    token = licence(site, 1)
    altered = token[:-10] + ("A" if token[-10] != "A" else "B") + token[-9:]
    disk = carried(mirror, tmp_path / "disk", altered)
    with pytest.raises(Mismatch) as caught:
        import_bundle(site, disk, NOW)
    assert caught.value.reason == "signature" and serials(site) == [] and not located(site, "hf/acme/m", "main")
    assert import_bundle(site, carried(mirror, tmp_path / "next", token), NOW)["imported"] and serials(site) == [1]


def test_older_bundles_bring_documents_by_their_serials(site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    old = carried(mirror, tmp_path / "old", licence(site, 7), revoking(1))
    new = carried(mirror, tmp_path / "new", licence(site, 8))
    assert told(import_bundle(site, new, NOW)) == [("entitlement", 8, "applied")]
    report = import_bundle(site, old, NOW)
    assert report["older"] and told(report) == [("revocations", 1, "applied"), ("entitlement", 7, "serial")]
    assert serials(site) == [8]


def test_what_the_mirror_carries(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    token = licence(site, 7)
    found = documents.add(mirror, token, PEM)
    assert documents.add(mirror, d.armour(token, d.ENTITLEMENT)) == found and documents.listed(mirror) == [found]
    with pytest.raises(Conflict):
        documents.add(mirror, licence(site, 8, jti=found.head.jti))
    with pytest.raises(Mismatch):
        documents.add(mirror, licence(site, 8), trust.public_pem(trust.generate_key()))
    for bad in ("", "hello", trust.sign_jws(KEY, "lease+jwt", {"iss": "v", "sub": "s", "jti": "x", "iat": 1, "nbf": 1, "exp": 2})):
        with pytest.raises(Invalid):
            documents.add(mirror, bad)
    assert pack(mirror, tmp_path / "disk", NOW)["changed"] and not pack(mirror, tmp_path / "disk", NOW)["changed"]
    documents.remove(mirror, found.head.jti)
    with pytest.raises(NotFound):
        documents.remove(mirror, found.head.jti)
    assert pack(mirror, tmp_path / "disk", NOW)["sequence"] == 2 and documents.listed(mirror) == []
    (mirror.path / "documents" / "x.pem").write_text("damaged")
    with pytest.raises(Invalid, match="damaged"):
        pack(mirror, tmp_path / "disk", NOW)


def test_the_command(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    file, pub = tmp_path / "acme.pem", tmp_path / "issuer.pub"
    file.write_text(d.armour(licence(site, 7), d.ENTITLEMENT))
    pub.write_text(PEM)
    where = ["--home", str(mirror.path)]

    def run(*argv: str) -> str:
        out = io.StringIO()
        with redirect_stdout(out):
            assert main([*argv, *where]) == 0
        return out.getvalue()

    assert run("list") == "no document is carried\n"
    assert "entitlement" in run("add", str(file), "--issuer", str(pub))
    (item,) = json.loads(run("list", "--json"))["items"]
    assert (item["org"], item["serial"], item["site"]) == ("acme", 7, site.home.instance)
    assert item["jti"] in run("remove", item["jti"])
    with pytest.raises(NotFound):
        main(["add", str(tmp_path / "absent"), "--issuer", str(pub), *where])


INDEX: dict[str, object] = {"schema": 1, "sender": "s", "sequence": 1, "created": 1, "names": [], "objects": [], "upstream": []}


@pytest.mark.parametrize(
    "value",
    [{}, "a.b.c", [5], ["a.b"], ["a b.c.d"], ["a.b.c\n"], ["a.b.c", "a.b.c"], ["a.b." + "c" * 65536], [f"a.b.c{i}" for i in range(1001)]],
    ids=["object", "text", "number", "two parts", "space", "newline", "twice", "large", "many"],
)
def test_an_index_with_bad_documents_is_refused(value: object) -> None:
    with pytest.raises(Invalid) as caught:
        medium.load_index(canonical_json(INDEX | {"documents": value}))
    assert caught.value.reason == "documents"


def test_an_index_of_before_has_none() -> None:
    assert medium.load_index(canonical_json(INDEX)).documents == ()
    assert medium.load_index(canonical_json(INDEX | {"documents": ["a.b.c"]})).documents == ("a.b.c",)
