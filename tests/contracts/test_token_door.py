"""The token endpoint and the Bearer challenge over sockets: what clients are told, what a token opens, and what no token opens."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, union_all

from artifact.grant import Access
from registry import tables as t
from registry.home import Home
from registry.pace import FAILED_LOGINS as ALLOWED
from registry.settings import Settings
from registry.tokens import Claims, Tokens
from registry.wiring import open_site
from tests.contracts.doors import MANIFEST, Answer, Door, new_site, serving, sha

pytestmark = pytest.mark.server
R = "acme/app"
FORM = "application/x-www-form-urlencoded"
PULL, PUSH = f"repository:{R}:pull", f"repository:{R}:pull,push"
NO_DIGEST = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def image(door: Door) -> str:
    door.image("acme/app2", "1", [b"two"])
    door.image("acme/open/tool", "1", [b"tool"])
    door.image("other/secret", "1", [b"secret"], who="other")
    return door.image(R, "1", [b"layer"])[0]


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def ask_token(door: Door, who: str | None, *scopes: str, post: bool = False, path: str = "/token", **more: str) -> Answer:
    """A token request as clients make it: repeated scopes on GET, one text of several on POST."""
    if post:
        fields = {"grant_type": "password", "username": "$oauthtoken", "password": door.keys[who] if who else "", "service": "x", "client_id": "c"}
        body = urlencode({**fields, "scope": " ".join(scopes), **more})
        return door.ask("POST", path, body.encode(), who=None, Content_Type=FORM + "; charset=utf-8")
    query = urlencode([("account", "$oauthtoken"), ("service", "x"), *(("scope", s) for s in scopes), *more.items()])
    given_ = {"Authorization": basic("$oauthtoken", door.keys[who])} if who else {}
    return door.ask("GET", f"{path}?{query}", who=None, **given_)


def token(door: Door, who: str | None, *scopes: str, **more: Any) -> str:
    found = ask_token(door, who, *scopes, **more)
    assert found.status == 200, found.body
    return str(found.json()["token"])


def use(door: Door, method: str, path: str, held: str, body: bytes | None = None, **headers: str) -> Answer:
    return door.ask(method, path, body, who=None, Authorization=f"Bearer {held}", **headers)


CHALLENGES = [
    ("GET", "/v2/", ""),
    ("GET", "/v2/_catalog", "registry:catalog:*"),
    ("GET", f"/v2/{R}/manifests/1", PULL),
    ("GET", f"/v2/{R}/manifests/{NO_DIGEST}", PULL),
    ("PUT", f"/v2/{R}/manifests/1", PUSH),
    ("DELETE", f"/v2/{R}/manifests/1", f"repository:{R}:delete"),
    ("GET", f"/v2/{R}/blobs/{NO_DIGEST}", PULL),
    ("DELETE", f"/v2/{R}/blobs/{NO_DIGEST}", f"repository:{R}:delete"),
    ("GET", f"/v2/{R}/tags/list", PULL),
    ("GET", f"/v2/{R}/referrers/{NO_DIGEST}", PULL),
    ("POST", f"/v2/{R}/blobs/uploads/", PUSH),
    ("POST", f"/v2/{R}/blobs/uploads/?mount={NO_DIGEST}&from=acme/app2", f"{PUSH} repository:acme/app2:pull"),
    ("PATCH", f"/v2/{R}/blobs/uploads/x", PUSH),
    ("GET", f"/v2/{R}/blobs/uploads/x", PUSH),
    ("PUT", f"/v2/{R}/blobs/uploads/x?digest={NO_DIGEST}", PUSH),
    ("DELETE", f"/v2/{R}/blobs/uploads/x", PUSH),
    ("GET", "/v2/absent/name/manifests/1", "repository:absent/name:pull"),
]


@pytest.mark.parametrize(("method", "path", "scope"), CHALLENGES)
def test_every_refusal_says_where_a_token_is_made_and_for_what(door: Door, method: str, path: str, scope: str) -> None:
    for verb in [method, "HEAD"] if method == "GET" and "uploads" not in path else [method]:
        scope = PUSH if verb == "HEAD" and "/blobs/" in path else scope  # the question before a push
        base = f'Bearer realm="{door.url}/token",service="127.0.0.1:{door.port}"' + (f',scope="{scope}"' if scope else "")
        refused = door.ask(verb, path, who=None)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, base), verb
        assert refused.headers["docker-distribution-api-version"] == "registry/2.0"
        assert verb == "HEAD" or refused.code == "UNAUTHORIZED"
        wrong = door.ask(verb, path, who=None, Authorization="Bearer alt1.e30.AAAA")
        assert (wrong.status, wrong.headers["www-authenticate"]) == (401, base + ',error="invalid_token"'), verb


@pytest.mark.parametrize(
    ("host", "realm"),
    [
        ("reg.example:5000", "http://reg.example:5000"),
        ("reg.example", "http://reg.example"),
        ("[::1]:5000", "http://[::1]:5000"),
        ('a"b', ""),
        ("a,b", ""),
        ("", ""),
        ("a b", ""),
        ("x" * 300, ""),
        ("evil\\", ""),
    ],
)
def test_the_realm_is_on_the_host_that_the_client_named(door: Door, host: str, realm: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=30)
    connection.putrequest("HEAD", f"/v2/{R}/manifests/1", skip_host=True)
    connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    said = answer.getheader("www-authenticate") or ""
    connection.close()
    assert answer.status == 401
    assert said.startswith(f'Bearer realm="{realm or door.url}/token",service="'), said
    assert said.count('"') == 6


@pytest.mark.parametrize("path", ["/token", "/proxy_auth"])
@pytest.mark.parametrize("post", [False, True])
def test_both_forms_at_both_places(door: Door, image: str, path: str, post: bool) -> None:
    more = {"offline_token": "true", "access_type": "offline", "is_admin": "true", "tier": "enterprise"}
    found = ask_token(door, "acme", PULL, PULL, f"{PUSH}", post=post, path=path, **more)
    doc = found.json()
    assert found.status == 200 and found.headers["cache-control"] == "no-store"
    assert doc["token"] == doc["access_token"] and doc["expires_in"] >= 60 and len(found.body) < 64 * 1024
    assert set(doc) == {"token", "access_token", "expires_in", *(["scope"] if post else [])}, "no refresh_token, no issued_at"
    assert use(door, "GET", f"/v2/{R}/manifests/1", doc["token"]).headers["docker-content-digest"] == image
    assert use(door, "POST", f"/v2/{R}/blobs/uploads/", doc["token"]).status == 202
    assert use(door, "GET", "/v2/acme/app2/manifests/1", doc["token"]).status == 401


def test_several_scopes_and_what_is_left_of_them(door: Door, image: str) -> None:
    wanted = ["repository:acme/app2:push,pull", f"repository:{R}:*", "repository:127.0.0.1:5000/acme/app:pull", "repository:other/secret:pull"]
    wanted += ["repository:*:*", "group/ngc:acme:pull", "registry:catalog:*", "repository:acme/none:pull,delete"]
    doc = ask_token(door, "acme", *wanted, post=True).json()
    assert set(doc["scope"].split(" ")) == {
        "repository:acme/app2:push,pull,list",
        f"repository:{R}:pull,push,delete,list",
        "registry:catalog:*",
        "repository:acme/none:pull,list",
    }
    held = token(door, "acme", *wanted)
    for name in (R, "acme/app2"):
        assert use(door, "GET", f"/v2/{name}/manifests/1", held).status == 200
    assert "other/secret" not in use(door, "GET", "/v2/_catalog", held).json()["repositories"]
    assert ask_token(door, "reader", PUSH, "repository:acme/open/tool:push,pull", post=True).json()["scope"] == "repository:acme/open/tool:pull,list"
    assert ask_token(door, "reader", PUSH, post=True).json()["scope"] == ""


def test_any_user_name_goes_with_a_key(door: Door, image: str) -> None:
    for user in ("$oauthtoken", "%24oauthtoken", "anybody", "", "a@b"):
        found = door.ask("GET", f"/token?scope={quote(PULL)}", who=None, Authorization=basic(user, door.keys["acme"]))
        assert found.status == 200
    assert door.ask("GET", "/token", who="acme").status == 200, "the key as Bearer"


def test_a_login_without_scope_opens_the_ping_only(door: Door, image: str) -> None:
    held = token(door, "acme")
    assert use(door, "GET", "/v2/", held).status == 200
    for method, path, scope in CHALLENGES[1:]:
        refused = use(door, method, path, held)
        if "absent" in path:
            assert (refused.status, refused.code) == (404, "NAME_UNKNOWN"), "the key's own words"
            continue
        assert refused.status == 401, path
        if "mount" not in path:
            assert refused.headers["www-authenticate"].endswith(f'scope="{scope}",error="insufficient_scope"'), path


def test_keys_go_on_working_as_they_are(door: Door, image: str) -> None:
    for how in (f"Bearer {door.keys['acme']}", basic("$oauthtoken", door.keys["acme"]), f"bearer  {door.keys['acme']}"):
        assert door.ask("GET", f"/v2/{R}/manifests/1", who=None, Authorization=how).status == 200


def test_refusals_of_the_endpoint(door: Door, image: str) -> None:
    for who in ("expired",):
        for post in (False, True):
            refused = ask_token(door, who, PULL, post=post)
            assert (refused.status, refused.code) == (401, "UNAUTHORIZED") and "expired on 20" in refused.json()["errors"][0]["message"]
            assert refused.headers["www-authenticate"].startswith("Basic realm=")
    wrong = [
        basic("u", "wrong"),
        basic("u", ""),
        "Basic !!!",
        "Basic",
        "Bearer",
        "Digest x",
        f"Bearer {token(door, 'acme', PULL)}",
        f"Bearer {token(door, None)}",
    ]
    for given_ in wrong:
        refused = door.ask("GET", f"/token?scope={PULL}", who=None, Authorization=given_)
        assert (refused.status, refused.code) == (401, "UNAUTHORIZED"), given_
    posts = {
        "grant_type=refresh_token&refresh_token=x&service=s&client_id=docker": 400,
        f"grant_type=client_credentials&client_secret={door.keys['acme']}": 400,
        "": 400,
        "grant_type=password": 401,
        "grant_type=password&username=u&password=": 401,
        "grant_type=password&password=wrong": 401,
        "&".join(["a=b"] * 300): 400,
        "a" * 100_000: 413,
        "grant_type=password&password=%ff%fe%00": 400,
    }
    for body, status in posts.items():
        refused = door.ask("POST", "/token", body.encode(), who=None, Content_Type=FORM)
        assert refused.status == status and refused.json()["errors"][0]["code"], body[:60]
        assert door.keys["acme"] not in refused.body.decode()
    assert door.ask("POST", "/token", b"{}", who="acme", Content_Type="application/json").status == 400
    for method in ("PUT", "DELETE", "PATCH"):
        refused = door.ask(method, "/token", who="acme")
        assert (refused.status, refused.headers["allow"]) == (405, "GET, POST")
    many = [f"repository:acme/{i}:pull" for i in range(30)]
    assert ask_token(door, "acme", *many).status == ask_token(door, "acme", *many, post=True).status == 400


def test_a_token_is_for_its_repository_and_its_actions(door: Door, image: str) -> None:
    """Case A16: not for a push, not for a name beside it, not for one that only looks like it."""
    held = token(door, "acme", PULL)
    raw = door.ask("GET", f"/v2/{R}/manifests/1").body
    assert use(door, "GET", f"/v2/{R}/manifests/1", held).status == 200
    for method, path in (
        ("PUT", f"/v2/{R}/manifests/stolen"),
        ("POST", f"/v2/{R}/blobs/uploads/"),
        ("POST", f"/v2/{R}/blobs/uploads/?digest={sha(b'x')}"),
        ("DELETE", f"/v2/{R}/manifests/1"),
        ("DELETE", f"/v2/{R}/blobs/{sha(b'layer')}"),
        ("GET", "/v2/acme/app2/manifests/1"),
        ("GET", "/v2/acme/app/profiles/manifests/1"),
        ("GET", "/v2/_catalog"),
        ("GET", "/airlock/v1/catalog"),
        ("GET", "/airlock/v1/catalog/acme/app"),
        ("GET", "/airlock/v1/search?q=acme"),
        ("GET", "/airlock/v1/audit"),
        ("GET", "/airlock/v1/history/acme/app"),
        ("GET", "/airlock/v1/gc"),
    ):
        refused = use(door, method, path, held, raw if method == "PUT" else None, Content_Type=MANIFEST)
        assert refused.status in (401, 404) or (path.endswith(("/audit", "/gc")) and refused.status == 403), (method, path, refused.status)
    assert use(door, "GET", "/v2/acme/b/../app2/manifests/1", held).status == 400
    assert door.ask("GET", f"/v2/{R}/manifests/stolen").status == 404 and door.ask("GET", f"/v2/{R}/manifests/1").body == raw
    body = {"model": R, "ref": "1", "profile_digest": NO_DIGEST, "profile_id": "x", "host": "h", "gpu_uuids": []}
    assert use(door, "POST", "/airlock/v1/leases", held, json.dumps(body).encode()).status == 401


def test_a_mount_needs_a_token_for_both(door: Door, image: str) -> None:
    path = f"/v2/{R}/blobs/uploads/?mount={sha(b'two')}&from=acme/app2"
    assert use(door, "POST", path, token(door, "acme", PUSH)).status == 202, "as if there were no such blob"
    assert use(door, "POST", path, token(door, "acme", PUSH, "repository:acme/app2:pull")).status == 201


def test_what_is_seen_and_not_entitled_and_what_is_not_seen(door: Door, image: str) -> None:
    held = token(door, "reader", PULL)
    denied = use(door, "GET", f"/v2/{R}/manifests/1", held)
    assert (denied.status, denied.code) == (403, "DENIED") and "no grant of this key covers acme/app" in denied.json()["errors"][0]["message"]
    hidden = use(door, "GET", f"/v2/{R}/manifests/1", token(door, "other", PULL))
    absent = use(door, "GET", "/v2/acme/absent/manifests/1", token(door, "other", "repository:acme/absent:pull"))
    assert (hidden.status, hidden.code) == (404, "NAME_UNKNOWN")
    assert hidden.body.replace(b"acme/app", b"acme/absent") == absent.body
    writes = use(door, "POST", "/v2/acme/open/tool/blobs/uploads/", token(door, "reader", "repository:acme/open/tool:pull,push"))
    assert (writes.status, writes.code) == (403, "DENIED") and "does not include 'push'" in writes.json()["errors"][0]["message"]


def test_nobodys_token_opens_nothing_here(door: Door, image: str) -> None:
    held = token(door, None, PULL, "repository:hf/acme/m:pull")
    for method, path, _scope in CHALLENGES:
        refused = use(door, method, path, held)
        assert refused.status == 401 and 'error="insufficient_scope"' in refused.headers["www-authenticate"], path
    assert "API key" in use(door, "GET", f"/v2/{R}/manifests/1", held).json()["errors"][0]["message"]


def ours(door: Door, instance: str = "") -> Tokens:
    home = Home.open(door.data)
    return Tokens(home.pepper(), instance or home.instance)


def key_id(door: Door, who: str) -> str:
    return str(door.ask("GET", "/airlock/v1/whoami", who=who).json()["key_id"])


def test_tokens_that_ended_or_are_not_ours(door: Door, image: str) -> None:
    access, who, soon = (Access("repository", R, ("pull",)),), key_id(door, "acme"), int(time.time()) + 600
    place = f"/v2/{R}/manifests/1"
    assert use(door, "GET", place, ours(door).sign(Claims(who, soon, access))).status == 200
    for held, reason in (
        (ours(door).sign(Claims(who, int(time.time()) - 1, access)), "token_expired"),
        (ours(door).sign(Claims("key-" + "0" * 16, soon, access)), "token_invalid"),
        (ours(door, "other-instance").sign(Claims(who, soon, access)), "token_invalid"),
        (Tokens(b"x" * 32, Home.open(door.data).instance).sign(Claims(who, soon, access)), "token_invalid"),
        (ours(door).sign(Claims("key-\0'--", soon, access)), "token_invalid"),
    ):
        refused = use(door, "GET", place, held)
        assert (refused.status, refused.json()["errors"][0]["detail"]["reason"]) == (401, reason)
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]


def test_a_revoked_key_takes_its_tokens_along_at_once(door: Door, image: str) -> None:
    now = time.time()
    with open_site(Settings.load(door.data), background=False) as site:
        from artifact.grant import Grant

        with site.catalog.writing() as conn:
            from registry.catalog import ensure_org

            found, key = site.entitlements.add_key(
                conn, ensure_org(conn, "acme", now), tier="enterprise", grant=Grant(("acme/**",), ("pull",)), expires=0, at=now
            )
        door.keys["doomed"] = key
        held = token(door, "doomed", PULL)
        assert use(door, "GET", f"/v2/{R}/manifests/1", held).status == 200
        with site.catalog.writing() as conn:
            site.entitlements.revoke(conn, found, time.time())
    refused = use(door, "GET", f"/v2/{R}/manifests/1", held)
    assert refused.status == 401 and "revoked on 20" in refused.json()["errors"][0]["message"]
    assert ask_token(door, "doomed", PULL).status == 401


words = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=60)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["scope", "service", "account", "password", "grant_type"]), words), max_size=6), st.binary(max_size=200))
def test_no_request_is_a_failure_of_ours(door: Door, fields: list[tuple[str, str]], raw: bytes) -> None:
    query = urlencode(fields)
    answers = [door.ask("GET", f"/token?{query}", who="acme"), door.ask("POST", "/token", query.encode(), who=None, Content_Type=FORM)]
    answers.append(door.ask("POST", "/proxy_auth", raw, who=None, Content_Type=FORM))
    bearer = base64.b64encode(raw).decode()
    answers += [door.ask("GET", f"/v2/{R}/tags/list", who=None, Authorization=f"{kind} {bearer}") for kind in ("Bearer", "Bearer alt1.", "Basic")]
    for answer in answers:
        assert answer.status in (200, 400, 401, 413, 429), answer.body


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A site that lets everybody read what is public, on a public URL."""
    data = tmp_path_factory.mktemp("public") / "data"
    keys = new_site(data)
    with serving(data, keys, AIRLOCK_ANONYMOUS="on", AIRLOCK_TOKEN_LIFE_S="90") as found:
        found.image("hf/acme/m", "1", [b"open"])
        found.image("acme/closed", "1", [b"closed"])
        yield found


