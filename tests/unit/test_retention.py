"""What rules let go of: a table of cases, properties over drawn repositories, and the same on a real site, where a dry run is the run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from artifact import manifest as m
from artifact import profile
from artifact.errors import Conflict, Invalid
from artifact.store import Call, Descriptor
from registry import catalog as c
from registry import holdings
from registry import tables as t
from registry.collector import Collector
from registry.retention import DAY_S, Rule, Tag, Version, check_rule, parts, plan, removal, rule_for, subject_of_tag
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, push_model, put, running_site

NOW = 1000 * DAY_S


def d(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def tag(name: str, digest: str = "", days: float = 0, kind: str = "tag") -> Tag:
    return Tag(name, d(digest or name), NOW - days * DAY_S, kind)


def version(name: str, days: float = 0, children: tuple[str, ...] = (), subject: str = "", kept: str = "") -> Version:
    return Version(d(name), NOW - days * DAY_S, tuple(map(d, children)), d(subject) if subject else "", kept)


def sig(name: str) -> str:
    return d(name).replace(":", "-") + ".sig"


FIVE = [tag(f"v{n}", days=10 * n) for n in range(1, 6)]
FIVE_VERSIONS = [version(f"v{n}") for n in range(1, 6)]
# words, tags, manifests, rule, the tags that go, the manifests that go
CASES: list[tuple[str, list[Tag], list[Version], Rule | None, set[str], set[str]]] = [
    ("no rule", FIVE, FIVE_VERSIONS, None, set(), set()),
    ("a rule of zeros keeps everything", FIVE, FIVE_VERSIONS, Rule("**"), set(), set()),
    ("the newest stay", FIVE, FIVE_VERSIONS, Rule("**", keep_last=2), {"v3", "v4", "v5"}, {"v3", "v4", "v5"}),
    ("the young stay", FIVE, FIVE_VERSIONS, Rule("**", keep_days=25), {"v3", "v4", "v5"}, {"v3", "v4", "v5"}),
    ("either is enough to stay", FIVE, FIVE_VERSIONS, Rule("**", keep_last=1, keep_days=35), {"v4", "v5"}, {"v4", "v5"}),
    ("globs stay and do not count", FIVE, FIVE_VERSIONS, Rule("**", keep_last=1, keep_tags=("v1", "*5")), {"v3", "v4"}, {"v3", "v4"}),
    ("branches stay", [tag("b", days=99, kind="branch"), tag("v1")], [version("b"), version("v1")], Rule("**", keep_last=1), set(), set()),
    ("two tags, one stays", [tag("new", "x"), tag("old", "x", 9)], [version("x")], Rule("**", keep_last=1), {"old"}, set()),
    (
        "what a profile names stays",
        [tag("new"), tag("old", days=9)],
        [version("new"), version("old", kept="p")],
        Rule("**", keep_last=1),
        set(),
        set(),
    ),
    ("untagged and young", [], [version("x", 6)], Rule("**", untagged_days=7), set(), set()),
    ("untagged and old", [], [version("x", 8)], Rule("**", untagged_days=7), set(), {"x"}),
    ("untagged without a rule for it", [], [version("x", 800)], Rule("**", keep_last=1), set(), set()),
    (
        "a child stays with its index",
        [tag("multi")],
        [version("multi", children=("x",)), version("x", 99)],
        Rule("**", untagged_days=7),
        set(),
        set(),
    ),
    (
        "a child goes with its index",
        [tag("new"), tag("multi", days=9)],
        [version("new"), version("multi", children=("x", "y")), version("x"), version("y")],
        Rule("**", keep_last=1),
        {"multi"},
        {"multi", "x", "y"},
    ),
    (
        "a child of two stays with the other",
        [tag("new"), tag("old", days=9)],
        [version("new", children=("x",)), version("old", children=("x",)), version("x", 99)],
        Rule("**", keep_last=1, untagged_days=1),
        {"old"},
        {"old"},
    ),
    ("a referrer stays with its subject", [tag("v")], [version("v"), version("r", 99, subject="v")], Rule("**", untagged_days=7), set(), set()),
    (
        "referrers and signature tags go with their subject",
        [tag("new"), tag("old", days=9), Tag(sig("old"), d("s"), NOW)],
        [version("new"), version("old"), version("r", subject="old"), version("s")],
        Rule("**", keep_last=1),
        {"old", sig("old")},
        {"old", "r", "s"},
    ),
    ("signature tags do not count", [tag("v"), Tag(sig("v"), d("s"), NOW)], [version("v"), version("s")], Rule("**", keep_last=1), set(), set()),
    ("an orphan stays while young", [], [version("r", 6, subject="gone")], Rule("**", untagged_days=7), set(), set()),
    ("an orphan goes by the rule", [], [version("r", 8, subject="gone")], Rule("**", untagged_days=7), set(), {"r"}),
    ("an orphaned signature tag goes", [Tag(sig("gone"), d("s"), 0)], [version("s")], Rule("**", untagged_days=7), {sig("gone")}, {"s"}),
]


@pytest.mark.parametrize(("words", "tags", "versions", "rule", "tags_gone", "gone"), CASES, ids=[case[0] for case in CASES])
def test_cases(words: str, tags: list[Tag], versions: list[Version], rule: Rule | None, tags_gone: set[str], gone: set[str]) -> None:
    found = plan(tags, versions, rule, NOW)
    assert {g.tag for g in found.goes if g.tag} == tags_gone
    assert {g.digest for g in found.goes if not g.tag} == set(map(d, gone))
    assert all(g.why for g in found.goes)
    assert not any(g.tag for g in plan(tags, versions, rule, NOW, immutable=True).goes)


def test_orphans_are_told() -> None:
    orphan, other = version("r", 3, subject="gone"), version("x")
    assert plan([tag("x")], [orphan, other], Rule("**", untagged_days=7), NOW).orphans == (orphan.digest,)
    assert plan([tag("x")], [orphan, other], None, NOW).orphans == (orphan.digest,)


NAMES = [f"m{n}" for n in range(8)]


@st.composite
def repositories(draw: st.DrawFn) -> tuple[list[Tag], list[Version], Rule]:
    versions = []
    for at, name in enumerate(NAMES):
        below = NAMES[:at]
        children = draw(st.lists(st.sampled_from(below), max_size=2, unique=True)) if below else []
        subject = draw(st.sampled_from(["", "", "absent", *below]))
        versions.append(version(name, draw(st.integers(0, 40)), tuple(children), subject))
    tags = [
        Tag(name, d(draw(st.sampled_from(NAMES))), NOW - draw(st.integers(0, 40)) * DAY_S)
        for name in draw(st.lists(st.sampled_from(["a", "b", "c", "e", sig("m1"), sig("absent")]), unique=True))
    ]
    few = st.integers(0, 3)
    return tags, versions, Rule("**", draw(few), draw(few) * 10, draw(few) * 10, tuple(draw(st.lists(st.sampled_from("abc"), max_size=1))))


def gone(found: tuple[list[Tag], list[Version], Rule]) -> tuple[set[str], set[str]]:
    wish = plan(*found, NOW)
    return {g.tag for g in wish.goes if g.tag}, {g.digest for g in wish.goes if not g.tag}


@settings(deadline=None)
@given(repositories(), st.sampled_from(NAMES))
def test_one_more_holder_never_makes_more_go(found: tuple[list[Tag], list[Version], Rule], name: str) -> None:
    tags, versions, rule = found
    tags_gone, versions_gone = gone(found)
    pinned = [replace(v, kept="a profile") if v.digest == d(name) else v for v in versions]
    holder = [*versions, Version(d("holder"), NOW, (d(name),), "", "a profile")]
    for fewer in (
        (tags, pinned, rule),
        (tags, holder, rule),
        (tags, versions, replace(rule, keep_tags=("*",))),
        (tags, versions, replace(rule, keep_last=0, keep_days=0)),
        (tags, versions, replace(rule, untagged_days=0)),
        ([*tags, Tag("branch", d(name), 0, "branch")], versions, rule),
    ):
        less_tags, less = gone(fewer)
        assert less_tags <= tags_gone
        assert less <= versions_gone


@pytest.mark.slow
@settings(deadline=None)
@given(repositories())
def test_what_stays_is_whole(found: tuple[list[Tag], list[Version], Rule]) -> None:
    tags, versions, _ = found
    tags_gone, versions_gone = gone(found)
    left = {v.digest: v for v in versions if v.digest not in versions_gone}
    assert all(t.digest in left for t in tags if t.name not in tags_gone), "a tag that stays names a manifest that goes"
    here = {v.digest for v in versions}
    assert all(child in left for v in left.values() for child in v.children if child in here), "an index that stays has lost a child"
    own = {t.digest for t in tags} | {child for v in versions for child in v.children}  # what is named itself needs no subject
    assert all(v.subject in left for v in left.values() if v.subject in here and v.digest not in own), "a referrer that stays has lost its subject"
    assert all(subject_of_tag(t.name) in left for t in tags if t.name not in tags_gone and subject_of_tag(t.name) in here)


@pytest.mark.slow
@settings(deadline=None)
@given(repositories(), st.integers(1, 4))
def test_parts_are_the_plan_in_pieces_that_are_whole_alone(found: tuple[list[Tag], list[Version], Rule], most: int) -> None:
    tags, versions, _ = found
    wish = plan(*found, NOW)
    groups = parts(wish.goes, versions, most)
    assert sorted(map(repr, (g for group in groups for g in group))) == sorted(map(repr, wish.goes))
    for group in groups:
        away = {g.digest for g in group if not g.tag}
        left = [v for v in versions if v.digest not in away]
        here = {v.digest for v in versions}
        assert not any(child in away for v in left for child in v.children), "a part takes a child and leaves its index"
        own = {t.digest for t in tags} | {child for v in versions for child in v.children}
        assert not any(v.subject in away for v in left if v.subject in here and v.digest not in own)


@pytest.mark.slow
@settings(deadline=None)
@given(repositories(), st.sampled_from(["a", "b", "", *map(d, NAMES)]), st.booleans())
def test_removal_leaves_what_something_else_names(found: tuple[list[Tag], list[Version], Rule], ref: str, along: bool) -> None:
    tags, versions, _ = found
    if ref and ref not in {t.name for t in tags} | {v.digest for v in versions}:
        return
    wish = removal(tags, versions, ref, referrers=along)
    away = set(wish.versions)
    if not ref:
        assert away == {v.digest for v in versions}
        return
    left = [t for t in tags if t.name not in wish.tags]
    assert all(t.digest not in away for t in left)
    named = {child for v in versions if v.digest not in away for child in v.children} & away
    assert named <= {ref}, "only what was asked for by its digest may leave an index behind"
    assert bool(named) == bool(wish.holders)


@pytest.mark.parametrize(
    "rule", [Rule(""), Rule("Acme/*"), Rule("**", keep_last=-1), Rule("**", keep_tags=("a b",)), Rule("**", untagged_days=10**9), Rule("x" * 300)]
)
def test_rules_that_are_refused(rule: Rule) -> None:
    with pytest.raises(Invalid):
        check_rule(rule)
    for pattern in ("**", "acme/**", "acme/*/x", "acme/a*b/**", "*/**"):
        check_rule(Rule(pattern))
    for pattern in ("acme/***/x", "acme/***", "***", "acme/**/x", "**/x", "acme/a**", "a**/x"):
        with pytest.raises(Invalid):
            check_rule(Rule(pattern))


def test_most_specific_rule_counts() -> None:
    rules = [Rule("**"), Rule("acme/*"), Rule("acme/ci-*"), Rule("acme/ci-tools")]
    wanted = {"acme/ci-tools": "acme/ci-tools", "acme/ci-x": "acme/ci-*", "acme/ci-x/profiles": "acme/ci-*", "acme/y": "acme/*", "other/y": "**"}
    assert {name: rule.pattern for name in wanted if (rule := rule_for(rules, name))} == wanted
    assert rule_for(rules[1:], "other/y") is None


# ---- on a real site


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


def push(site: Site, call: Call, repo: str, raw: bytes, ref: str = "", subject: Descriptor | None = None) -> Descriptor:
    put(site, call, repo, m.EMPTY_BYTES)
    layer = put(site, call, repo, raw)
    doc = m.build_manifest("application/x-test", [layer.as_json()], {}, subject)
    return site.guard.push(call, repo, doc, m.MANIFEST, refs=[ref] if ref else [])


def rule(site: Site, call: Call, pattern: str, **values: int) -> None:
    site.guard.upkeep.set_rule(call, {"pattern": pattern, **values})


def test_run_takes_what_the_dry_run_said(site: Site) -> None:
    key = make_key(site, "acme", "**", actions=("pull", "push", "admin"))
    first = call_of(site, key)
    pushed = {}
    for n in range(5):
        call = call_of(site, key, first.now + n)
        pushed[f"v{n}"] = push(site, call, "acme/data", b"layer %d" % n, f"v{n}")
    push(site, call, "acme/data", b"signature", subject=pushed["v0"])
    rule(site, call, "acme/*", keep_last=2)
    late = first.now + 3 * DAY_S
    dry = site.collector.dry_run(late)
    assert {str(item["tag"]) for item in dry.retained} == {"", "v0", "v1", "v2"}
    assert sum(int(str(item["bytes"])) for item in dry.retained) == dry.bytes == 3 * 7 + 9
    assert [str(ref) for ref in site.guard.refs(call, "acme/data").items] == [f"v{n}" for n in range(5)]
    real = site.collector.run(late)
    for name in ("tags", "manifests", "blobs", "bytes"):
        assert getattr(real, name) == getattr(dry, name), name
    assert [str(ref) for ref in site.guard.refs(call, "acme/data").items] == ["v3", "v4"]
    items = site.guard.upkeep.history(call, "acme/data", "v0")["items"]
    assert isinstance(items, list)
    assert (items[0]["to"], items[0]["key_id"], items[0]["kept"]) == ("", "gc", False)
    assert site.collector.run(late).tags == 0


@pytest.mark.slow
def test_model_stays_while_a_profile_names_it(site: Site) -> None:
    key = make_key(site, "acme", "**", actions=("pull", "push", "admin"))
    first = call_of(site, key)
    for n in range(3):
        push_model(site, call_of(site, key, first.now + n), "acme/tiny", f"v{n}", {"a.txt": b"text %d" % n})
    rule(site, first, "acme/tiny", keep_last=1)
    with site.catalog.writing() as conn:
        holdings.set_immutable(conn, site.catalog.repository("acme/tiny/profiles").id, True)  # type: ignore[union-attr]
    late = first.now + 3 * DAY_S
    assert site.collector.run(late).tags == 0, "every model is named by a profile that stays"
    with site.catalog.writing() as conn:
        holdings.set_immutable(conn, site.catalog.repository("acme/tiny/profiles").id, False)  # type: ignore[union-attr]
    dry, real = site.collector.dry_run(late), site.collector.run(late)
    assert (dry.tags, dry.bytes) == (real.tags, real.bytes)
    assert {(item["name"], item["tag"]) for item in real.retained if item["tag"]} == {
        (name, f"v{n}") for name in ("acme/tiny", "acme/tiny/profiles") for n in range(2)
    }
    assert site.guard.revision(first, "acme/tiny", "main").digest == site.guard.resolve(first, "acme/tiny", "v2").digest


def test_removal_tells_what_profiles_name_and_is_exact(site: Site) -> None:
    key = make_key(site, "acme", "**", actions=("pull", "push", "admin"))
    call = call_of(site, key)
    pushed = push_model(site, call, "acme/tiny", "v1", {"a.txt": b"text", "b.bin": b"b" * 100})
    push(site, call, "acme/other", b"b" * 100, "v1")
    dry = site.guard.upkeep.remove(call, {"name": "acme/tiny", "ref": "v1", "dry_run": True})
    assert dry["profiles"] == ["acme/tiny/profiles"]
    with pytest.raises(Conflict, match="still names"):
        site.guard.upkeep.remove(call, {"name": "acme/tiny", "ref": "v1"})
    assert site.guard.resolve(call, "acme/tiny", "v1").digest == pushed.model.digest
    real = site.guard.upkeep.remove(call, {"name": "acme/tiny", "ref": "v1", "force": True})
    assert {**dry, "dry_run": False} == real
    before = sum(path.stat().st_size for path in (site.settings.data / "blobs").rglob("*") if path.is_file())
    late = call.now + 3 * DAY_S
    assert site.collector.run(late).bytes == real["bytes"]
    site.collector.run(late + DAY_S)
    after = sum(path.stat().st_size for path in (site.settings.data / "blobs").rglob("*") if path.is_file())
    assert before - after == real["bytes"]


@pytest.mark.slow
def test_what_nobody_dated_is_old_from_now_on(site: Site) -> None:
    key = make_key(site, "acme", "**", actions=("pull", "push", "admin"))
    call = call_of(site, key)
    push(site, call, "acme/data", b"untagged")
    rule(site, call, "**", untagged_days=1)
    with site.catalog.writing() as conn:
        conn.execute(update(t.repo_manifest).values(at=0.0))
    late = call.now + 30 * DAY_S
    assert (site.collector.dry_run(late).manifests, site.collector.run(late).manifests) == (0, 0)
    assert site.collector.run(late + 2 * DAY_S).manifests == 1


def test_immutable_repository_keeps_its_tags_from_everybody(site: Site) -> None:
    key = make_key(site, "acme", "**", actions=("pull", "push", "admin"))
    call = call_of(site, key)
    old, new = push(site, call, "acme/data", b"one", "v1"), push(site, call, "acme/data", b"two", "v2")
    site.guard.upkeep.set_immutable(call, {"name": "acme/data", "immutable": True})
    rule(site, call, "**", keep_last=1)
    assert site.collector.run(call.now + 9 * DAY_S).tags == 0
    for change in (
        lambda: site.guard.delete(call, "acme/data", "v1"),
        lambda: site.guard.delete(call, "acme/data", old.digest),
        lambda: site.guard.upkeep.roll_back(call, {"name": "acme/data", "tag": "v1", "digest": new.digest}),
        lambda: site.guard.upkeep.remove(call, {"name": "acme/data"}),
        lambda: push(site, call, "acme/data", b"three", "v1"),
    ):
        with pytest.raises(Conflict) as refused:
            change()
        assert refused.value.reason == "immutable"
    assert site.guard.resolve(call, "acme/data", "v1").digest == old.digest
    site.guard.upkeep.set_immutable(call, {"name": "acme/data", "immutable": False})
    site.guard.delete(call, "acme/data", "v1")


def test_immutable_repository_keeps_what_its_indexes_name_by_rule_too(site: Site) -> None:
    call = call_of(site, make_key(site, "acme", "**", actions=("pull", "push", "admin")))
    trees = {}
    for ref in ("v1", ""):
        children = [push(site, call, "acme/data", b"%d of %s" % (n, ref.encode())) for n in range(4)]
        for level in range(2):  # an index of an index
            doc = {"schemaVersion": 2, "mediaType": m.INDEX, "manifests": [child.as_json() for child in children]}
            children.append(site.guard.push(call, "acme/data", m.canonical_json(doc), m.INDEX, refs=[ref] if ref and level else []))
        trees[ref] = {child.digest for child in children}
    site.guard.upkeep.set_immutable(call, {"name": "acme/data", "immutable": True})
    rule(site, call, "**", keep_last=1, untagged_days=1)
    late = call.now + 9 * DAY_S
    dry, real = site.collector.dry_run(late), site.collector.run(late)
    for report in (dry, real):
        assert {str(item["digest"]) for item in report.retained} == trees[""] and not report.error
    with site.catalog.reading() as conn:
        assert set(holdings.linked(conn, site.catalog.repository("acme/data").id, trees["v1"] | trees[""])) == trees["v1"]  # type: ignore[union-attr]


def pin(site: Site, call: Call, repo: str, name: str, digest: str) -> Descriptor:
    document = profile.build(name, digest, [{"tags": {"llm_engine": "vllm", "precision": "fp8", "tp": "1"}}], 1)
    put(site, call, repo, m.EMPTY_BYTES)
    layer = put(site, call, repo, document)
    raw = m.build_manifest(m.PROFILES_TYPE, [Descriptor(m.PROFILES_TYPE, layer.digest, layer.size).as_json()], {"name": repo})
    return site.guard.push(call, repo, raw, m.MANIFEST, refs=["p"])


@pytest.mark.slow
def test_only_profiles_of_the_same_owner_and_of_the_site_hold_a_manifest(site: Site) -> None:
    root = call_of(site, make_key(site, "acme", "**", actions=("pull", "push", "admin")))
    pusher = call_of(site, make_key(site, "acme", "acme/**", actions=("pull", "push")))
    beta = call_of(site, make_key(site, "beta", "beta/**", "hf/**", actions=("pull", "push")))
    images = {name: push(site, root, name, b"x", "v1") for name in ("acme/a", "acme/b", "acme/d", "hf/c")}
    pin(site, beta, "beta/spy/profiles", "acme/a", images["acme/a"].digest)
    pin(site, beta, "beta/use/profiles", "hf/c", images["hf/c"].digest)
    pin(site, root, "acme/own/profiles", "acme/b", images["acme/b"].digest)
    pin(site, root, "hf/site/profiles", "acme/d", images["acme/d"].digest)
    for name, told in (("acme/a", []), ("acme/b", ["acme/own/profiles"]), ("acme/d", ["hf/site/profiles"])):
        found = site.guard.upkeep.remove(root, {"name": name, "dry_run": True})
        assert found["profiles"] == told and "beta" not in str(found)
    hidden = site.guard.upkeep.remove(root, {"name": "hf/c", "dry_run": True})
    assert hidden["profiles"] == ["a repository that this key does not see"] and "beta" not in str(hidden)
    for call, name, words in ((pusher, "acme/b", "acme/own/profiles"), (pusher, "acme/d", "hf/site/profiles"), (root, "hf/c", "does not see")):
        with pytest.raises(Conflict, match=words) as refused:
            site.guard.delete(call, name, images[name].digest)
        assert refused.value.reason == "in_use" and "beta" not in str(refused.value)
        site.guard.delete(call, name, "v1")  # the tag alone: what the profile names stays
        assert site.guard.resolve(root, name, images[name].digest).size
    rule(site, root, "**", untagged_days=1, keep_last=1)
    push(site, root, "acme/a", b"newer", "v2")
    late = root.now + 9 * DAY_S
    for report in (site.collector.dry_run(late), site.collector.run(late)):
        assert {str(item["name"]) for item in report.retained} == {"acme/a"}, "a profile of another organisation holds nothing"
    with pytest.raises(Conflict):
        site.guard.upkeep.remove(root, {"name": "acme/b"})
    site.guard.delete(root, "acme/own/profiles", "p")
    profiles = site.catalog.repository("acme/own/profiles")
    assert profiles is not None
    site.guard.upkeep.remove(root, {"name": "acme/own/profiles"})
    site.guard.delete(pusher, "acme/b", images["acme/b"].digest)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["rot", "bytes", "row"])
def test_a_profile_document_that_cannot_be_read_pins_everything(tmp_path: Path, harm: str) -> None:
    with running_site(tmp_path) as site:
        call = call_of(site, make_key(site, "acme", "acme/**"))
        old = push_model(site, call, "acme/tiny", "1")
        push_model(site, call, "acme/tiny", "2")
        document = profile.build("acme/tiny", old.model.digest, [{"tags": {"llm_engine": "vllm", "precision": "fp8", "tp": "1"}}], 1)
        put(site, call, "acme/pin/profiles", m.EMPTY_BYTES)
        layer = put(site, call, "acme/pin/profiles", document)
        raw = m.build_manifest(m.PROFILES_TYPE, [Descriptor(m.PROFILES_TYPE, layer.digest, layer.size).as_json()], {})
        site.guard.push(call, "acme/pin/profiles", raw, m.MANIFEST, refs=["1"])
        with site.catalog.writing() as conn:
            holdings.set_rule(conn, Rule("acme/tiny", keep_last=1), 0)
            place = c.blob_location(conn, layer.digest)
        path = site.home.path / "blobs" / place
        if harm == "rot":
            path.chmod(0o600)
            path.write_bytes(b"garb" + document[4:])
        elif harm == "bytes":
            path.unlink()
        else:
            with site.catalog.writing() as conn:
                conn.execute(t.blob.update().where(t.blob.c.digest == layer.digest).values(location="", state="missing"))
        collector = Collector(site.library, 3600)
        for _ in range(2):
            told = collector.dry_run(time.time() + 60, clock_is_right=True), collector.run(time.time() + 60, clock_is_right=True)
            for report in told:
                assert layer.digest in report.unjudged and (report.tags, report.retained) == (0, [])
        with site.catalog.writing() as conn:
            conn.execute(t.blob.update().where(t.blob.c.digest == layer.digest).values(location=place, state="ready"))
        path.unlink(missing_ok=True)
        path.write_bytes(document)
        done = collector.run(time.time() + 60, clock_is_right=True)
        assert not done.unjudged and {item["name"] for item in done.retained} == {"acme/tiny/profiles"}
        assert site.guard.resolve(call, "acme/tiny", "1").digest == old.model.digest
