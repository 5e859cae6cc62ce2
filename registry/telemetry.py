"""One OpenTelemetry span a request, sent by OTLP over http; imported libraries are those of the extra `otel`, and only where it is configured.

Here because nothing else may depend on it. A span holds method, route template, status and request id: no name, key, digest or query.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from registry.routes import METHODS, Route

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE = "airlock-registry"
FLUSH_S = 3.0
LOG = logging.getLogger("airlock.registry")


class Tracing:
    """Spans of one process."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._kind = provider, SpanKind.SERVER
        self._tracer = provider.get_tracer("airlock.registry")
        self._context = TraceContextTextMapPropagator()

    def record(self, route: Route, method: str, status: int, request_id: str, parent: str, began_ns: int, ended_ns: int) -> None:
        """Sends the span of one finished request; `parent` is its traceparent header (W3C Trace Context), empty where it had none."""
        from opentelemetry.trace import Status, StatusCode

        shown = method if method in METHODS else "_OTHER"
        context = self._context.extract({"traceparent": parent}) if parent else None
        attributes: dict[str, str | int] = {"http.request.method": shown, "http.route": route.template, "airlock.request_id": request_id}
        span = self._tracer.start_span(f"{shown} {route.template}", context=context, kind=self._kind, attributes=attributes, start_time=began_ns)
        if status:
            span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what is left, for at most a few seconds: a collector that is away holds no stop."""
        ending = threading.Thread(target=self._provider.shutdown, name="otel-end", daemon=True)
        ending.start()
        ending.join(FLUSH_S)


def start(environ: Mapping[str, str]) -> Tracing | None:
    """Tracing where an OTLP endpoint is set and the extra is installed, else None."""
    if not any(environ.get(name) for name in ENDPOINTS) or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        LOG.warning("an OTLP endpoint is set, but the module %s is missing: pip install 'airlock[otel]'", error.name)
        return None
    provider = TracerProvider(shutdown_on_exit=False, resource=Resource.create({SERVICE_NAME: environ.get("OTEL_SERVICE_NAME", SERVICE)}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), max_export_batch_size=512, schedule_delay_millis=1000))
    return Tracing(provider)
