"""Neighbours of the attack cases A06 to A08 and A10 to A12, generated: orders of requests by several keys, against a model of what each may do.

Beside tests/hostile/test_oci_neighbours.py, which generates malformed input: here every request is well-formed, and what is kept must be the model's.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from artifact.grant import Grant
from artifact.manifest import is_digest
from registry.catalog import ensure_org
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.doors import EMPTY, MANIFEST, Answer, Door, new_site, serving, sha
from tests.hostile.test_oci_input import CLAIM, false_signatures, peak, signature, signers_of, state, unchanged

pytestmark = pytest.mark.server
CONFIG = {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}
SOME = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], print_blob=True)
KEYS = {  # beside those of every door test: a narrow pusher, a creator, and one whose patterns name what is another organisation's
    "pusher": ("acme", ("acme/into/*", "acme/open/*"), ("pull", "push")),
    "maker": ("acme", ("acme/tags/*",), ("pull", "create")),
    "greedy": ("other", ("**",), ("pull", "push")),
}
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("rights") / "data"
    keys, now = new_site(data), time.time()
    with open_site(Settings.load(data), background=False) as site, site.catalog.writing() as conn:
        for name, (org, models, actions) in KEYS.items():
            org_id = ensure_org(conn, org, now)
            keys[name] = site.entitlements.add_key(conn, org_id, tier="developer", grant=Grant(models, actions), expires=0, at=now)[1]
    with serving(data, keys, AIRLOCK_GC_EVERY_S="0") as found:  # what is let go of stays where it is: the tests compare all rows
        for repo, shown in REPOS.items():
            found.image(repo, "1", [repo.encode(), b"in all of them"], who=repo.split("/")[0])
            change(found, "UPDATE repository SET visibility = ? WHERE name = ?", shown, repo)
        yield found
        lines = [json.loads(line) for line in found.log.read_text().splitlines() if line.startswith("{")]
        assert not [line for line in lines if line["level"] == "error"], "an unexpected failure was logged"


def change(door: Door, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(door.data / "registry.db", timeout=30)) as db, db:
        db.execute(statement, values)


def manifest(note: str) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": CONFIG, "layers": [], "annotations": {"n": note}}).encode()


def refused(found: Answer, *statuses: int) -> None:
    assert found.status in statuses, (found.status, found.body[:500])
    assert found.json()["errors"][0]["message"] and b"Traceback" not in found.body


# ---- A06 and A10: who may see and take what

REPOS = {
    "acme/open/tool": "org",
    "acme/closed/x": "org",
    "acme/secret": "private",
    "acme/common": "public",
    "other/app": "org",
    "other/shared": "public",
}
ACME, OTHER = {"acme/open/tool", "acme/closed/x", "acme/common"}, {"other/app", "other/shared"}
SEES = {  # the table of rights, written down and not computed
    "acme": ACME | {"acme/secret", "other/shared"},
    "reader": ACME | {"other/shared"},
    "pusher": ACME | {"other/shared"},
    "maker": ACME | {"other/shared"},
    "other": OTHER | {"acme/common"},
    "greedy": OTHER | {"acme/common"},
}
PULLS = {
    "acme": ACME | {"acme/secret"},
    "reader": {"acme/open/tool"},
    "pusher": {"acme/open/tool"},
    "maker": set[str](),
    "other": OTHER,
    "greedy": OTHER | {"acme/common"},
}
PUSHES = {"acme": {"acme/into/here"}, "pusher": {"acme/into/here"}, "other": {"other/into"}, "greedy": {"other/into"}}
ABSENT = ["acme/none", "other/none", "hf/acme/open", "nobody/x"]


@settings(SOME, max_examples=80)
@given(
    who=st.sampled_from(sorted(SEES)),
    source=st.sampled_from([*REPOS, *ABSENT]),
    target=st.sampled_from(["acme/into/here", "other/into"]),
    what=st.sampled_from(["own", "shared", "elsewhere", "absent"]),
)
@example(who="greedy", source="acme/secret", target="other/into", what="own")
@example(who="pusher", source="acme/open/tool", target="acme/into/here", what="own")
def test_a06_mounts_by_every_key_from_everywhere(door: Door, who: str, source: str, target: str, what: str) -> None:
    elsewhere = next(r for r in REPOS if r != source)
    digest = sha({"own": source.encode(), "shared": b"in all of them", "elsewhere": elsewhere.encode(), "absent": b"nowhere"}[what])
    door.blob(target, b"{}", who=target.split("/")[0])  # the target is there before, so that only links differ
    before = state(door)
    found = door.ask("POST", f"/v2/{target}/blobs/uploads/?mount={digest}&from={source}", who=who)
    if target not in PUSHES.get(who, ()):
        refused(found, 403, 404)
    elif source in PULLS[who] and what in ("own", "shared"):
        assert (found.status, found.headers["docker-content-digest"]) == (201, digest)
        assert door.ask("DELETE", f"/v2/{target}/blobs/{digest}", who=target.split("/")[0]).status == 202
        for table in ("repo_blob", "manifest", "upload", "files"):
            assert state(door)[table] == before[table]
        return
    else:
        assert (found.status, found.headers.get("docker-content-digest"), found.body) == (202, None, b""), "the same, whatever the cause"
        assert door.ask("HEAD", f"/v2/{target}/blobs/{digest}", who=who).status == 404
        assert door.ask("DELETE", found.headers["location"], who=who).status == 204
    assert state(door) == before


PROBES = [  # what a push consists of, and what may be asked before one
    ("POST", "blobs/uploads/", None),
    ("POST", f"blobs/uploads/?digest={sha(b'probe')}", b"probe"),
    ("POST", f"blobs/uploads/?mount={sha(b'in all of them')}&from=acme/common", None),
    ("PATCH", "blobs/uploads/none", b"probe"),
    ("PUT", f"blobs/uploads/none?digest={sha(b'probe')}", b"probe"),
    ("PUT", "manifests/v1", manifest("probe")),
    ("PUT", "manifests/v1", b"{"),
    ("DELETE", "manifests/v1", None),
    ("HEAD", f"blobs/{sha(b'in all of them')}", None),
    ("GET", "tags/list", None),
]


@pytest.mark.parametrize("who", [*sorted(SEES), "expired", None])
def test_a_push_tells_nobody_which_organisations_there_are(door: Door, who: str | None) -> None:
    theirs = "acme" if who in ("other", "greedy") else "other"
    before = state(door)
    for method, tail, body in PROBES:
        for rest in ("none", "none/profiles", "app"):  # `other/app` is there
            told = []
            for owner in (theirs, "n" + theirs[1:]):
                found = door.ask(method, f"/v2/{owner}/{rest}/{tail}", body, who, Content_Type=MANIFEST)
                kept = {k: v for k, v in found.headers.items() if k not in ("date", "x-request-id")}
                told.append(json.dumps([found.status, kept, found.body.decode()]).replace(f"{owner}/{rest}", "NAME"))
            assert told[0] == told[1], (method, tail, rest)
            assert found.status in (401, 404), (method, tail, rest)
    assert state(door) == before


@settings(SOME, max_examples=60)
@given(
    who=st.sampled_from([*sorted(SEES), None]), repo=st.sampled_from(sorted(REPOS)), n=st.integers(1, 5), tail=st.sampled_from(["tags", "referrers"])
)
def test_a10_listings_by_every_key(door: Door, who: str | None, repo: str, n: int, tail: str) -> None:
    digest = sha(b"nothing refers to it")
    paths = {"tags": "/v2/{}/tags/list", "referrers": "/v2/{}/referrers/" + digest}
    with unchanged(door):
        found, absent = (door.ask("GET", paths[tail].format(name), who=who) for name in (repo, repo + "-absent"))
        if who is None:
            assert found.status == absent.status == door.ask("GET", "/v2/_catalog", who=None).status == 401
            return
        names: list[str] = []
        path = f"/v2/_catalog?n={n}"
        while path:
            page = door.ask("GET", path, who=who)
            assert page.status == 200 and len(page.json()["repositories"]) <= n
            names += page.json()["repositories"]
            path = page.headers.get("link", "").partition(">")[0].removeprefix("<")
        assert names == sorted(set(names)) and {name for name in names if name in REPOS} == SEES[who]
        assert not [name for name in names if not name.startswith(KEY_ORGS[who]) and name not in REPOS]
        if repo not in SEES[who]:
            assert (found.status, found.body) == (absent.status, absent.body.replace(b"-absent", b"")), "what is hidden is as what is absent"
        elif repo in PULLS[who]:
            assert found.status == 200 and (tail != "tags" or found.json() == {"name": repo, "tags": ["1"]})
        else:
            refused(found, 403)


KEY_ORGS = {"acme": "acme/", "reader": "acme/", "pusher": "acme/", "maker": "acme/", "other": "other/", "greedy": "other/"}

# ---- A07: blobs that are deleted here and kept there

TWO = ("acme/seven/a", "acme/seven/b")
BLOBS = (b"first of two", b"second of two")
steps = st.tuples(st.sampled_from(["push", "mount", "delete", "delete", "pull"]), st.sampled_from(TWO), st.sampled_from(BLOBS))


@settings(SOME, max_examples=25)
@given(order=st.lists(steps, min_size=1, max_size=8))
@example(order=[("push", TWO[0], BLOBS[0]), ("mount", TWO[1], BLOBS[0]), ("delete", TWO[0], BLOBS[0]), ("pull", TWO[1], BLOBS[0])])
def test_a07_orders_of_pushes_and_deletes(door: Door, order: list[tuple[str, str, bytes]]) -> None:
    held: set[tuple[str, bytes]] = set()
    for repo in TWO:
        door.blob(repo, b"{}")
    for verb, repo, data in order:
        other = TWO[repo == TWO[0]]
        if verb == "push":
            door.blob(repo, data)
            held.add((repo, data))
        elif verb == "mount":
            found = door.ask("POST", f"/v2/{repo}/blobs/uploads/?mount={sha(data)}&from={other}")
            assert found.status == (201 if (other, data) in held else 202)
            if found.status == 201:
                held.add((repo, data))
            else:
                assert door.ask("DELETE", found.headers["location"]).status == 204
        elif verb == "delete":
            found = door.ask("DELETE", f"/v2/{repo}/blobs/{sha(data)}")
            assert found.status == (202 if (repo, data) in held else 404)
            held.discard((repo, data))
        for name, raw in itertools.product(TWO, BLOBS):
            found = door.ask("GET" if verb == "pull" else "HEAD", f"/v2/{name}/blobs/{sha(raw)}")
            assert found.status == (200 if (name, raw) in held else 404), (verb, name)
            assert found.status == 404 or verb != "pull" or found.body == raw
    for repo, data in held:
        assert door.ask("DELETE", f"/v2/{repo}/blobs/{sha(data)}").status == 202


# ---- A08: tags that a key may not move

TAGS = ("latest", "v1", "v2")
writes = st.tuples(
    st.sampled_from(["acme", "maker", "maker", "reader", "other", "greedy"]),
    st.sampled_from(["put", "put", "list", "delete", "delete digest", "freeze"]),
    st.lists(st.sampled_from(TAGS), min_size=1, max_size=3),
    st.sampled_from(["one", "two"]),
)


@settings(SOME, max_examples=25)
@given(order=st.lists(writes, min_size=1, max_size=8))
@example(order=[("acme", "put", ["v1"], "one"), ("maker", "list", ["v2", "v1"], "two"), ("maker", "list", ["v2", "v1"], "one")])
@example(order=[("acme", "put", ["v1"], "one"), ("acme", "freeze", ["v1"], "one"), ("acme", "delete digest", ["v1"], "one")])
def test_a08_orders_of_writes_to_tags(door: Door, order: list[tuple[str, str, list[str], str]]) -> None:
    repo = f"acme/tags/n{next(_numbers)}"
    door.blob(repo, b"{}")
    tags: dict[str, str] = {}
    pushed: set[str] = set()
    frozen = False
    for who, verb, names, note in order:
        raw = manifest(note)
        digest = sha(raw)
        if verb == "freeze":
            change(door, "UPDATE repository SET immutable = 1 WHERE name = ?", repo)
            frozen = True
            continue
        before = state(door)
        if verb in ("put", "list"):
            wanted = names[:1] if verb == "put" else names
            path = wanted[0] if verb == "put" else f"{digest}?" + "&".join(f"tag={name}" for name in wanted)
            moved = [name for name in wanted if tags.get(name, digest) != digest]
            allowed = (who == "acme" and not (frozen and moved)) or (who == "maker" and not moved)
            found = door.ask("PUT", f"/v2/{repo}/manifests/{path}", raw, who=who, Content_Type=MANIFEST)
            assert found.status == 201 if allowed else found.status in (403, 404), found.body
            if allowed:
                tags |= dict.fromkeys(wanted, digest)
                pushed.add(digest)
        else:
            gone = [name for name, held in tags.items() if (held == digest if verb == "delete digest" else name == names[0])]
            there = digest in pushed if verb == "delete digest" else bool(gone)
            allowed = who == "acme" and there and not (frozen and gone)
            found = door.ask("DELETE", f"/v2/{repo}/manifests/{digest if verb == 'delete digest' else names[0]}", who=who)
            assert found.status == 202 if allowed else found.status in (403, 404), found.body
            if allowed:
                tags = {name: held for name, held in tags.items() if name not in gone}
                pushed -= {digest} if verb == "delete digest" else set()
        if not allowed:
            assert state(door) == before
        heads = {name: door.ask("HEAD", f"/v2/{repo}/manifests/{name}").headers.get("docker-content-digest") for name in TAGS}
        assert {name: held for name, held in heads.items() if held} == tags


# ---- A12: conditional writes and signers

TWELVE = "acme/twelve"
conditions = st.one_of(
    st.sampled_from(["current", "stale", "bare", "absent", "weak", "star", "both", "list", "none-match", ""]),
    st.text('"sha256:*W/, \x7f', max_size=20),
)


@settings(SOME, max_examples=60)
@given(given_=st.lists(conditions, min_size=1, max_size=4), there=st.booleans())
def test_a12_conditions(door: Door, given_: list[str], there: bool) -> None:
    path = f"/v2/{TWELVE}/manifests/c{next(_numbers)}"
    door.blob(TWELVE, b"{}")
    held = ""
    if there:
        held = door.ask("PUT", path, manifest("begin"), Content_Type=MANIFEST).headers["docker-content-digest"]
    for at, condition in enumerate(given_):
        raw = manifest(f"{path} {at}")
        now, stale = held or sha(b"absent"), sha(b"what it never was")
        forms = {"current": f'"{now}"', "stale": f'"{stale}"', "bare": now, "absent": f'"{sha(b"")}"', "weak": f'W/"{now}"', "star": "*"}
        forms |= {"both": f'"{now}"', "list": f'"{now}", "{stale}"'}
        headers = {} if condition in ("", "none-match") else {"If_Match": forms.get(condition, condition)}
        headers |= {"If_None_Match": "*"} if condition in ("none-match", "both") else {}
        before = state(door)
        found = door.ask("PUT", path, raw, Content_Type=MANIFEST, **headers)
        if condition in ("current", "bare"):
            expected = 201 if held else 412
        elif condition in ("stale", "absent"):
            expected = 412
        elif condition == "none-match":
            expected = 412 if held else 201
        else:
            expected = 201 if not headers else 400
            assert not headers or condition in forms or not is_digest(condition.strip().strip('"'))
        assert found.status == expected, (condition, found.status, found.body)
        if expected == 201:
            held = sha(raw)
        else:
            assert state(door) == before
        assert door.ask("HEAD", path).headers.get("docker-content-digest", "") == held


@settings(SOME, max_examples=8)
@given(plans=st.lists(st.sampled_from(["plain", "current", "stale"]), min_size=2, max_size=6))
def test_a12_writers_at_once(door: Door, plans: list[str]) -> None:
    """Of those that say the current digest at most one wins, none that says another one; the history is one chain without a gap."""
    tag = f"w{next(_numbers)}"
    path = f"/v2/{TWELVE}/manifests/{tag}"
    door.blob(TWELVE, b"{}")
    first = door.ask("PUT", path, manifest("begin"), Content_Type=MANIFEST).headers["docker-content-digest"]
    answers: list[tuple[str, int, str]] = []
    begin = threading.Barrier(len(plans))

    def write(at: int, plan: str) -> None:
        raw = manifest(f"{tag} {at}")
        headers = {"current": {"If_Match": f'"{first}"'}, "stale": {"If_Match": f'"{sha(raw)}"'}, "plain": {}}[plan]
        begin.wait(30)
        answers.append((plan, door.ask("PUT", path, raw, Content_Type=MANIFEST, **headers).status, sha(raw)))

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(plans)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == len(plans)
    won = {digest for _, status, digest in answers if status == 201}
    assert {status for plan, status, _ in answers if plan == "plain"} <= {201} and {s for p, s, _ in answers if p == "stale"} <= {412}
    conditional = sum(status == 201 for plan, status, _ in answers if plan == "current")
    assert conditional <= 1 and ("plain" in plans or conditional == ("current" in plans))
    with closing(sqlite3.connect(f"file:{door.data}/registry.db?mode=ro", uri=True)) as db:
        moves = db.execute("SELECT old_digest, new_digest FROM ref_history WHERE name = ? ORDER BY id", (tag,)).fetchall()
    assert [old for old, _ in moves] == ["", *(new for _, new in moves[:-1])] and {new for _, new in moves} == won | {first}
    assert door.ask("HEAD", path).headers["docker-content-digest"] == moves[-1][1]


@settings(SOME, max_examples=40)
@given(
    order=st.lists(
        st.tuples(st.sampled_from(["push", "push", "match", "stale", "delete"]), st.lists(st.sampled_from("abcd"), unique=True, max_size=4)),
        min_size=2,
        max_size=8,
    )
)
@example(order=[("push", ["a"]), ("push", ["b"]), ("push", ["a", "b"]), ("push", ["b", "a"]), ("match", ["c"]), ("delete", []), ("push", ["d"])])
def test_a12_orders_of_signers(door: Door, order: list[tuple[str, list[str]]]) -> None:
    path = f"/v2/{TWELVE}/manifests/sha256-{sha(str(next(_numbers)).encode())[7:]}.sig"
    for data in (b"{}", CLAIM):
        door.blob(TWELVE, data)
    held: set[str] | None = None
    for verb, signers in order:
        before, etag = state(door), door.ask("HEAD", path).headers.get("etag", f'"{sha(b"")}"')
        if verb == "delete":
            assert door.ask("DELETE", path).status == (404 if held is None else 202)
            held = None
        else:
            condition = {"push": {}, "match": {"If_Match": etag}, "stale": {"If_Match": f'"{sha(b"stale")}"'}}[verb]
            found = door.ask("PUT", path, signature(None, *signers), Content_Type=MANIFEST, **condition)
            status = {"push": 201 if held is None or held <= set(signers) else 409, "match": 412 if held is None else 201, "stale": 412}[verb]
            assert found.status == status, found.body
            held = set(signers) if status == 201 else held
            assert status == 201 or state(door) == before
        assert signers_of(door, path) == sorted(held) if held is not None else door.ask("HEAD", path).status == 404


# ---- A11: pages of many false signatures


@pytest.fixture(scope="module")
def many(door: Door) -> tuple[str, dict[str, str]]:
    return false_signatures(door, "acme/many", 2_500)


@settings(SOME, max_examples=40)
@given(
    kind=st.one_of(st.sampled_from(["t/signature0", "t/signature1", "t/signature", ""]), st.text("ax/'%_ ", max_size=20)),
    after=st.one_of(st.sampled_from(["", "sha256:", "sha256:8", "z", "sha256:" + "f" * 64]), st.text("sha256:0123456789abcdefé%' ", max_size=80)),
)
def test_a11_pages_from_anywhere(door: Door, many: tuple[str, dict[str, str]], kind: str, after: str) -> None:
    digest, made = many
    before = peak(door)
    wanted = sorted(name for name, own in made.items() if name > after and own == (kind or own))
    found = door.ask("GET", f"/v2/acme/many/referrers/{digest}?artifactType={quoted(kind)}&after={quoted(after)}")
    assert found.status == 200 and len(found.body) < 1_000_000
    shown = [item["digest"] for item in found.json()["manifests"]]
    assert shown == wanted[:1_000] and ("link" in found.headers) == (len(wanted) > 1_000)
    assert {item["artifactType"] for item in found.json()["manifests"]} <= {made[name] for name in wanted}
    assert ("oci-filters-applied" in found.headers) == bool(kind)
    assert peak(door) - before < 40_000, "KiB"


def quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())
