"""What bundles tell of upstreams: which fields are believed, what a repository then requires, what of an upstream ends; on both databases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from artifact.errors import Denied, Invalid, NotFound, TooLarge
from artifact.medium import load_index
from artifact.upstream import check_fact
from mirror.home import MirrorHome
from mirror.plan import Item, Requires
from mirror.records import Acceptance, Key, Records, source_of
from mirror.rights import right
from registry import tables as t
from registry import upstream
from registry.catalog import add_manifest, ensure_org, ensure_repository
from registry.library import local_call
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, running_site

NOW = 1_900_000_000.0
DIGEST = "sha256:" + "a" * 64
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY_INDEX = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode()
NIM = "nvcr.io/nim/meta/llama"


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as made:
        yield made


def told(name: str = NIM, **more: object) -> dict[str, object]:
    """One entry of an index."""
    facts: dict[str, object] = {"name": name, "ref": "1", "digest": DIGEST, "source": f"oci://{name}@{DIGEST}", "upstream_org": "acme-nvidia"}
    facts |= {"key_id": "0123456789abcdef", "product": "nv-ai-enterprise", "tier": "enterprise", "license": "nvidia", "accepted_by": "Ada <a@x>"}
    return (
        facts | {"subscription_end": int(NOW) + 10, "key_end": int(NOW) + 20, "accepted_at": 5, "fetched": 7, "gated": False, "evidence": "x"} | more
    )


def arrive(site: Site, *facts: dict[str, object], older: bool = False, org: str = "", at: float = NOW) -> list[str]:
    """What an import does with these facts: repositories with a manifest, then the facts, in one transaction."""
    with site.catalog.writing() as conn:
        kept = upstream.left(conn, [str(f["name"]) for f in facts])
        if org:
            ensure_org(conn, org, NOW)
        for fact in facts:
            repo = ensure_repository(conn, str(fact["name"]), org=org, visibility="org" if org else "public", at=NOW)
            add_manifest(conn, repo, EMPTY_INDEX, INDEX, at=NOW)
        return upstream.add(conn, site.audit, local_call(at), facts, "sender", 3, older=older, kept=kept)


def requires(site: Site, name: str = NIM) -> tuple[str, str, str]:
    with site.catalog.reading() as conn:
        r = t.repository.c
        row = conn.execute(select(r.requires_tier, r.requires_product, r.requires_from).where(r.name == name)).one()
    return row[0], row[1], row[2]


def rows(site: Site) -> list[dict[str, Any]]:
    with site.catalog.reading() as conn:
        return upstream.page(conn, 0, 100)


def recorded(site: Site, event: str) -> list[dict[str, Any]]:
    with site.catalog.reading() as conn:
        found = conn.execute(select(t.audit_pending.c.body).order_by(t.audit_pending.c.id)).scalars()
        return [body for body in map(json.loads, found) if body["event"] == event]


def test_an_import_records_and_requires(site: Site) -> None:
    assert arrive(site, told()) == []
    (row,) = rows(site)
    assert {k: v for k, v in row.items() if k in asdict(check_fact(told()))} == asdict(check_fact(told()))
    assert (row["sender"], row["sequence"], row["at"]) == ("sender", 3, NOW)
    assert requires(site) == ("enterprise", "nv-ai-enterprise", "import")
    assert [r["product"] for r in recorded(site, "require")] == ["nv-ai-enterprise"] and len(recorded(site, "upstream")) == 1
    arrive(site, told(subscription_end=int(NOW) + 99), at=NOW + 1)
    assert [r["subscription_end"] for r in rows(site)] == [NOW + 99]
    arrive(site, told(product="", tier=""), at=NOW + 2)
    assert requires(site) == ("", "", "import")


def test_an_administrators_word_stays(site: Site) -> None:
    arrive(site, told())
    change = site.catalog.change
    assert change(lambda c: upstream.require(c, site.audit, local_call(NOW), NIM, "", "")) == {"name": NIM, "tier": "", "product": ""}
    assert arrive(site, told()) == [NIM] and requires(site) == ("", "", "admin")
    (kept,) = recorded(site, "require_kept")
    assert (kept["tier"], kept["told_tier"], kept["told_product"]) == ("", "enterprise", "nv-ai-enterprise")
    change(lambda c: upstream.require(c, site.audit, local_call(NOW), NIM, "enterprise", None))
    change(lambda c: upstream.require(c, site.audit, local_call(NOW), NIM, None, "nv-ai-enterprise"))
    assert arrive(site, told()) == [] and requires(site) == ("enterprise", "nv-ai-enterprise", "admin")
    assert [r["by"] for r in recorded(site, "require")] == ["import", "admin", "admin", "admin"]
    with pytest.raises(NotFound):
        change(lambda c: upstream.require(c, site.audit, local_call(NOW), "no/such", "", ""))
    with pytest.raises(Invalid):
        change(lambda c: upstream.require(c, site.audit, local_call(NOW), NIM, "gold", None))


def test_own_names_and_older_bundles_and_old_facts(site: Site) -> None:
    bare = {k: v for k, v in told("acme/own").items() if k in ("name", "ref", "digest", "source", "key_id", "license", "gated", "fetched")}
    assert arrive(site, bare, org="acme") == [] and requires(site, "acme/own") == ("", "", "")  # an index of before requirements travelled
    for _ in range(2):  # a name that was here before: left, also when it comes again
        assert arrive(site, told("acme/own"), org="acme") == ["acme/own"] and requires(site, "acme/own") == ("", "", "")
    arrive(site, told("acme/new"), org="acme")
    assert requires(site, "acme/new") == ("enterprise", "nv-ai-enterprise", "import")
    arrive(site, told(), older=True)
    assert requires(site) == ("enterprise", "nv-ai-enterprise", "import")  # new here, so an older bundle may say it
    arrive(site, told(tier="", product="", license="other"), older=True)
    assert requires(site)[0] == "enterprise" and [r["license"] for r in rows(site) if r["name"] == NIM] == ["nvidia"]


def test_of_several_refs_the_most_counts(site: Site) -> None:
    arrive(site, told(tier="developer"), told(ref="2"), told(ref="3", tier="", product=""))
    assert requires(site) == ("enterprise", "nv-ai-enterprise", "import") and len(rows(site)) == 3


def test_what_ends(site: Site) -> None:
    with site.catalog.reading() as conn:
        assert upstream.ending(conn) == []
    arrive(site, told(), told("hf/a/b", key_id="", subscription_end=0))
    arrive(site, told("acme/m", key_id="feed", key_end=0, subscription_end=int(NOW), upstream_org="hub"), org="acme")
    with site.catalog.reading() as conn:
        found = upstream.ending(conn)
    assert [(e.kind, e.item, e.org, e.ends, e.names, e.orgs) for e in found] == [
        ("upstream_subscription", "feed", "hub", NOW, ("acme/m",), ("acme",)),
        ("upstream_subscription", "0123456789abcdef", "acme-nvidia", NOW + 10, (NIM,), ()),
        ("upstream_key", "0123456789abcdef", "acme-nvidia", NOW + 20, (NIM,), ()),
    ]
    arrive(site, told("acme/m", ref="2", key_id="beef", fetched=9, key_end=0, subscription_end=int(NOW) + 500), org="acme")  # another key brought it
    arrive(site, told(ref="2", fetched=8, subscription_end=0, key_end=int(NOW) + 30))
    with site.catalog.reading() as conn:
        found = upstream.ending(conn)
    assert [(e.item, e.ends) for e in found] == [("0123456789abcdef", NOW + 30), ("beef", NOW + 500)]


def test_who_sees_and_who_says(site: Site) -> None:
    arrive(site, told(), told("hf/a/b", tier="", product=""))
    arrive(site, told("acme/m"), org="acme")
    arrive(site, told("other/m"), org="other")
    keep = site.guard.upkeep
    boss = call_of(site, make_key(site, "site", "**", actions=("admin",), tier="enterprise"))
    lead = call_of(site, make_key(site, "acme", "acme/**", actions=("admin",), tier="enterprise"))
    auditor = call_of(site, make_key(site, "acme", "acme/**", actions=("auditor",), tier="enterprise"))
    reader = call_of(site, make_key(site, "acme", "**", actions=("pull",), tier="enterprise"))
    everything = keep.upstreams(boss)
    assert len(everything["items"]) == 4 and everything["after"] == 0  # type: ignore[arg-type]
    first = keep.upstreams(boss, limit=3)
    assert [r["name"] for r in keep.upstreams(boss, after=first["after"], limit=3)["items"]] == ["other/m"]  # type: ignore[arg-type,attr-defined]
    for call in (lead, auditor):
        assert {r["name"] for r in keep.upstreams(call)["items"]} == {NIM, "hf/a/b", "acme/m"}  # type: ignore[attr-defined]
    assert keep.upstreams(auditor, "other/m")["items"] == []
    with pytest.raises(Denied):
        keep.upstreams(reader)
    with pytest.raises(Denied):  # what a bundle said, an organisation's administrator does not lift
        keep.require(lead, {"name": "acme/m", "tier": "", "product": ""})
    keep.require(boss, {"name": "acme/m/profiles", "tier": ""})  # a profile manifest is decided as its model
    assert requires(site, "acme/m") == ("", "nv-ai-enterprise", "admin")
    keep.require(lead, {"name": "acme/m", "product": "own-product"})
    assert requires(site, "acme/m") == ("", "own-product", "admin")
    for hostile in ({"tier": 1}, {"tier": "gold"}, {"product": "a b"}, {"product": None}, {"product": "x" * 101}):
        with pytest.raises(Invalid):
            keep.require(boss, {"name": NIM} | hostile)


@pytest.mark.parametrize(
    "bad",
    [
        *({key: 7} for key in ("name", "ref", "digest", "source", "upstream_org", "key_id", "license", "accepted_by", "evidence", "product", "tier")),
        *({key: "x" * 3000} for key in ("name", "ref", "source", "upstream_org", "key_id", "license", "accepted_by", "evidence", "product")),
        *({key: value} for key in ("subscription_end", "key_end", "accepted_at", "fetched") for value in ("1", True, -1, 1e11, float("inf"), [])),
        *({"gated": value} for value in (1, "yes", None)),
        *({"license": value} for value in ("a\nb", "\x1b[2J", None, {})),
        {"source": "hf://é"},
        {"tier": "gold"},
        {"product": "a b"},
        {"name": "../x"},
        {"digest": "sha256:00"},
    ],
)
def test_hostile_facts_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        check_fact(told() | bad)


def test_facts_of_before_are_read() -> None:
    found = check_fact({"name": "hf/a/b", "ref": "main", "digest": DIGEST, "source": "hf://a/b@c", "key_id": "tester", "later": {"x": [1]}})
    assert (found.tier, found.product, found.subscription_end, found.key_id) == ("", "", 0.0, "tester")


# ---- the mirror's records, and what they allow


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(MirrorHome.init(tmp_path / "mirror"))


def item(source: str = "oci://nvcr.io/nim/x:1", **wants: str) -> Item:
    return Item("oci", source, "https://nvcr.io", "nim/x", "1", "nvcr.io/nim/x", "1", key_env="NGC_KEY", requires=Requires(**wants))


def refusal(records: Records, what: Item, key: str = "secret-key", now: float = NOW) -> Denied:
    with pytest.raises(Denied) as caught:
        right(what, key, records, now)
    error = caught.value
    assert error.expected and error.do and "secret-key" not in json.dumps(error.as_dict())
    return error


def test_every_refusal_says_what_is_missing_and_what_to_do(records: Records) -> None:
    want = {"product": "nv-ai-enterprise", "tier": "enterprise"}
    assert refusal(records, item(**want)).reason == "upstream_product"
    assert refusal(records, item(tier="developer")).reason == "upstream_tier"
    assert refusal(records, item(**want), key="").reason == "upstream_product"
    key = Key("nvidia", records.key_id("secret-key"), "NGC_KEY", "ngc", "acme", ("riva",), "developer", int(NOW) + 5)
    records.put(key)
    error = refusal(records, item(**want))
    assert error.reason == "upstream_product" and "account acme) has riva" in error.what
    again = "airlock mirror key add nvidia --env NGC_KEY --source ngc --org acme --product riva --product nv-ai-enterprise --tier enterprise"
    assert error.do.endswith(again)
    assert refusal(records, item(product="riva", tier="enterprise")).reason == "upstream_tier"
    assert right(item(product="riva", tier="developer"), "secret-key", records, NOW + 4).key == key
    error = refusal(records, item(product="riva"), now=NOW + 5)
    assert error.reason == "upstream_subscription" and "2030-03-17" in error.what
    assert right(item(), "secret-key", records, NOW + 5).key == key  # what requires nothing needs no subscription
    assert refusal(records, item(product="riva"), key="another-key").reason == "upstream_product"


def test_licences_are_accepted_by_somebody(records: Records, tmp_path: Path) -> None:
    wanted = item(license="Apache-2.0")
    error = refusal(records, wanted, key="")
    assert error.reason == "upstream_license" and '--by "Name <mail>" --license Apache-2.0' in error.do
    records.accept(Acceptance(source_of("oci://NVCR.io/nim/x@" + DIGEST), "", "Ada <a@x>", 5))
    records.accept(Acceptance("oci://nvcr.io/nim/y", "apache-2.0", "Ada <a@x>", 6))
    assert refusal(records, wanted, key="").reason == "upstream_license"
    (tmp_path / "terms.pdf").write_bytes(b"terms")
    evidence = records.keep(str(tmp_path / "terms.pdf"))
    records.accept(Acceptance("oci://nvcr.io/nim/x", "apache-2.0", "Bob <b@x>", 7, evidence))
    granted = right(wanted, "", records, NOW)
    facts = granted.facts("", "", "HEAD")
    assert (facts["accepted_by"], facts["accepted_at"], facts["license"]) == ("Bob <b@x>", 7, "Apache-2.0")
    digest = evidence.split()[0].removeprefix("sha256:")
    assert facts["evidence"] == f"HEAD; sha256:{digest} terms.pdf" and (tmp_path / "mirror" / "evidence" / digest).read_bytes() == b"terms"
    granted.check_license("apache-2.0"), granted.check_license(""), granted.check_license("other")
    with pytest.raises(Denied) as caught:
        granted.check_license("mit")
    assert caught.value.reason == "upstream_license"


def test_records_hold_no_key_and_damage_is_told(records: Records, tmp_path: Path) -> None:
    home = tmp_path / "mirror"
    first = records.key_id("secret-key")
    assert first == Records(MirrorHome.open(home)).key_id("secret-key") and len(first) == 16 and records.key_id("") == ""
    assert first != Records(MirrorHome.init(tmp_path / "other")).key_id("secret-key")
    assert (home / "key-id.secret").stat().st_mode & 0o777 == 0o600
    records.put(Key("a", first, "K", "hf", "acme"))
    assert not any(b"secret-key" in p.read_bytes() for p in home.rglob("*") if p.is_file())
    for damage in ("[]", "{", '{"schema":1,"keys":[{"name":1}]}', '{"schema":1,"keys":[{"nmae":"x"}]}', '{"schema":2}', '{"schema":1,"keys":{}}'):
        (home / "upstream.json").write_text(damage)
        with pytest.raises(Invalid):
            records.keys()
    for source in ("hf://a/b/c", "oci://h", "s3://a/b", "hf://../x", "oci:///x", "oci://h/\n", "ngc://m:1", "ngc://a/b/c/d:1", "nim://h"):
        with pytest.raises(Invalid):
            source_of(source)
    assert source_of("hf://Acme/Tiny@main") == "hf://acme/tiny" and source_of("oci://H:1/a/b:2") == "oci://h:1/a/b"
    assert source_of("ngc://Nim/meta/X:hf") == "ngc://nim/meta/x" and source_of("nim://NVCR.io/nim/meta/x:1") == "nim://nvcr.io/nim/meta/x"


# ---- an index that a thief of the online keys could sign


def index(facts: str) -> bytes:
    name = json.dumps({"name": NIM, "ref": "1", "digest": DIGEST, "media_type": INDEX, "display": "", "kind": "image"})
    return f'{{"schema":1,"sender":"s","sequence":1,"created":1,"names":[{name}],"objects":[],"upstream":[{facts}]}}'.encode()


def test_an_index_with_facts_of_its_names_is_read() -> None:
    assert load_index(index(json.dumps(told()))).upstream[0]["product"] == "nv-ai-enterprise"
    bare = {key: told()[key] for key in ("name", "ref", "digest", "source", "key_id", "license", "gated", "fetched")}
    assert load_index(index(json.dumps(bare))).upstream == (bare,)


@pytest.mark.parametrize(
    "facts",
    [
        json.dumps(told("acme/own")),  # a name that the bundle does not move
        json.dumps(told(ref="2")),
        json.dumps(told(digest="sha256:" + "b" * 64)),
        json.dumps(told(tier="gold")),
        json.dumps(told(evidence="x" * 5000)),
        json.dumps(told(more="x" * 20_000)),
        json.dumps(told()).replace('"fetched": 7', '"fetched": 1e999'),
        json.dumps(told()).replace('"fetched": 7', f'"fetched": {"9" * 400}'),
        json.dumps(told()).replace('"license": "nvidia"', '"license": "\\ud800"'),
        json.dumps(told()).replace('"license": "nvidia"', '"license": "\\u0000"'),
        "7",
        "[]",
        "{}",
        '{"x": 1e999}',
    ],
)
def test_a_hostile_index_is_refused(facts: str) -> None:
    with pytest.raises((Invalid, TooLarge)):
        load_index(index(facts))
