"""`airlock site init|trust|issuer|secrets|rotate`: a site's secrets, the sender and the issuers it trusts; what its runtimes are given."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

from artifact.errors import Invalid, NotFound, Unavailable
from registry.home import MAX_ROOT_BYTES, Home
from registry.keyring import ROTATED
from registry.settings import Settings
from registry.wiring import open_site

EXAMPLES = """examples:
  airlock site init --data /srv/airlock --trust-root 1.root.json --sha256 3f4c...
  airlock site trust --data /srv/airlock --to site-trust.json
  airlock site secrets --data /srv/airlock
  airlock site rotate lease --data /srv/airlock
  airlock site issuer issuer.pub --sha256 51ab... --data /srv/airlock"""

TOLD = {
    "lease": " Runtimes need the new site-trust.json at once (airlock site trust), if --prepare did not come first.",
    "release": " Runtimes need the new site-trust.json at once (airlock site trust), if --prepare did not come first.",
    "entitlement": " Documents of the old root count until it is taken from secrets/previous.",
}


def main(argv: list[str]) -> int:
    """Runs one of them; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="airlock site", description="Set up a closed site.", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = parser.add_subparsers(dest="word", required=True)
    init = words.add_parser("init", help="make the data directory with its secrets and pin the sender of bundles", epilog=EXAMPLES.splitlines()[1])
    give = words.add_parser("trust", help="write site-trust.json, the one file that runtimes pin", epilog=EXAMPLES.splitlines()[2])
    show = words.add_parser("secrets", help="list the secrets by their public ids, never a value", epilog=EXAMPLES.splitlines()[3])
    turn = words.add_parser("rotate", help="replace a secret; the old one stays for verification", epilog=EXAMPLES.splitlines()[4])
    turn.add_argument("name", choices=ROTATED, help="which; docs/operations.md, Secrets, says when the old one may go")
    turn.add_argument("--prepare", action="store_true", help="only make the next one: it is accepted from now on, and used from the next rotate on")
    pin = words.add_parser("issuer", help="pin the key of who may issue entitlements for this site", epilog=EXAMPLES.splitlines()[5])
    pin.add_argument("file", type=Path, metavar="FILE", help="the public half that airlock entitlement issuer wrote")
    pin.add_argument("--sha256", required=True, help="the SHA-256 that airlock entitlement issuer printed, from paper")
    data_default = os.environ.get("AIRLOCK_DATA")
    for word in (init, give, show, turn, pin):
        word.add_argument("--data", type=Path, default=data_default, required=not data_default, help="the data directory (env AIRLOCK_DATA)")
        word.add_argument("--json", action="store_true", help="print one JSON object")
    init.add_argument("--trust-root", type=Path, help="1.root.json of the mirror; without it the site accepts no bundle yet")
    init.add_argument("--sha256", default="", help="the SHA-256 that airlock mirror init printed, from paper")
    give.add_argument("--to", type=Path, required=True, help="the file to write")
    given = parser.parse_args(argv)
    return {"init": _init, "trust": _trust, "secrets": _secrets, "rotate": _rotate, "issuer": _issuer}[given.word](given)


def _init(given: argparse.Namespace) -> int:
    if given.sha256 and given.trust_root is None:
        raise Invalid("--sha256 was given without --trust-root", expected="both, or neither")
    raw = _read(given.trust_root, "1.root.json of the mirror") if given.trust_root else b""
    if raw:
        Home.check_root(raw, given.sha256)  # before anything is made
    home = Home.open(Path(given.data), create=True)
    pinned = home.pin_root(raw, given.sha256) if raw else next(iter(home.senders().values()), "")
    trust = home.site_trust()
    facts = {"data": str(home.path), "instance": home.instance, "trust_root_sha256": pinned}
    facts |= {"release_key": next(iter(trust.release_keys)), "lease_key": next(iter(trust.lease_keys))}
    if given.json:
        print(json.dumps(facts))
        return 0
    print(f"site          {home.instance} in {home.path}")
    print(f"trust root    SHA-256 {pinned}" if pinned else "trust root    none: no bundle can enter (airlock site init --trust-root FILE)")
    print(f"release key   {facts['release_key']}")
    print(f"lease key     {facts['lease_key']}")
    if pinned and not given.sha256:
        print("Compare the SHA-256 with the line that airlock mirror init printed; --sha256 does it for you.")
    return 0


def _read(path: Path, expected: str) -> bytes:
    try:
        with path.open("rb") as source:
            return source.read(MAX_ROOT_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", expected=expected) from error


def _trust(given: argparse.Namespace) -> int:
    home = Home.open(Path(given.data))
    serial = 0
    if home.database or home.elsewhere:
        with open_site(Settings.load(given.data), background=False) as site:
            serial = site.documents.revocation_serial()
    raw = json.dumps(home.site_trust(serial).as_json(), sort_keys=True, indent=1).encode() + b"\n"
    temporary = given.to.with_name(given.to.name + ".partial")
    try:
        temporary.write_bytes(raw)
        temporary.chmod(0o644)
        temporary.replace(given.to)
    except OSError as error:
        raise Unavailable(f"{given.to} cannot be written: {error.strerror}", expected="a directory that this user may write") from error
    digest = hashlib.sha256(raw).hexdigest()
    if given.json:
        print(json.dumps({"file": str(given.to), "sha256": digest, "instance": home.instance, "revocation_serial": serial}))
    else:
        print(f"wrote {given.to} (SHA-256 {digest}) for the runtimes of site {home.instance}; leases below revocation serial {serial} are refused")
    return 0


def _issuer(given: argparse.Namespace) -> int:
    home = Home.open(Path(given.data))
    kid = home.pin_issuer(_read(given.file, "the public key of an issuer").decode("ascii", "replace"), given.sha256)
    words = f"pinned the issuer {kid}: site {home.instance} takes its entitlements and revocation lists"
    print(json.dumps({"kid": kid, "instance": home.instance}) if given.json else words)
    return 0


def _secrets(given: argparse.Namespace) -> int:
    rows = Home.open(Path(given.data)).keys.rows()
    lines = [f"{r['name']:<12}{r['id'] or 'absent':<18}{r['source']}  replaced: {', '.join(_texts(r['previous'])) or 'none'}" for r in rows]
    print(json.dumps({"items": rows}) if given.json else "\n".join(lines))
    return 0


def _texts(value: object) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else []


def _rotate(given: argparse.Namespace) -> int:
    keys = Home.open(Path(given.data)).keys
    if given.prepare:
        made = keys.prepare(given.name)
        print(json.dumps({"name": given.name, "next": made}) if given.json else f"{given.name}: {made} is the next one, and accepted from now on")
        return 0
    before, after = keys.rotate(given.name)
    if given.json:
        print(json.dumps({"name": given.name, "before": before, "after": after}))
        return 0
    print(f"{given.name}: {after} in place of {before}, which stays for verification")
    print("Start every server process of this site again." + TOLD.get(given.name, ""))
    return 0
