"""The joint statement gives exactly what the key's and the catalog's own statements give, for every kind of question, in one round trip."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from sqlalchemy import event, select

from artifact.errors import AirlockError
from artifact.grant import Grant
from artifact.manifest import digest_of
from artifact.store import Call
from registry import tables as t
from registry.app import create_app
from registry.entitlements import new_key
from registry.lookup import USED, Ask, Lookup, Sought, _joint
from registry.s3_shapes import Asked, Plain
from registry.s3_views import MOST_NAMES
from registry.tokens import parse_scopes
from registry.wiring import Site
from tests.site import BACKENDS, SQLITE_ONLY, Pushed, call_of, make_key, push_model, running_site

NO_DIGEST = "sha256:" + "0" * 64


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


@pytest.fixture
def pushed(site: Site) -> Pushed:
    return push_model(site, call_of(site, make_key(site, "acme")), "acme/tiny", "1")


@pytest.fixture
def keys(site: Site) -> list[str]:
    """Keys with one grant, with three, with none, expired, and one that nobody was given."""
    made = [make_key(site, "acme"), make_key(site, "acme"), make_key(site, "beta"), make_key(site, "acme", expires=time.time() - 5)]
    with site.catalog.writing() as conn:
        several = site.entitlements.principal(made[1])
        assert several is not None
        row_id, org_id = conn.execute(select(t.api_key.c.id, t.api_key.c.org_id).where(t.api_key.c.key_id == several.key_id)).one()
        for models in ('["hf/**"]', '["acme/x","acme/y"]'):
            own = {"api_key_id": row_id, "org_id": org_id, "grant_id": f"grant-{models}"}
            conn.execute(t.key_grant.insert().values(models=models, actions='["pull"]', expires=4e9, grace_s=7, **own))
        none = site.entitlements.principal(made[2])
        assert none is not None
        none_id = conn.execute(select(t.api_key.c.id).where(t.api_key.c.key_id == none.key_id)).scalar_one()
        conn.execute(t.key_grant.delete().where(t.key_grant.c.api_key_id == none_id))
    return [*made, new_key()]


def asks(pushed: Pushed) -> list[Ask]:
    blob = digest_of(pushed.files["config.json"])
    sha512 = digest_of(pushed.files["config.json"], "sha512")
    found: list[Ask] = []
    for name in ("acme/tiny", "acme/old", "acme/tiny/profiles", "acme/absent", "", "\0", "acme/\udcff", "' OR 1=1 --"):
        for ref in ("1", "main", "absent", pushed.model.digest, pushed.profiles.digest, blob, sha512, NO_DIGEST, "", "\0"):
            found += [(kind, name, ref) for kind in ("manifest", "head", "object")]
            found += [("file", name, ref, path) for path in ("config.json", "sub/data.txt", "none", "", "\0")]
    return found


def hub_asks(pushed: Pushed) -> list[Ask]:
    """A revision or file by several names, of which some are there: the first by name or alias counts."""
    names = ("acme/tiny", "acme/old", "acme/tiny/profiles", "acme/absent", "hf/acme/x", "", "\0")
    triples = [(a, b, c) for a in names for b in names[:4] for c in names[:2]]
    refs = ("1", "main", "absent", "\0")
    return [("hub", ref, path, *names) for names in triples for ref in refs for path in ("config.json", "none", "")]


@pytest.mark.slow
def test_of_several_names_the_first_that_exists_is_found(site: Site, pushed: Pushed, keys: list[str]) -> None:
    with site.catalog.writing() as conn:
        repo = site.catalog.repository("acme/tiny")
        assert repo is not None
        conn.execute(t.alias.insert().values(name="acme/old", repo_id=repo.id))
    lookup, catalog, key = Lookup(site.engine), site.catalog, site.entitlements.hmac(keys[0])
    for ask in hub_asks(pushed):
        _, found = lookup.seek(ask, hmac=key)
        _, ref, path, *names = ask
        if "\0" in ask:
            assert found is None, ask
            continue
        first = next((name for name in names if catalog.repository(name)), "")
        assert found == (catalog.file(first, ref, path) if first else None), ask


@pytest.mark.slow
def test_the_joint_statement_is_the_two_of_it(site: Site, pushed: Pushed, keys: list[str]) -> None:
    with site.catalog.writing() as conn:
        repo = site.catalog.repository("acme/tiny")
        assert repo is not None
        conn.execute(t.alias.insert().values(name="acme/old", repo_id=repo.id))
    lookup, catalog = Lookup(site.engine), site.catalog
    alone: dict[str, Callable[..., object]] = {"head": catalog.locate, "object": catalog.find, "file": catalog.file}
    for ask in asks(pushed):
        kind, name, ref = ask[:3]
        key = keys[zlib.crc32(repr(ask).encode()) % len(keys)]
        holder, found = lookup.seek(ask, hmac=site.entitlements.hmac(key))
        assert holder == site.entitlements.principal(key), ask
        if holder is not None:
            assert lookup.seek(ask, key_id=holder.key_id) == (holder, found), ask
        if kind != "manifest":
            assert found == alone[kind](*ask[1:]), ask
            continue
        located, whole = catalog.locate(name, ref), catalog.find(name, catalog.locate(name, ref).digest) if catalog.locate(name, ref) else None  # type: ignore[union-attr]
        assert (found is None) == (located is None), ask
        if found is not None and located is not None:
            assert found.descriptor() == located.descriptor() and found.repo == located.repo, ask
            assert found.raw == (whole.raw if whole and located.digest else None), ask


def test_every_key_is_the_same_either_way(site: Site, pushed: Pushed, keys: list[str]) -> None:
    ask = ("manifest", "acme/tiny", "1")
    for key in keys:
        holder, found = Lookup(site.engine).seek(ask, hmac=site.entitlements.hmac(key))
        assert holder == site.entitlements.principal(key) and found is not None
    assert len(site.entitlements.principal(keys[1]).grants) == 3  # type: ignore[union-attr]
    assert site.entitlements.principal(keys[2]).grants == ()  # type: ignore[union-attr]


@pytest.mark.slow
def test_reads_of_the_doors_cost_one_statement(site: Site, pushed: Pushed) -> None:
    key = make_key(site, "acme")
    token = site.guard.token(call_of(site, key), ())[0]
    blob = digest_of(pushed.files["config.json"])
    seen: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _c, _cur, text, *_: seen.append(text))

    def cost(ask: Ask, use: Callable[[Call], object], credential: str = key) -> int:
        for _ in range(2):  # the first read of 15 minutes also writes its audit row
            seen.clear()
            use(site.guard.caller(credential, "r", time.time(), "127.0.0.1", ask))
        return len(seen)

    def manifest_get(call: Call) -> None:
        content = site.guard.read(call, "acme/tiny", site.guard.resolve(call, "acme/tiny", "1").digest)
        assert content.data is not None and digest_of(content.data) == pushed.model.digest

    assert cost(("manifest", "acme/tiny", "1"), manifest_get) == 1
    assert cost(("head", "acme/tiny", "1"), lambda call: site.guard.resolve(call, "acme/tiny", "1")) == 1
    assert cost(("object", "acme/tiny", blob), lambda call: site.guard.read(call, "acme/tiny", blob)) == 1
    assert cost(("object", "acme/tiny", pushed.model.digest), lambda call: site.guard.stat(call, "acme/tiny", pushed.model.digest)) == 1
    assert cost(("file", "acme/tiny", "main", "config.json"), lambda call: site.guard.file(call, "acme/tiny", "main", "config.json")) == 1
    assert cost(("head", "acme/tiny", "main"), lambda call: site.guard.revision(call, "acme/tiny", "main")) == 1
    assert cost(("head", "acme/tiny", "1"), lambda call: site.guard.ping(call), token) == 1
    with pytest.raises(AirlockError):
        site.guard.caller(new_key(), "r", time.time(), "10.0.0.1", ("manifest", "acme/tiny", "1"))
    for wrong in ("nvapi-x", ""):
        seen.clear()
        with pytest.raises(AirlockError):
            site.guard.caller(wrong, "r", time.time(), "10.0.0.2", ("manifest", "acme/tiny", "1"))
        assert not [text for text in seen if "sought" in text]


def test_what_was_found_answers_its_own_question_only(site: Site, pushed: Pushed) -> None:
    other = push_model(site, call_of(site, make_key(site, "acme")), "acme/other", "1")
    narrow = make_key(site, "acme", "acme/tiny")
    with pytest.raises(AirlockError) as plain:
        site.guard.read(call_of(site, narrow), "acme/other", other.model.digest)
    for ask in (("object", "acme/tiny", other.model.digest), ("manifest", "acme/tiny", "1"), ("object", "acme/tiny", pushed.model.digest)):
        call = site.guard.caller(narrow, "r", time.time(), "", ask)
        assert isinstance(call, Sought)
        with pytest.raises(AirlockError) as joint:
            site.guard.read(call, "acme/other", other.model.digest)
        assert str(joint.value) == str(plain.value)
        assert site.guard.read(call, "acme/tiny", pushed.model.digest).total == pushed.model.size
    wide = site.guard.caller(make_key(site, "acme"), "r", time.time(), "", ("manifest", "acme/tiny", "1"))
    assert site.guard.resolve(wide, "acme/other", "1").digest == other.model.digest
    assert site.guard.resolve(wide, "acme/tiny", other.model.digest if other.model == pushed.model else "1").digest == pushed.model.digest


def test_a_grant_is_decided_on_the_same_rows(site: Site, pushed: Pushed) -> None:
    """The table of decisions with and without the joint statement: the same refusals in the same words."""
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().where(t.repository.c.name == "acme/tiny").values(visibility="private"))
    cases = [make_key(site, "acme", "acme/x"), make_key(site, "beta", "**"), make_key(site, "acme", actions=("push",)), make_key(site, "acme")]
    for key in cases:
        for name in ("acme/tiny", "acme/absent", "beta/x", "acme/tiny/profiles"):
            told = []
            for ask in ((), ("manifest", name, "1")):
                try:
                    call = site.guard.caller(key, "r", time.time(), "", ask)
                    told.append(site.guard.read(call, name, site.guard.resolve(call, name, "1").digest).digest)
                except AirlockError as error:
                    told.append(f"{type(error).__name__} {error.reason} {error}")
            assert told[0] == told[1], (name, told)


@SQLITE_ONLY
def test_no_joint_statement_scans_a_table(site: Site) -> None:
    for kind, used in USED.items():
        for by in ("hmac", "key_id"):
            for digest in (True, False):
                text = str(_joint(by, kind, digest, True).compile(site.engine))
                values = {**dict.fromkeys(used, "x"), by: b"x"}
                with site.engine.connect() as conn:
                    plan = conn.exec_driver_sql("EXPLAIN QUERY PLAN " + text, tuple(values.get(n, "x") for n in _names(text))).all()
                scans = [step[3] for step in plan if "SCAN" in step[3]]
                assert [s for s in scans if s not in ("SCAN holder", "SCAN sought", "SCAN CONSTANT ROW")] == [], (kind, by)


def _names(text: str) -> list[str]:
    return ["x"] * text.count("?")


def test_a_grant_row_keeps_its_numbers(site: Site) -> None:
    key = make_key(site, "acme", expires=4_000_000_000.123456)
    holder, _ = Lookup(site.engine).seek(("head", "acme/x", "1"), hmac=site.entitlements.hmac(key))
    assert holder is not None and holder.expires == 4_000_000_000.123456
    assert [replace(grant, id="") for grant in holder.grants] == [Grant(("acme/*",), ("pull", "push", "run"))] and holder.grants[0].id


def served(site: Site, method: str, path: str, key: str, body: bytes = b"", port: int = 2, **headers_: str) -> tuple[int, dict[str, str]]:
    """Status and headers of a request through the whole application, in this process, to count statements; ports 3 and 4 are NGC's and S3's."""
    answers: list[tuple[int, dict[str, str]]] = []

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answers.append((message["status"], {name.decode(): value.decode() for name, value in message["headers"]}))

    headers = [(b"authorization", (key if " " in key else f"Bearer {key}").encode()), (b"host", b"x"), (b"content-length", str(len(body)).encode())]
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers_.items()]
    plain, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": plain, "raw_path": plain.encode(), "query_string": query.encode(), "headers": headers}
    scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", port), "scheme": "http", "extensions": {}, "http_version": "1.1", "root_path": ""}
    asyncio.run(create_app(site, site.settings, listeners={"ngc": ("127.0.0.1", 3), "s3": ("127.0.0.1", 4)})(scope, receive, send))
    return answers[0]


@pytest.mark.slow
def test_statements_of_the_s3_face(site: Site, pushed: Pushed) -> None:
    """Key, grants, name and file by one statement, as at the Hub door; the bytes' place by one more."""
    key_id = call_of(site, make_key(site, "acme")).principal.key_id
    pair = Credentials(key_id, site.entitlements.s3_secrets(key_id)[0])
    seen: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _c, _cur, text, *_: seen.append(text))
    for method, most in (("HEAD", 1), ("GET", 2)):
        for _ in range(2):  # the first read of a key is recorded, and its use noted
            request = AWSRequest(method, "http://x/models/acme/tiny%3A1/config.json")
            S3SigV4Auth(pair, "s3", "us-east-1").add_auth(request)
            sent = {k.lower().replace("-", "_"): v for k, v in request.headers.items()}
            authorization, date, hashed = sent["authorization"], sent["x_amz_date"], sent["x_amz_content_sha256"]
            seen.clear()
            status, _headers = served(
                site, method, "/models/acme/tiny:1/config.json", authorization, port=4, x_amz_date=date, x_amz_content_sha256=hashed
            )
            assert status == 200
        assert len(seen) == most, seen


