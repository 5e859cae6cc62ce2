"""Parts of what an operator sees, without a server: checks with a bound, figures with few labels, templates for any path."""

from __future__ import annotations

import re
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import Unavailable
from registry.front import request_id
from registry.health import Bounded
from registry.metrics import MOST_REASONS, Metrics
from registry.routes import OTHER, Route, route

PATHS = st.one_of(
    st.text(max_size=60).map(lambda t: "/" + t),
    st.lists(
        st.sampled_from(["v2", "a", "blobs", "uploads", "manifests", "api", "models", "resolve", "main", "airlock", "v1", "gc", "x" * 40]), max_size=8
    ).map(lambda parts: "/" + "/".join(parts)),
)


@pytest.mark.slow
def test_a_check_that_hangs_is_told_within_its_bound_and_not_begun_twice() -> None:
    release, begun = threading.Event(), []

    def work() -> str:
        begun.append(1)
        release.wait(60)
        return "done"

    check = Bounded(work)
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(Unavailable, match="no answer"):
            check.ask(0.1)
        assert time.monotonic() - start < 20
    assert len(begun) == 1
    release.set()
    assert check.ask(60) == "done"


@pytest.mark.slow
def test_a_check_that_fails_raises_what_it_raised_and_is_asked_again() -> None:
    answers = iter([Unavailable("away"), Unavailable("still away")])

    def work() -> str:
        found = next(answers, None)
        if found:
            raise found
        return "ok"

    check = Bounded(work)
    with pytest.raises(Unavailable):
        check.ask()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            assert check.ask() == "ok"
            return
        except Unavailable:
            time.sleep(0.2)
    pytest.fail("the check was never asked again")


@given(st.lists(st.text(max_size=40), max_size=200))
def test_reasons_are_words_of_ours_and_bounded(reasons: list[str]) -> None:
    metrics = Metrics()
    for reason in reasons:
        metrics.denied(reason)
    for i in range(MOST_REASONS * 2):
        metrics.denied("reason_" + "a" * (i % 20) + "b" * (i // 20))
    labels = re.findall(r'airlock_denials_total\{reason="(.*)"\}', metrics.text(None, {}).decode())
    assert len(labels) <= MOST_REASONS + 1
    assert all(re.fullmatch(r"[a-z][a-z0-9_]{0,31}", label) for label in labels)


@given(PATHS, st.text(max_size=12), st.integers(0, 599))
def test_any_request_fits_few_labels(path: str, method: str, status: int) -> None:
    metrics = Metrics()
    metrics.observe(route(path), method, status, 0.1, 1, 1)
    line = next(x for x in metrics.text(None, {}).decode().splitlines() if x.startswith("airlock_http_requests_total{"))
    pattern = r'\{door="(oci|token|hub|admin|other)",method="(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|other)",status="([0-5]xx|none)"\} 1\.0'
    assert re.search(pattern, line), line


@given(PATHS)
def test_a_template_holds_nothing_of_the_path(path: str) -> None:
    known = {"v2", "_catalog", "blobs", "uploads", "manifests", "tags", "list", "referrers", "api", "models", "tree", "paths-info", "refs", "commits"}
    known |= {"resolve", "whoami-v2", "other", "airlock", "v1", "healthz", "token", "proxy_auth", "…", ""}
    known |= {"whoami", "leases", "catalog", "openapi.json", "search", "remove", "history", "rollback", "immutable", "quota", "retention", "gc"}
    assert {part for part in route(path).template.split("/") if not part.startswith("{")} <= known


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/v2/", "/v2/"),
        ("/v2/a/blobs/blobs/uploads/", "/v2/{name}/blobs/uploads/"),
        ("/v2/a/blobs/uploads/id", "/v2/{name}/blobs/uploads/{id}"),
        ("/v2/manifests/manifests/1", "/v2/{name}/manifests/{reference}"),
        ("/airlock/v1/catalog/acme/m", "/airlock/v1/catalog/…"),
        ("/airlock/v1/nothing", "other"),
        ("/hf/x/resolve/main/a/b", "/{id}/resolve/{ref}/{path}"),
        ("/v1/hf/acme/m/resolve/main/a", "/{id}/resolve/{ref}/{path}"),
        ("/acme/api/models/maker/tiny/tree/main", "/api/models/{id}/tree/{ref}"),
        ("/v1/hf/acme/api/models/tiny/commit/main", "/api/models/{id}/commit/{ref}"),
        ("/api/models/acme/m/tag/v1", "/api/models/{id}/{kind}/{ref}"),
        ("/acme/m.git/info/lfs/objects/batch", "/{id}.git/info/lfs/objects/batch"),
        ("/acme/m.git/info/lfs/objects/0123/7", "/{id}.git/info/lfs/objects/{oid}"),
    ],
)
def test_templates(path: str, template: str) -> None:
    assert route(path).template == template


def test_what_no_door_serves_is_other() -> None:
    assert route("/favicon.ico") == OTHER == Route("other", "other")


@given(st.binary(max_size=80))
def test_a_request_id_is_well_formed_whatever_was_sent(raw: bytes) -> None:
    found = request_id([(b"host", b"x"), (b"x-request-id", raw)])
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{7,63}", found)
    assert found == raw.decode("latin-1") or re.fullmatch(r"[0-9a-f]{32}", found)