def test_everybody_reads_what_is_public(public: Door) -> None:
    answer = ask_token(public, None, "repository:hf/acme/m:pull,push", "repository:acme/closed:pull", "registry:catalog:*")
    assert answer.json()["expires_in"] == 90
    held = answer.json()["token"]
    for read in (f"/v2/hf/acme/m/blobs/{sha(b'open')}", "/v2/hf/acme/m/manifests/1", "/v2/hf/acme/m/tags/list"):
        assert use(public, "GET", read, held).status == 200, read
        assert public.ask("GET", read, who=None).status == 200, read
        assert use(public, "GET", read, token(public, None)).status == 401, "asked for nothing"
    assert use(public, "GET", "/v2/", held).status == 200 and public.ask("GET", "/v2/", who=None).status == 401, "docker login needs the challenge"
    for method, path in (
        ("GET", "/v2/acme/closed/manifests/1"),
        ("GET", "/v2/acme/none/manifests/1"),
        ("GET", "/v2/other/none/manifests/1"),
        ("GET", "/v2/_catalog"),
        ("POST", "/v2/hf/acme/m/blobs/uploads/"),
        ("PUT", "/v2/hf/acme/m/manifests/1"),
        ("DELETE", "/v2/hf/acme/m/manifests/1"),
        ("GET", "/airlock/v1/whoami"),
        ("GET", "/airlock/v1/catalog"),
        ("GET", "/airlock/v1/search?q=acme"),
        ("GET", "/airlock/v1/audit"),
        ("GET", "/airlock/v1/gc"),
        ("GET", "/api/whoami-v2"),
    ):
        for refused in (use(public, method, path, held), public.ask(method, path, who=None)):
            assert refused.status == 401, (path, refused.body)
    wrong = public.ask("GET", "/v2/hf/acme/m/manifests/1", who=None, Authorization="Bearer nvapi-wrong")
    assert wrong.status == 401, "a wrong key is not nobody"
    assert public.ask("GET", "/v2/hf/acme/m/manifests/1", who="other").status == 200, "a key may what nobody may"
    assert public.ask("GET", "/v2/acme/closed/manifests/1", who="other").status in (403, 404)


