"""What deciding costs: CPU of one warm decision without its statement, and of the one statement that it needs, on SQLite and PostgreSQL.

The statement is the joint one of a manifest pull: the key, its organisation, member and document, the grants of all four kinds, and the manifest.
The database holds 20,000 keys with a grant each, so that an index that is not used would be seen.
"""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, insert, select, update

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _servers import Server, scratch
from _table import Report, arguments

from artifact.grant import Decision, Entitlement, Grant, Principal, Subject, decide, gpu_bounds, run_ways
from registry import tables as t
from registry.catalog import ensure_org
from registry.home import Home
from registry.lookup import Lookup
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.services.postgres import Postgres

NOW, DAY = time.time(), 86400.0
BAR_US = 100.0
NAME = "nim/bench/model"


def principal(grants: int) -> Principal:
    """A key with so many grants, the last of which gives what is asked for, and a document: nothing is decided at the first look."""
    others = [Grant((f"nim/other-{n}/*", f"acme/team-{n}/**"), ("pull", "run"), id=f"grant-{n}") for n in range(grants - 1)]
    own = Grant(("nim/bench/*",), ("pull", "run"), NOW - DAY, NOW + 30 * DAY, 7 * 86400, "grant-own", "production", 8, ("vllm-*",))
    document = Entitlement(
        "jti", 7, "enterprise", ("nim/**",), ("pull", "run"), NOW - DAY, NOW + 300 * DAY, 0, 64, ("nv-ai-enterprise",), ("dev", "production")
    )
    return Principal("key-bench", "bench", "enterprise", NOW + 90 * DAY, 0.0, (*others, own), entitlement=document, entitled_only=True)


SUBJECT = Subject(NAME, "", "public", "enterprise", "nv-ai-enterprise")


def pull(who: Principal) -> Decision:
    """The decision of a manifest pull."""
    return decide(who, SUBJECT, "pull", NOW)


def run(who: Principal) -> Decision:
    """The decisions of a lease: the run, its profile and its GPUs."""
    found = run_ways(who, SUBJECT, NOW, ("ab" * 32, "vllm-bf16-tp1"))[0]
    gpu_bounds(who, found)
    return found


def refuse(who: Principal) -> Decision:
    """The same pull for a product that the document does not hold, with the words of the refusal."""
    return decide(who, Subject(NAME, "", "public", "enterprise", "another"), "pull", NOW)


