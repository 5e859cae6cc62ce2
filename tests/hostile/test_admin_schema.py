"""The product's own API against its OpenAPI document: exactly the served routes are in it, and generated requests get what it says, never a 5xx."""

from __future__ import annotations

import ast
import json
import os
import random
import re
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from registry.openapi import document
from registry.routes import route
from tests.conftest import ROOT, airlock
from tests.contracts.doors import Door, new_site, serving

pytestmark = pytest.mark.server
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
SEED = int(os.environ.get("AIRLOCK_TEST_SEED", random.SystemRandom().randrange(2**32)))
schema = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A server with two repositories, so that generated names may hit something."""
    data = tmp_path_factory.mktemp("schema") / "data"
    keys = new_site(data)
    argv = ("key", "create", "--data", str(data), "--org", "site", "--models", "**", "--actions", "pull,push,run,admin", "--json")
    keys["site"] = json.loads(airlock(*argv).stdout)["key"]  # the site's administrator, who may collect and set quotas
    with serving(data, keys) as found:
        found.image("acme/m", "1", [b"one"])
        found.image("acme/m", "2", [b"two"])
        found.image("acme/0", "0", [b"three"])
        yield found
        assert "Traceback" not in found.log.read_text()


def filled(path: str) -> str:
    """A path of the document with names in place of its fields."""
    for field, name in (("name", "acme/m"), ("org", "acme"), ("key", "key-0000000000000000")):
        path = path.replace(f"{{{field}}}", name)
    return path


def served(door: Door, method: str, path: str) -> bool:
    """Whether the door has that route, whatever it thinks of the request; a path of other methods says which."""
    answer = door.ask(method, path, b"{" if method != "GET" else None)
    if answer.status == 405:
        assert method not in answer.headers["allow"].split(", ") and answer.json()["expected"] == answer.headers["allow"]
        return False
    return answer.status != 404 or not answer.json().get("what", "").startswith("no route")


def test_the_document_is_served_to_everybody(door: Door) -> None:
    answer = door.ask("GET", "/airlock/v1/openapi.json", who=None)
    assert (answer.status, answer.json()) == (200, json.loads(json.dumps(document())))


def test_the_document_lists_exactly_the_served_routes(door: Door) -> None:
    """Every word of the door's source is tried as a path, alone and with a name behind it, with every method."""
    documented = {(method.upper(), path) for path, operations in document()["paths"].items() for method in operations}
    sources = [ast.parse((ROOT / "registry" / name).read_text()) for name in ("protocols/admin.py", "verbs.py")]
    texts = {node.value for source in sources for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words = {word.removeprefix("/airlock/v1/").strip("/") for word in texts}
    words = {word for word in words if word and word.replace(".", "").replace("/", "").isalnum()} | {"openapi.json"}
    assert len(words) > 12
    for word in sorted(words):
        for tail in ("", "/acme/m", "/acme"):
            for method in METHODS:
                path = f"/airlock/v1/{word}{tail}"
                wanted = any(m == method and re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(shown)), path) for m, shown in documented)
                assert served(door, method, path) == wanted, (method, path)
    for method, path in documented:
        assert served(door, method, filled(path)), (method, path)


def test_every_documented_path_is_a_route_of_the_figures() -> None:
    for path in document()["paths"]:
        found = route(filled(path))
        assert found.door == "admin" and path.startswith(found.template.split("/…")[0]), path


def ask_as_everybody(case: schemathesis.Case, door: Door) -> None:
    for who in ("site", "acme", "other"):
        response = case.call(base_url=door.url, headers={"Authorization": f"Bearer {door.keys[who]}"})
        case.validate_response(response, checks=CHECKS)


@schema.parametrize()
@seed(SEED)
@settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_generated_requests_get_what_the_document_says(case: schemathesis.Case, door: Door) -> None:
    """The seed stands in what a failure prints; AIRLOCK_TEST_SEED repeats its run."""
    print(f"AIRLOCK_TEST_SEED={SEED}")
    ask_as_everybody(case, door)


@pytest.mark.full
@schema.parametrize()
@seed(SEED)
@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_many_generated_requests_get_what_the_document_says(case: schemathesis.Case, door: Door) -> None:
    print(f"AIRLOCK_TEST_SEED={SEED}")
    ask_as_everybody(case, door)


@schema.parametrize()
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_without_a_key_nothing_but_a_refusal(case: schemathesis.Case, door: Door) -> None:
    response = case.call(base_url=door.url)
    public = case.operation.path in ("/healthz", "/airlock/v1/openapi.json")
    assert response.status_code in ((200, 404, 405) if public else (400, 401, 404, 405, 429)), response.text
