"""Access tokens and scopes as pure functions: what is signed comes back, nothing else is accepted, and a scope gives only what is allowed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifact.errors import Invalid, TooLarge, Unauthenticated
from artifact.grant import Access
from artifact.trust import generate_key, public_pem
from registry import tokens
from registry.tokens import MAX_SCOPES, PREFIX, Claims, Tokens, challenge, granted, parse_scopes

PEPPER, SITE, NOW = b"p" * 32, "0f0e0d0c-0000-4000-8000-000000000001", 1_000_000.0
OURS = Tokens(PEPPER, SITE)
CLAIMS = Claims("key-1", int(NOW) + 600, (Access("repository", "acme/app", ("pull",)),))
TOKEN = OURS.sign(CLAIMS)


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def reason(token: str, now: float = NOW, by: Tokens = OURS) -> str:
    with pytest.raises(Unauthenticated) as caught:
        by.verify(token, now)
    assert len(token) < 20 or token not in str(caught.value)
    return caught.value.reason


def payload() -> dict[str, object]:
    text = TOKEN[len(PREFIX) :].split(".")[0]
    found = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    assert isinstance(found, dict)
    return found


def signed(doc: object, key: bytes | None = None) -> str:
    """A token over any claims under our real key: what only a defect of ours could sign."""
    text = PREFIX + b64(json.dumps(doc).encode())
    secret = hmac.new(PEPPER, tokens.PURPOSE, hashlib.sha256).digest() if key is None else key
    return f"{text}.{b64(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def test_what_was_signed_comes_back() -> None:
    assert OURS.verify(TOKEN, NOW) == CLAIMS
    assert OURS.verify(signed(payload()), NOW) == CLAIMS, "the helper signs as the module does"
    assert TOKEN.startswith("alt1.") and "key-1" not in TOKEN and "alg" not in payload()


def test_a_token_ends() -> None:
    assert OURS.verify(TOKEN, NOW + 599.9) == CLAIMS
    assert reason(TOKEN, NOW + 600) == reason(TOKEN, NOW + 10**9) == "token_expired"


@pytest.mark.parametrize("other", [Tokens(b"q" * 32, SITE), Tokens(PEPPER, SITE[:-1] + "2")])
def test_another_site_is_another_audience(other: Tokens) -> None:
    assert reason(other.sign(CLAIMS)) == "token_invalid" and reason(TOKEN, by=other) == "token_invalid"


def test_every_changed_character_is_refused() -> None:
    for i in range(len(TOKEN)):
        for flip in (1, 2, 4, 8, 16, 32, 64):
            other = TOKEN[:i] + chr(ord(TOKEN[i]) ^ flip) + TOKEN[i + 1 :]
            assert reason(other) == "token_invalid", (i, flip)
        assert reason(TOKEN[:i] + TOKEN[i + 1 :]) == "token_invalid", "one dropped"
        assert reason(TOKEN[:i]) == "token_invalid", "cut off"
    for more in ("=", ".", "A", "\n", " ", TOKEN):
        assert reason(TOKEN + more) == reason(more + TOKEN) == "token_invalid"


def jws(header: dict[str, object], key: bytes | None) -> str:
    """A JWT of our claims, signed by HMAC-SHA-256 or not at all."""
    text = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(payload()).encode())}"
    return f"{text}.{b64(hmac.new(key, text.encode(), hashlib.sha256).digest()) if key is not None else ''}"


def test_forms_that_other_parsers_fell_for() -> None:
    pem = generate_key()
    public = public_pem(pem)
    public = public if isinstance(public, bytes) else public.encode()
    site_key = hmac.new(PEPPER, tokens.PURPOSE, hashlib.sha256).digest()
    for token in (
        jws({"alg": "none", "typ": "JWT"}, None),
        jws({"alg": "HS256", "typ": "JWT"}, public),
        jws({"alg": "HS256", "kid": "lease", "jwk": {"kty": "oct", "k": b64(b"x")}}, b"x"),
        jws({"alg": "HS256", "jku": "http://127.0.0.1:9/keys"}, b"x"),
        jws({"alg": "HS256", "typ": "entitlement+jwt"}, site_key),
        signed(payload(), public),
        signed(payload(), PEPPER),  # the pepper itself signs keys, not tokens
        signed(payload(), b""),
        "",
        ".",
        PREFIX,
        PREFIX + ".",
        PREFIX + "e30.",
        "nvapi-" + "a" * 49,
        "é" * 40,
        PREFIX + "a" * 20_000,
    ):
        assert reason(token) == "token_invalid", token[:40]
        assert reason(PREFIX + token) == "token_invalid"


@pytest.mark.parametrize(
    "change",
    [
        {"aud": "other"},
        {"aud": None},
        {"exp": str(int(NOW) + 600)},
        {"exp": True},
        {"exp": float(NOW) + 600},
        {"key": None},
        {"key": 5},
        {"access": {}},
        {"access": None},
        {"access": ["repository:acme/app:pull"]},
        {"access": [["repository", "acme/app", "pull"]]},
        {"access": [["repository", "acme/app", [1]]]},
        {"access": [["repository", "acme/app", ["pull"], "x"]]},
        {"alg": "none"},
        {"nbf": 1},
    ],
)
def test_claims_of_another_shape_are_refused_although_signed(change: dict[str, object]) -> None:
    assert reason(signed({**payload(), **change})) == "token_invalid"


def test_signed_things_that_are_no_claims() -> None:
    for doc in ([], "x", 1, None, {}, {"typ": "lease+jwt"}, {k: v for k, v in payload().items() if k != "aud"}):
        assert reason(signed(doc)) == "token_invalid"


def test_a_token_stays_small() -> None:
    with pytest.raises(TooLarge):
        OURS.sign(Claims("k", 1, tuple(Access("repository", f"acme/{'a' * 240}{i}", ("pull",)) for i in range(60))))
    most = Claims("key-" + "0" * 16, 2**40, tuple(Access("repository", "a" * 255, ("pull", "push", "delete", "list")) for _ in range(MAX_SCOPES)))
    assert len(OURS.sign(most)) < 8192 + 512


texts = st.text(max_size=60)
accesses = st.builds(Access, texts, texts, st.lists(texts, max_size=3).map(tuple))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.integers(int(NOW) + 1, 2**40), st.lists(accesses, max_size=5).map(tuple))
def test_any_claims_survive(key_id: str, exp: int, access: tuple[Access, ...]) -> None:
    claims = Claims(key_id, exp, access)
    token = OURS.sign(claims)
    assert token.isascii() and token.isprintable() and " " not in token
    assert OURS.verify(token, NOW) == claims


@settings(max_examples=300, deadline=None)
@given(st.integers(-(2**40), 2**40), st.floats(-1e12, 1e12))
def test_a_token_opens_before_its_end_and_never_after(exp: int, now: float) -> None:
    """A18 with its neighbours: whatever the clock of the reader says."""
    token = OURS.sign(Claims("key-1", exp, CLAIMS.access))
    if exp > now:
        assert OURS.verify(token, now).exp == exp
    else:
        assert reason(token, now) == "token_expired"


@pytest.mark.slow
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200).map(lambda raw: PREFIX + raw.decode("latin-1"))))
def test_no_text_is_a_token(text: str) -> None:
    assert reason(text) == "token_invalid"


# ---- scopes


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["repository:acme/app:pull"], [("repository", "acme/app", ("pull",))]),
        (["repository:acme/app:push,pull"], [("repository", "acme/app", ("push", "pull"))]),
        (["repository:acme/app:*"], [("repository", "acme/app", ("pull", "push", "delete"))]),
        (["repository:reg.example:5000/acme/app:pull"], [("repository", "reg.example:5000/acme/app", ("pull",))]),
        (["repository:a/b:pull repository:c/d:pull,push"], [("repository", "a/b", ("pull",)), ("repository", "c/d", ("pull", "push"))]),
        (["repository:a/b:pull", "repository:c/d:pull"], [("repository", "a/b", ("pull",)), ("repository", "c/d", ("pull",))]),
        (["repository:a/b:pull repository:a/b:pull,push", "repository:a/b:pull"], [("repository", "a/b", ("pull", "push"))]),
        (["registry:catalog:*"], [("registry", "catalog", ("*",))]),
        (["repository(plugin):a/b:pull"], [("repository", "a/b", ("pull",))]),
        (["repository:a/b:pull,admin,is_admin,tier"], [("repository", "a/b", ("pull",))]),
        (["repository:a/b:"], [("repository", "a/b", ())]),
        (["repository:*:*"], [("repository", "*", ("pull", "push", "delete"))]),
        (["repository:a/b"], []),
        (["repository::pull"], []),
        (["group/ngc:acme:x"], []),
        (["Repository:a/b:pull"], []),
        ([":a/b:pull", "", " ", "pull", "::", ":::"], []),
        (["cluster:a/b:pull"], []),
        ([], []),
    ],
)
def test_scopes(texts: list[str], expected: list[tuple[str, str, tuple[str, ...]]]) -> None:
    assert [(a.kind, a.name, a.actions) for a in parse_scopes(texts)] == expected


def test_scopes_are_bounded() -> None:
    assert len(parse_scopes([f"repository:a/{i}:pull" for i in range(MAX_SCOPES)])) == MAX_SCOPES
    with pytest.raises(Invalid):
        parse_scopes([" ".join(f"repository:a/{i}:pull" for i in range(MAX_SCOPES + 1))])
    with pytest.raises(TooLarge):
        parse_scopes(["repository:a/b:" + ",".join(["pull"] * 10_000)])


words = st.sampled_from(["pull", "push", "delete", "*", "", "admin", "list"])
names = st.sampled_from(["acme/app", "acme/app2", "h:5000/acme/app", "*", "", "..", "acme/b/../c"])
kinds = st.sampled_from(["repository", "registry", "repository(plugin)", "x", "", "REPOSITORY"])
scopes = st.one_of(st.tuples(kinds, names, st.lists(words, max_size=4).map(",".join)).map(":".join), st.text(max_size=30))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(scopes, max_size=8), st.sets(st.tuples(names, words)))
def test_what_is_granted_was_asked_and_is_allowed(texts: list[str], allowed: set[tuple[str, str]]) -> None:
    asked = parse_scopes(texts)
    given_ = granted(asked, lambda a, action: (a.name, action) in allowed)
    wanted = {(a.kind, a.name, action) for a in asked for action in a.actions}
    for access in given_:
        assert access.actions and access.kind in ("repository", "registry")
        for action in access.actions:
            assert (access.name, action) in allowed
            assert (access.kind, access.name, action) in wanted or (action == "list" and (access.kind, access.name, "pull") in wanted)
    assert len({(a.kind, a.name) for a in given_}) == len(given_)
    assert parse_scopes([" ".join(texts)]) == asked, "one text of several is the same as several texts"
    assert parse_scopes(map(str, asked)) == asked, "what is told is what would be asked"


def test_challenges() -> None:
    plain = 'Bearer realm="https://reg.example:5000/token",service="reg.example:5000"'
    assert challenge("https://reg.example:5000") == plain
    full = challenge("https://reg.example:5000", "repository:a/b:pull,push", "insufficient_scope")
    assert full == plain + ',scope="repository:a/b:pull,push",error="insufficient_scope"'