def cost(work: Callable[[], object], count: int) -> tuple[float, float]:
    """Microseconds of this process's CPU, and on the wall, for one."""
    for _ in range(count // 10 + 1):
        work()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        work()
    return (time.process_time() - cpu) / count * 1e6, (time.perf_counter() - wall) / count * 1e6


def fill(site: Site, keys: int) -> str:
    """Puts the keys, a member of a team, grants of all four kinds, a document and a manifest into the database; returns the asked key's text."""
    models, actions = '["nim/bench/*"]', '["pull","run"]'
    with site.catalog.writing() as conn:
        org = ensure_org(conn, "bench", NOW)
        grant = Grant(("nim/bench/*",), ("pull", "run"))
        key_id, key = site.entitlements.add_key(conn, org, tier="enterprise", grant=grant, expires=NOW + DAY, at=NOW)
        rows = [{"key_id": f"k{i}", "hmac": secrets.token_bytes(32), "org_id": org, "tier": "developer", "created": NOW} for i in range(keys)]
        conn.execute(insert(t.api_key), rows)
        ids = conn.execute(select(t.api_key.c.id).where(t.api_key.c.note == "", t.api_key.c.key_id != key_id)).scalars().all()
        own = {"org_id": org, "models": models, "actions": actions}
        conn.execute(insert(t.key_grant), [{"grant_id": f"g{i}", "api_key_id": row, **own} for i, row in enumerate(ids)])
        member = _add(conn, t.member, org_id=org, name="ann", created=NOW)
        team = _add(conn, t.team, org_id=org, name="red", created=NOW)
        conn.execute(insert(t.team_member).values(team_id=team, member_id=member))
        conn.execute(update(t.api_key).where(t.api_key.c.key_id == key_id).values(member_id=member))
        for kind, holder in (("member", {"member_id": member}), ("team", {"team_id": team}), ("whole", {})):
            conn.execute(insert(t.key_grant).values(grant_id=f"grant-{kind}", **own, **holder))
        facts = {"jti": "jti", "issuer": "i", "kid": "k", "serial": 1, "tier": "enterprise", "models": '["nim/**"]', "actions": actions}
        facts |= {"products": '["nv-ai-enterprise"]', "environments": '["production"]', "gpus": 64, "iat": NOW, "not_before": NOW - DAY}
        document = _add(conn, t.entitlement, org_id=org, **facts, expires=NOW + 300 * DAY, token="x" * 900, at=NOW)
        conn.execute(update(t.org).where(t.org.c.id == org).values(entitlement_id=document))
        raw = json.dumps({"schemaVersion": 2, "text": "x" * 400}).encode()
        repo = _add(conn, t.repository, name=NAME, visibility="public", requires_tier="enterprise", requires_product="nv-ai-enterprise")
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        made = _add(conn, t.manifest, digest=digest, media_type="application/vnd.oci.image.manifest.v1+json", size=len(raw), raw=raw)
        conn.execute(insert(t.repo_manifest).values(repo_id=repo, manifest_id=made))
        conn.execute(insert(t.ref).values(repo_id=repo, name="1", manifest_id=made))
    if site.engine.dialect.name == "postgresql":
        with site.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.exec_driver_sql("VACUUM ANALYZE")
    return key


def _add(conn: Connection, table: object, **values: object) -> int:
    return int(conn.execute(insert(table).values(**values)).inserted_primary_key[0])  # type: ignore[arg-type, index]


@contextmanager
def opened(folder: Path, database: Postgres | None) -> Iterator[Site]:
    """A site of one of the two databases."""
    Home.open(folder / "data", create=True)
    env = {"AIRLOCK_DATABASE": database.database()} if database else {}
    with open_site(Settings.load(folder / "data", environ=env), background=False) as site:
        yield site


def statement(report: Report, database: Postgres | None, keys: int, count: int) -> None:
    """The rows of one database: the statement alone, and the whole of statement, principal and decision."""
    name = "PostgreSQL" if database else "SQLite"
    with scratch() as folder, opened(folder, database) as site:
        key = fill(site, keys)
        lookup, hmac = Lookup(site.engine), site.entitlements.hmac(key)
        server = Server("postgresql", 0, [database.pid] if database else [])

        def seek() -> Decision:
            who, found = lookup.seek(("manifest", NAME, "1"), hmac=hmac)
            if who is None or found is None or len(who.grants) != 4:
                raise RuntimeError("the statement did not find what was stored")
            return decide(who, found.repo.subject, "pull", NOW)

        if not seek().allow:
            raise RuntimeError(seek().words)
        before = server.cpu()
        cpu, wall = cost(seek, count)
        report.row(f"statement, principal and decision on {name}, {keys + 1:,} keys", cpu, wall, (server.cpu() - before) / (count * 1.1) * 1e6)


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    count, keys = (5_000, 2_000) if args.quick else (50_000, 20_000)
    report = Report("Decisions", ("what", "CPU, us", "wall, us", "CPU of the database's processes, us"))
    for grants in (1, 4, 20):
        who = principal(grants)
        for what, ask, allow in (("pull", pull, True), ("run with its profile and GPUs", run, True), ("refused pull", refuse, False)):
            if ask(who).allow is not allow:
                raise RuntimeError(ask(who).words)
            cpu, wall = min(cost(functools.partial(ask, who), count) for _ in range(args.rounds))
            report.row(f"{what}, {grants} grants and a document", cpu, wall, "")
            if what == "pull":
                report.at_most(f"warm decision of a pull, {grants} grants, CPU without its statement, us", cpu, BAR_US)
    statement(report, None, keys, count // 10)
    database = Postgres.make()
    try:
        statement(report, database, keys, count // 10)
    finally:
        database.remove()
    report.show(args.json)


if __name__ == "__main__":
    main()
