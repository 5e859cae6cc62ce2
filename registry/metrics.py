"""The registry's figures for Prometheus, in a registry of its own; it reads nothing and knows no route.

Here because labels are decided in one place: each has a small fixed set of values, never a name, key, digest or text of a client.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics, generate_latest

from registry.routes import METHODS, Route

MOST_REASONS = 64
MOST_FIGURES = 32
STATE = {
    "airlock_audit_waiting": "Events that wait for the signed log, counted up to 5000",
    "airlock_audit_oldest_seconds": "How long the oldest of them waits",
    "airlock_audit_forked": "1 where the database contradicts what was signed",
    "airlock_clock_behind_seconds": "How far the clock is behind the lowest time that it can be",
}
_WORD = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_SECONDS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 600.0)
Jobs = Mapping[str, Mapping[str, float]]
Ends = Mapping[str, tuple[float, int]]


class Metrics:
    """Counters of one process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "airlock_http_requests", "Requests by door, method, status class", ["door", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram("airlock_http_request_seconds", "Time to the last byte", ["door"], buckets=_SECONDS, registry=self.registry)
        self.bytes = Counter("airlock_http_bytes", "Body bytes received and sent", ["direction"], registry=self.registry)
        self.pulls = Counter("airlock_pulls", "Objects handed out or redirected to, by kind", ["kind"], registry=self.registry)
        self.denials = Counter("airlock_denials", "Refused callers by reason", ["reason"], registry=self.registry)
        self.faults = Counter("airlock_errors", "Requests that failed for us, by what failed", ["source"], registry=self.registry)
        self._uploads = Gauge("airlock_uploads", "Uploads that were begun and neither ended nor expired", ["state"], registry=self.registry)
        self._figures = Gauge(
            "airlock_job_figure", "Figures of a job's last run, its begin and end among them", ["job", "figure"], registry=self.registry
        )
        self._days = Gauge("airlock_expires_days", "Days to the nearest end that is ahead", ["kind"], registry=self.registry)
        self._ended = Gauge("airlock_expired", "How many ended and were not renewed", ["kind"], registry=self.registry)
        self._state = {name: Gauge(name, words, registry=self.registry) for name, words in STATE.items()}
        self._lock = threading.Lock()
        ProcessCollector(registry=self.registry)
        self._reasons: set[str] = set()
        for source in ("database", "store", "internal"):
            self.faults.labels(source)

    def observe(self, route: Route, method: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Counts one finished request; status 0 is a client that left before an answer."""
        self.requests.labels(route.door, method if method in METHODS else "other", f"{status // 100}xx" if status else "none").inc()
        self.seconds.labels(route.door).observe(seconds)
        if received:
            self.bytes.labels("in").inc(received)
        if sent:
            self.bytes.labels("out").inc(sent)
        if route.kind and method == "GET" and status in (200, 206, 307):
            self.pulls.labels(route.kind).inc()

    def denied(self, reason: str) -> None:
        """Counts a refusal by its reason, one of our own words."""
        if not _WORD.match(reason) or (reason not in self._reasons and len(self._reasons) >= MOST_REASONS):
            reason = "other"
        self._reasons.add(reason)
        self.denials.labels(reason).inc()

    def failed(self, source: str) -> None:
        """Counts a failure of the `database`, the `store` or our own code (`internal`)."""
        self.faults.labels(source).inc()

    def text(self, uploads: int | None, jobs: Jobs, ends: Ends = MappingProxyType({}), state: Mapping[str, float] = MappingProxyType({})) -> bytes:
        """The exposition in Prometheus' text format, with figures of the database; None leaves out what could not be read.

        `ends` are for each kind the days to the nearest end and how many ended, `state` values of STATE, not a number for what is not known.
        """
        with self._lock:
            self._days.clear()
            self._ended.clear()
            for kind, (days, ended) in ends.items():
                if days < float("inf"):
                    self._days.labels(kind).set(days)
                self._ended.labels(kind).set(ended)
            for name, gauge in self._state.items():
                gauge.set(state.get(name, float("nan")))
            self._figures.clear()
            for job, values in jobs.items():
                known = [(name, value) for name, value in values.items() if _WORD.match(name)]
                for name, value in known[:MOST_FIGURES] if _WORD.match(job) else ():
                    self._figures.labels(job, name).set(value)
            self._uploads.clear()
            if uploads is not None:
                self._uploads.labels("open").set(uploads)
            return generate_latest(self.registry)
