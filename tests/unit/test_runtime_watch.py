"""The runtime's watch, look by look, against a stand-in registry over real HTTP: what keeps it from renewing, and what clients are told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifact import trust
from artifact.errors import AirlockError, Unavailable
from artifact.grant import date
from artifact.remote import RemoteRegistry
from runtime import leases
from runtime.check import examine
from runtime.entitlement import obtain_lease
from runtime.settings import from_environment
from runtime.watch import Watch
from tests.fakes.site import Site
from tests.unit.test_runtime_entitlement import CHOICE, KEY, LEASE_KEY, TRUST, claims

RECEIPT = {"digest": CHOICE.model_digest, "bytes": 5, "files": 1}


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site(KEY)
    given(made)
    made.standing = told()
    yield made
    made.close()


def given(site: Site, **changed: Any) -> None:
    site.lease = lambda body: (200, {"lease": trust.sign_jws(LEASE_KEY, "lease+jwt", claims(body, **changed)), "now": int(time.time())})


def told(**changed: Any) -> dict[str, Any]:
    now = time.time()
    document = {"jti": "e1", "serial": 1, "ends": date(now + 5 * 86400), "grace_ends": date(now + 5 * 86400), "revoked_at": ""}
    grants = [{"grant_id": "g1", "models": ["acme/*"], "actions": ["pull", "run"], "ends": "", "grace_ends": ""}]
    facts = {"key_id": "k1", "org": "acme", "tier": "developer", "key_ends": "", "entitlement": document, "grants": grants}
    return facts | {"revocation_serial": 0, "now": date(now)} | changed


def watching(site: Site, folder: Path, **more: Any) -> Watch:
    remote = RemoteRegistry(site.url, KEY)
    return Watch(remote, CHOICE, lambda: TRUST, folder, obtain_lease(remote, CHOICE, TRUST, folder), **more)


def asked(site: Site, path: str) -> int:
    return sum(path in line for line in site.log)


def test_a_receipt_that_is_not_taken_keeps_up_no_renewal(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path, fresh=False, receipt=RECEIPT)
    remote = watch._remote

    class Broken:
        """The registry, whose receipts fail as behind a proxy that has no upstream for them."""

        def api(self, method: str, path: str, body: Any = None) -> dict[str, object]:
            if path.endswith("/verified"):
                raise Unavailable("503")
            return remote.api(method, path, body)

    watch._remote = Broken()
    watch.step()
    assert watch.state() == "valid" and watch.known.renewed_at and not watch.known.away and not site.taken
    watch._remote = remote
    watch.step()
    watch.step()
    assert site.taken == [("verified", {"lease": "j1", **RECEIPT})], "once, and later"


def test_a_standing_that_was_not_there_is_asked_again(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path)
    site.standing = None
    watch.step()
    assert not watch.known.ends and not watch.warning()
    site.standing = told()
    watch.step()
    assert asked(site, "/standing") == 2 and "the entitlement ends on" in watch.warning()


@pytest.mark.parametrize(("under", "warned"), [("", False), ("e1", True), (None, True)])
def test_an_entitlement_that_the_model_does_not_need_is_not_warned_of(site: Site, tmp_path: Path, under: str | None, warned: bool) -> None:
    given(site, **({} if under is None else {"ent_jti": under}))
    watch = watching(site, tmp_path)
    watch.step()
    assert ("entitlement" in watch.warning()) == warned
    assert any('of="entitlement"' in line for line in watch.metrics()) == warned
    (tmp_path / "cache" / "leases").mkdir(parents=True)
    for path in tmp_path.glob("*.json"):
        path.rename(tmp_path / "cache" / "leases" / path.name)
    settings = from_environment({"NGC_API_KEY": KEY, "AIRLOCK_REGISTRY": site.url}, "acme/tiny:1")
    found = examine(settings, "acme/tiny", tmp_path / "cache")
    assert found.error is None and ("entitlement" in {e.kind for e in found.ends}) == warned
    assert "entitlement" in {e.kind for e in examine(settings, "acme/tiny", None).ends}, "without a lease nothing tells it"


def test_no_word_of_the_registry_reaches_a_client(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path, fresh=False)
    site.lease = lambda body: (403, {"reason": "nvapi-key-of-acme/secret-model", "what": "no"})
    watch.step()
    assert watch.known.refused and watch.warning().startswith("the lease is not renewed (refused)")
    site.lease = lambda body: (503, {"reason": "acme/secret-model", "what": "no"})
    watch.step()
    shown = watch.warning() + "\n".join(watch.metrics())
    assert "secret-model" not in shown and "nvapi" not in shown


def test_a_404_of_a_proxy_takes_no_lease_back(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path, fresh=False)
    site.lease = lambda body: (404, {"page": "default backend - 404"})
    watch.step()
    assert (watch.known.away, watch.known.refused) == ("connection", "")
    assert [k.revoked_at for k in leases.kept(tmp_path)] == [0.0]
    with pytest.raises(AirlockError) as caught:
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)
    assert isinstance(caught.value, Unavailable)
    site.lease = lambda body: (404, {"reason": "not_visible", "what": "no"})
    watch.step()
    assert watch.known.refused == "not_visible" and leases.kept(tmp_path)[0].revoked_at