@pytest.mark.slow
def test_a_folder_of_s3_is_found_behind_any_number_of_models(site: Site, pushed: Pushed) -> None:
    """Of all names the first 20,000 are looked at; a prefix that says the model leads to it at once, whatever it holds."""
    assert MOST_NAMES == 20_000
    with site.catalog.writing() as conn:
        row = dict(conn.execute(select(t.repository).where(t.repository.c.name == "acme/tiny")).one()._mapping)
        more = [row | {"id": row["id"] + 1000 + i, "name": f"acme/m{i}", "display": f"acme/m{i}"} for i in range(1, MOST_NAMES + 1)]
        conn.execute(t.repository.insert(), more)
    call, seen = call_of(site, make_key(site, "acme", "acme/**")), list[str]()
    event.listen(site.engine, "before_cursor_execute", lambda _c, _cur, text, *_: seen.append(text))
    found = site.guard.s3.objects(call, Plain(), Asked(prefix="acme/tiny:1/"))
    assert len(found.keys) == len(pushed.files) and len(seen) <= 4, (found, seen)
    for odd in ("\0", "\U0010ffff", "acme/tiny\0:1/", "ACME/tiny:1/", "'"):
        assert site.guard.s3.objects(call, Plain(), Asked(prefix=odd)).keys == []


