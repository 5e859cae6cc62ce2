"""OpenTelemetry: spans reach a collector where one is configured, hold no name and no key, and without one nothing is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.contracts.doors import new_site
from tests.fakes.otlp import Receiver
from tests.operated import operated, wait_for

pytestmark = pytest.mark.server


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


def spans(receiver: Receiver) -> list[dict[str, Any]]:
    out = []
    for body in list(receiver.bodies):
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            for span in (s for scope in resource.scope_spans for s in scope.spans):
                values = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
                out.append({"name": span.name, "service": service, "trace": span.trace_id.hex(), "parent": span.parent_span_id.hex(), **values})
    return out


def test_a_span_for_each_request_without_names_or_keys(tmp_path: Path, receiver: Receiver) -> None:
    keys = new_site(tmp_path / "data")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with operated(tmp_path / "data", keys, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url) as server:
        server.image("acme/private-name", "some-tag", [b"layer"])
        server.ask("GET", "/v2/acme/private-name/manifests/some-tag", X_Request_ID="request-one", traceparent=parent)
        server.ask("GET", "/private/namespace/resolve/main/file.txt?token=private")
        server.ask("BREW", "/private-pot")
        server.process.terminate()
        assert server.ended() == 0, "what is left is sent at the end"
    assert set(receiver.paths) == {"/v1/traces"}
    found = spans(receiver)
    asked = next(s for s in found if s.get("airlock.request_id") == "request-one")
    assert asked == {
        "name": "GET /v2/{name}/manifests/{reference}",
        "service": "airlock-registry",
        "trace": "0af7651916cd43dd8448eb211c80319c",
        "parent": "b7ad6b7169203331",
        "http.request.method": "GET",
        "http.route": "/v2/{name}/manifests/{reference}",
        "http.response.status_code": 200,
        "airlock.request_id": "request-one",
    }
    assert {"GET /{id}/resolve/{ref}/{path}", "PUT /v2/{name}/manifests/{reference}"} <= {s["name"] for s in found}
    raw = b"".join(receiver.bodies)
    assert b"private" not in raw and b"nvapi-" not in raw and b"some-tag" not in raw


def test_a_collector_that_is_away_holds_nobody(tmp_path: Path) -> None:
    keys = new_site(tmp_path / "data")
    with operated(tmp_path / "data", keys, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9") as server:
        for _ in range(20):
            assert server.ask("GET", "/v2/").status == 200
        server.process.terminate()
        wait_for(lambda: server.process.poll() == 0, "the end", 60)
    assert "Traceback" not in server.log.read_text()


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys, registry.commands.serve, registry.telemetry as t\n"
        "assert t.start({}) is None\n"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_extra_a_line_says_so() -> None:
    code = (
        "import logging, sys\n"
        "logging.basicConfig(format='%(message)s')\n"
        "sys.modules['opentelemetry'] = None\n"
        "import registry.telemetry as t\n"
        "assert t.start({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://127.0.0.1:9'}) is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "airlock[otel]" in done.stderr and "Traceback" not in done.stderr
