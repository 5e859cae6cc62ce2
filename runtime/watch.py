"""A thread beside the front: renews the lease, asks what the key still has, and says early what ends when and what stops then.

It never ends or hinders what runs: an end that comes refuses the next start, not this one. Ends are judged by a clock that no wall clock takes back
(runtime.leases.Clock); when to renew is counted on the monotonic clock from the moment at which the lease came: a wrong clock does not make it hurry.
Nothing that clients see (header, readiness, metrics) holds a name, an id or a word of the registry.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from artifact.errors import AirlockError, Denied, NotFound, Unauthenticated, Unavailable
from artifact.grant import SOON_S, Lease, date, decide_lease
from artifact.trust import SiteTrust
from runtime import entitlement, leases, standing
from runtime.leases import number, text
from runtime.settings import EXIT_CODES
from runtime.standing import DAY, End

log = logging.getLogger("airlock")
FIRST_WAIT_S = 5.0  # between two tries after the first failure; doubled each time, up to the watch's period
REFUSALS = (Denied, Unauthenticated, NotFound)
STATES = ("valid", "grace", "over", "refused")
JOIN_S = 1.0
HEADER = 500  # characters of the warning header


@dataclass(frozen=True)
class Known:
    """What the watch knows; replaced as a whole, so that the front reads it without a lock. `refused` and `away` are reasons, empty for none."""

    lease: Lease
    renewed_at: float = 0.0
    refused: str = ""
    away: str = ""
    ends: tuple[End, ...] = ()


class Voice(Protocol):
    """What the front asks when it answers: words for its readiness and header, lines for its metrics."""

    def warning(self) -> str:
        """One line without names, empty when all is well."""

    def metrics(self) -> list[str]:
        """Lines of Prometheus text."""


class Voices:
    """Several as one."""

    def __init__(self, *voices: Voice) -> None:
        self._voices = voices

    def warning(self) -> str:
        """What they say, in their order."""
        return "; ".join(filter(None, (voice.warning() for voice in self._voices)))[:HEADER]

    def metrics(self) -> list[str]:
        """All their lines."""
        return [line for voice in self._voices for line in voice.metrics()]


class Watch:
    """The watch over one running model; start() and stop() are the front's, warning(), metrics() and known anybody's."""

    def __init__(
        self,
        remote: entitlement.Api,
        choice: entitlement.Choice,
        trust: Callable[[], SiteTrust],
        folder: Path,
        claims: Mapping[str, object],
        *,
        every_s: float = 900.0,
        fresh: bool = True,
        receipt: Mapping[str, object] | None = None,
    ) -> None:
        self._remote, self._choice, self._read_trust, self._folder, self._every_s = remote, choice, trust, folder, every_s
        self._trust = trust()
        self._clock = leases.Clock(folder, number(claims, "iat"))
        self._receipt = {"lease": text(claims, "jti"), **receipt} if receipt else None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="airlock-watch", daemon=True)
        self._failures, self._told, self._said, self._results = 0, dict[tuple[str, str, float], int](), "", Counter[str]()
        self._without_standing = False
        self.known = Known(Lease(0.0))
        self._take(claims, due_now=not fresh)
        if fresh:
            self.known = replace(self.known, renewed_at=self._clock.now())

    def start(self) -> None:
        """Begins to watch; the first thing is the receipt, then the question what the key has."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch; a request that hangs is left to itself."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        wait = 0.0
        while not self._stopping.wait(wait):
            try:
                wait = self.step()
            except Exception:  # whatever it is: the watch goes on, and says so
                log.exception("the watch over the lease failed; it goes on")
                wait = self._every_s

    def step(self) -> float:
        """One look: receipt, renewal if it is due, standing, lines; returns the seconds until the next."""
        try:
            self._send_receipt()
            if time.monotonic() >= self._due:
                self._renew()
            self._ask()
        except Unavailable as error:
            self._trouble(error)
        except REFUSALS as error:
            self._no(error)
        except AirlockError as error:  # an answer that is none of this site's registry
            self._trouble(error)
        else:
            self._failures = 0
            self.known = replace(self.known, away="")
            if not self.known.refused:
                self._say("")
        self._clock.save()
        self._lines()
        if self._failures:
            return min(self._every_s, FIRST_WAIT_S * float(1 << min(self._failures - 1, 20))) * random.uniform(0.9, 1.1)  # noqa: S311 - spreads a crowd
        return max(0.1, min(self._every_s, self._due - time.monotonic()))

    def _send_receipt(self) -> None:
        """Tells the registry once which bytes were verified here; one that refuses is not asked again, one that is away is, and keeps up nothing."""
        if self._receipt is None:
            return
        try:
            self._remote.api("POST", "/airlock/v1/verified", self._receipt)
        except Unavailable:
            return
        except AirlockError as error:
            log.info("the registry does not take the receipt of the verified weights: %s", error.what)
        self._receipt = None

    def _renew(self) -> None:
        with suppress(AirlockError):  # a file that is being replaced: the keys of before still count
            self._trust = self._read_trust()
        try:
            claims = entitlement.obtain_lease(self._remote, self._choice, self._trust, self._folder)
        except AirlockError as error:
            self._results["refused" if isinstance(error, REFUSALS) else "failed"] += 1
            raise
        self._take(claims, due_now=False)
        self._results["ok"] += 1
        self.known = replace(self.known, renewed_at=self._clock.now(), refused="", away="")
        log.info("the lease is renewed: %s until %s", text(claims, "jti"), entitlement.until(claims))

    def _take(self, claims: Mapping[str, object], *, due_now: bool) -> None:
        """This lease is the one that counts; a fresh one is due after its own time, one from the cache as soon as the registry answers."""
        self._clock.signed(number(claims, "iat"))
        self._own = leases.own(claims)
        self._serial = int(number(claims, "revocation_serial"))
        after = max(1.0, number(claims, "renew_after") - number(claims, "iat"))
        self._due = time.monotonic() + (0.0 if due_now else after)
        self.known = replace(self.known, lease=Lease(number(claims, "exp"), leases.grace_of(claims)))

    def _ask(self) -> None:
        """What the key has now; a rising revocation serial renews at once, so that the lease in the cache is worth something tomorrow."""
        try:
            found = standing.parse(self._remote.api("GET", "/airlock/v1/standing"))
        except NotFound:  # of an older registry, or of a proxy whose registry is away: it is asked again
            if not self._without_standing:
                log.info("this registry does not tell what a key has: only the lease is watched")
            self._without_standing = True
            return
        self._without_standing = False
        self.known = replace(self.known, ends=found.running(self._choice.model, own=self._own))
        if found.revocation_serial > self._serial:
            self._serial = found.revocation_serial
            self._renew()

    def _trouble(self, error: AirlockError) -> None:
        """The registry is away, or what answers in its place makes no sense: nothing is taken back, the lease runs down."""
        self._failures += 1
        self.known = replace(self.known, away=error.reason)
        self._say(f"the registry does not answer as it should ({error.reason}: {error.what}): the lease is not renewed; {self._stops()}", error)

    def _no(self, error: AirlockError) -> None:
        """The registry answers and says no; what it takes back is marked in the cache."""
        self._failures += 1
        self._due = time.monotonic()  # what was taken back can be given again: ask for a lease, not only for the standing
        entitlement.refuse_kept(self._folder, self._choice.model, self._choice.ref, self._choice.host, error.reason)
        self.known = replace(self.known, refused=error.reason, away="")
        self._say(f"the renewal of the lease is refused ({error.reason}): {error.what}; {self._stops()}", error)

    def _stops(self) -> str:
        """What stops working when: after a no that takes back, everything but what runs; else, while the registry is away, with the lease."""
        if self.known.refused in entitlement.WITHDRAWN:
            return "no new start of this model from now on; what runs goes on"
        if self._last() <= self._clock.now():
            return "no new start of this model until the registry gives a lease; what runs goes on"
        if self.known.refused:
            return f"a new start is refused, and without the registry there is none after {date(self._last())}; what runs goes on"
        return f"no new start of this model after {date(self._last())}, unless the registry answers; what runs goes on"

    def _say(self, line: str, error: AirlockError | None = None) -> None:
        """A line when the trouble changes, none while it stays the same."""
        now = f"{self.state()} {self.known.refused} {self.known.away}" if error else ""
        if now == self._said:
            return
        if error:
            log.log(logging.ERROR if error.reason == "tls" else logging.WARNING, "%s%s", line, f" (fix: {error.do})" if error.do else "")
        else:
            log.info("the registry answers again; the lease ends on %s", date(self.known.lease.expires))
        self._said = now

    def _lines(self) -> None:
        """One line for each end at each of its thresholds, and one behind it."""
        now = self._clock.now()
        lease = End("lease", "", self.known.lease.expires, "every new start while the registry is away", self._last())
        # A lease that is renewed daily is always about to end: it is told when its renewal fails.
        for end in (*self.known.ends, *([lease] if self.known.away or self.known.refused else [])):
            level, mark = standing.threshold(end.days(now)), (end.kind, end.item, end.revoked_at or end.ends)
            if level is None or level >= self._told.get(mark, 1000):
                continue
            self._told[mark] = level
            log.warning("%s: that %s %s; what runs goes on", end.words(now), "has stopped" if end.over(now) else "stops", end.stops)

    def _last(self) -> float:
        return self.known.lease.expires + self.known.lease.grace_s

    # ---- for the front, from any thread

    def state(self) -> str:
        """What a start with the registry away would be told: valid, grace, over; refused where the registry says no."""
        if self.known.refused:
            return "refused"
        found = decide_lease(self.known.lease, self._clock.now())
        return "over" if not found.allow else "grace" if found.reason == "grace" else "valid"

    def warning(self) -> str:
        """What a client's operator should know, on one line without names; empty when all is well."""
        now, known = self._clock.now(), self.known
        parts = [e.words(now) for e in known.ends if e.days(now) * DAY <= SOON_S]
        if known.refused or known.away:
            reason = known.refused or known.away
            code = reason if reason in EXIT_CODES or reason == "connection" else "refused" if known.refused else "no answer"  # no word from outside
            parts.insert(0, f"the lease is not renewed ({code}); {self._stops()}")
        return "; ".join(parts).encode("ascii", "replace").decode()[:HEADER]

    def metrics(self) -> list[str]:
        """Lines of Prometheus text: days left by kind (absent where there is no end), the lease's state, its last renewal, renewals by result."""
        now, known, state = self._clock.now(), self.known, self.state()
        left = {"lease": (known.lease.expires - now) / DAY} | {e.kind: e.days(now) for e in known.ends if e.days(now) != float("inf")}
        lines = ["# TYPE airlock_days_left gauge", *(f'airlock_days_left{{of="{kind}"}} {days:.4f}' for kind, days in sorted(left.items()))]
        lines += [
            "# TYPE airlock_start_days_left gauge",
            f"airlock_start_days_left {max(0.0, (self._last() - now) / DAY) if state != 'refused' else 0:.4f}",
        ]
        lines += ["# TYPE airlock_lease_state gauge", *(f'airlock_lease_state{{state="{s}"}} {int(s == state)}' for s in STATES)]
        lines += ["# TYPE airlock_lease_renewed_timestamp_seconds gauge", f"airlock_lease_renewed_timestamp_seconds {known.renewed_at:.0f}"]
        lines += ["# TYPE airlock_lease_renewals_total counter"]
        return lines + [f'airlock_lease_renewals_total{{result="{r}"}} {self._results[r]}' for r in ("ok", "failed", "refused")]