@pytest.mark.slow
def test_statements_of_whole_requests(site: Site, pushed: Pushed) -> None:
    key = make_key(site, "acme")
    token = site.guard.token(call_of(site, key), parse_scopes(["repository:acme/tiny:pull"]))[0]
    blob = digest_of(pushed.files["config.json"])
    admin = call_of(site, make_key(site, "acme", "**", actions=("admin",)))
    push_model(site, admin, "hf/maker/base", "main")
    commit = site.guard.revision(admin, "acme/tiny", "1").commit
    key = make_key(site, "acme", "acme/*", "hf/**")
    seen: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _c, _cur, text, *_: seen.append(text))
    for credential in (key, token):
        for method, path, most in (
            ("GET", "/v2/", 1),
            ("HEAD", "/v2/acme/tiny/manifests/1", 1),
            ("GET", "/v2/acme/tiny/manifests/1", 1),
            ("GET", f"/v2/acme/tiny/manifests/{pushed.model.digest}", 1),
            ("HEAD", f"/v2/acme/tiny/blobs/{blob}", 1),
            ("GET", f"/v2/acme/tiny/blobs/{blob}", 1),
            ("GET", "/v2/acme/tiny/tags/list", 3),
            ("GET", f"/v2/acme/tiny/referrers/{pushed.model.digest}", 3),
            ("HEAD", "/acme/tiny/resolve/main/config.json", 1),
            ("HEAD", "/v1/hf/acme/tiny/resolve/1/config.json", 1),
            ("GET", "/acme/tiny/resolve/main/config.json", 2),
            ("HEAD", f"/acme/tiny/resolve/{commit}/config.json", 1),  # as most of a client's requests name it
            ("HEAD", "/maker/base/resolve/main/config.json", 1),
            ("HEAD", "/acme/maker/base/resolve/main/config.json", 1),
            ("GET", "/api/models/acme/tiny/auth-check", 1),
            ("GET", "/api/models/maker/base/tree/main", 4),
            ("GET", "/api/models/acme/tiny/refs", 5),
        ):
            if credential == token and not path.startswith("/v2/"):
                continue  # hub clients present keys
            for _ in range(2):  # the first read of 15 minutes also writes its audit row
                seen.clear()
                assert served(site, method, path, credential)[0] == 200
            assert len(seen) <= most, (method, path, seen)
