"""Fourth act: an entitlement and a revocation cross the gap in bundles, what ends soon is told, and the log proves what happened."""

from __future__ import annotations

import json
from pathlib import Path

from demo.refusals import refused
from demo.stage import UID, Stage, demand, tree_bytes
from demo.world import AIRLOCK, LLAMA, World

DAYS = 20
PATTERNS = ("acme/*", "hf/**", "127.0.0.1_*/**")


def crossing(stage: Stage, w: World, document: Path) -> str:
    """Puts a signed document onto the medium and imports it; what the import said."""
    home, data = w.connected / "mirror", w.closed / "data"
    stage.run([AIRLOCK, "mirror", "document", "add", str(document), "--issuer", f"{w.issuer}.pub", "--home", str(home)])
    stage.run([AIRLOCK, "bundle", "pack", "--to", str(w.medium), "--home", str(home)])
    return stage.run([AIRLOCK, "bundle", "import", str(w.medium), "--data", str(data)], closed=True).out


def document(stage: Stage, w: World) -> None:
    """An issuer of the connected side signs what acme is entitled to; the closed side has pinned the issuer's key."""
    data, made = w.closed / "data", w.connected / "acme.entitlement"
    with stage.step("issuer: a key, pinned on the closed side by its SHA-256") as row:
        told = stage.run([AIRLOCK, "entitlement", "issuer", "--to", str(w.issuer), "--json"]).json()
        argv = [AIRLOCK, "site", "issuer", f"{w.issuer}.pub", "--sha256", str(told["sha256"]), "--data", str(data)]
        stage.run(argv, closed=True)
        row.note = f"kid {told['kid']}"
    with stage.step(f"entitlement of acme for {DAYS} days: signed, carried by a bundle") as row:
        w.instance = str(json.loads((data / "site.json").read_text())["instance"])
        patterns = [part for p in PATTERNS for part in ("--models", p)]
        argv = [AIRLOCK, "entitlement", "issue", "--org", "acme", "--tier", "enterprise", *patterns, "--gpus", "8", "--expires", f"{DAYS}d"]
        stage.run([*argv, "--issuer-key", str(w.issuer), "--site", w.instance, "--to", str(made)])
        row.size = made.stat().st_size
        said = crossing(stage, w, made)
        listed = stage.run([AIRLOCK, "entitlement", "list", "--data", str(data), "--json"], closed=True).out
        demand('"acme"' in listed, f"the entitlement is not there: {said}\n{listed}")


def warning(stage: Stage, w: World) -> None:
    """What ends soon is told by the monitoring's command, and by the calendar of the site."""
    with stage.step(f"warning: the entitlement ends in less than {DAYS} days (Nagios: 1)") as row:
        check = [AIRLOCK, "entitlement", "check", "--registry", w.site, "--model", LLAMA, "--nagios"]
        line = stage.run(check, env={"NGC_API_KEY": w.key}, closed=True, uid=UID, expect=1).out.strip()
        demand(line.startswith("WARNING: ") and f"in {DAYS - 1} days" in line, f"no warning of {DAYS - 1} days and some hours: {line}")
        row.note = line.split("|")[0].strip()[:100]
        calendar = [AIRLOCK, "entitlement", "calendar", "--days", "60", "--data", str(w.closed / "data"), "--json"]
        items = stage.run(calendar, closed=True).out
        demand('"entitlement"' in items, f"the calendar does not show it: {items[:500]}")


def revocation(stage: Stage, w: World) -> None:
    """A key is revoked on the connected side; the closed side refuses it once the next bundle is in."""
    data, made = w.closed / "data", w.connected / "revocations"
    argv = [AIRLOCK, "key", "create", "--data", str(data), "--org", "acme", "--tier", "enterprise", "--models", "acme/*"]
    with stage.step("revocation: a key of acme, good before the bundle"):
        key = stage.run([*argv, "--expires", "90d", "--json"], closed=True).json()
        check = [AIRLOCK, "entitlement", "check", "--registry", w.site]
        stage.run(check, env={"NGC_API_KEY": str(key["key"])}, closed=True, uid=UID)
    with stage.step("revocation: the issuer's list, carried by a bundle"):
        revoke = [AIRLOCK, "entitlement", "revoke", "--key", str(key["key_id"]), "--issuer-key", str(w.issuer)]
        stage.run([*revoke, "--to", str(made)])
        crossing(stage, w, made)
    refused(stage, w, "the key that the bundle revoked", str(key["key"]), "the API key was revoked on", 23)


def proof(stage: Stage, w: World) -> None:
    """The audit log leaves the site, holds without it, and does not hold with one byte changed; the report for people."""
    data, export = w.closed / "data", w.closed / "audit.jsonl"
    with stage.step("audit export; audit verify with the pinned key, without the site") as row:
        stage.run([AIRLOCK, "audit", "export", str(export), "--data", str(data)], closed=True)
        key = stage.run([AIRLOCK, "audit", "key", "--data", str(data)], closed=True).out.strip().splitlines()[-1]
        found = stage.run([AIRLOCK, "audit", "verify", str(export), "--key", key, "--json"]).json()
        row.size, row.note = export.stat().st_size, f"{found['size']} entries hold"
    with stage.step("refused: one word of one entry altered (exit 7)") as row:
        altered = w.closed / "audit-altered.jsonl"
        altered.write_bytes(export.read_bytes().replace(b"key_create", b"key_creaTe", 1))
        done = stage.run([AIRLOCK, "audit", "verify", str(altered), "--key", key], expect=7)
        row.note = done.err.strip().splitlines()[-1].removeprefix("airlock: ")[:100]
    with stage.step("audit report: who pulled what under which grant, as a page") as row:
        page = w.closed / "audit-report.html"
        stage.run([AIRLOCK, "audit", "report", "--html", str(page), "--data", str(data)], closed=True)
        text = page.read_text()
        demand(LLAMA in text and "<svg" in text and "nvapi-" not in text, "the page lacks the model or the plots, or shows a key")
        row.size = tree_bytes(page)


def all_of(stage: Stage, w: World) -> None:
    """Every scene."""
    document(stage, w)
    warning(stage, w)
    revocation(stage, w)
    proof(stage, w)