def rows(door: Door) -> list[dict[str, Any]]:
    with open_site(Settings.load(door.data), background=False) as site, site.catalog.reading() as conn:
        both = union_all(select(t.audit_leaf.c.body), select(t.audit_pending.c.body))  # the running server puts them into its log
        return [json.loads(body) for body in conn.execute(both).scalars()]


def test_failed_logins_are_slowed_and_valid_keys_are_not(tmp_path: Path) -> None:
    keys = new_site(tmp_path / "data")
    with serving(tmp_path / "data", keys, AIRLOCK_PUBLIC_URL="https://reg.example/") as door:
        told = door.ask("GET", "/v2/", who=None).headers["www-authenticate"]
        assert told == 'Bearer realm="https://reg.example/token",service="reg.example"'
        connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=60)
        seen: dict[int, int] = {}
        for i in range(ALLOWED * 2 + 20):
            path, wrong = ("/v2/", "/token", "/airlock/v1/whoami", "/api/whoami-v2")[i % 4], ("nvapi-x", "alt1.x.y")[i // 4 % 2]
            connection.request("GET", path, headers={"Authorization": f"Bearer {wrong}"})
            answer = connection.getresponse()
            answer.read()
            seen[answer.status] = seen.get(answer.status, 0) + 1
            if answer.status == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert set(seen) == {401, 429} and seen[401] >= ALLOWED, seen
        for _ in range(20):
            assert door.ask("GET", "/v2/").status == 200 and ask_token(door, "acme", PULL).status == 200
            assert door.ask("GET", "/v2/", who=None).status == 401, "no key at all is no failed login"
            assert door.ask("GET", "/v2/", who="expired").status == 401
        logins = [row for row in rows(door) if row["event"] == "login"]
        assert len(logins) < 30, "one row for each reason, the rest is counted"
        assert not [row for row in logins if "nvapi-x" in json.dumps(row)]
    assert "nvapi-x" not in door.log.read_text()
