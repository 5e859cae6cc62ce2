"""`airlock entitlement issuer|issue|revoke|import|list|show`: what organisations are entitled to, as signed documents.

With --issuer-key a document is made on a connected side, without any site; else the site's own root signs, and the site takes it in at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import cast

from artifact import documents as d
from artifact import trust
from artifact.documents import Revocations
from artifact.errors import Conflict, Invalid, NotFound, Unavailable
from artifact.grant import TIERS, date
from registry.bodies import moment
from registry.commands.reach import Ask, arguments, commas, everything, given, reached, table, tell
from registry.documents import NEXT_UPDATE, licence_of, revoked_of
from registry.people import Facts

MAX_KEY_BYTES = 64 * 1024
# Word: what it does, and an example.
_VERBS: dict[str, tuple[str, str]] = {
    "issuer": ("make the key of an issuer on the connected side", "airlock entitlement issuer --to issuer.pem"),
    "issue": (
        "make an entitlement of an organisation",
        "airlock entitlement issue --org acme --tier enterprise --models 'hf/**' --gpus 64 --expires 365d --data /srv/airlock",
    ),
    "revoke": ("make the next revocation list", "airlock entitlement revoke JTI --key key-0123456789abcdef --data /srv/airlock"),
    "import": ("take an entitlement or a revocation list in", "airlock entitlement import acme.pem --data /srv/airlock"),
    "list": ("list entitlements", "airlock entitlement list --org acme --data /srv/airlock"),
    "show": ("show one entitlement with its document", "airlock entitlement show JTI --data /srv/airlock"),
}


def _parser() -> argparse.ArgumentParser:
    end = f"example: {_VERBS['issue'][1]}; beside these: airlock entitlement check, airlock entitlement calendar"
    parser = argparse.ArgumentParser(prog="airlock entitlement", description="Entitlements as signed documents.", epilog=end)
    words = parser.add_subparsers(dest="verb", required=True, metavar="|".join(_VERBS))
    made = {verb: words.add_parser(verb, help=text, epilog=f"example: {example}") for verb, (text, example) in _VERBS.items()}
    made["issuer"].add_argument("--to", type=Path, required=True, help="the private half; the public half goes beside it, ending in .pub")
    made["issuer"].add_argument("--json", action="store_true", help="machine-readable output")
    issue = made["issue"]
    issue.add_argument("--org", required=True, help="whose entitlement it is")
    issue.add_argument("--tier", required=True, choices=TIERS, help="developer is for dev and test, enterprise for production too")
    issue.add_argument("--models", action="append", required=True, metavar="PATTERN", help="names: * is one segment, a last ** any rest; repeatable")
    issue.add_argument("--actions", default="pull,run", help="comma-separated (pull,run)")
    issue.add_argument("--product", dest="products", action="append", metavar="NAME", help="a product that it holds; repeatable")
    issue.add_argument("--environments", help="comma-separated (dev of tier developer, dev,production of tier enterprise)")
    issue.add_argument("--gpus", type=int, required=True, help="GPUs that may be leased at once; 0 gives none")
    issue.add_argument("--max-keys", type=int, help="API keys that may live at once (any number)")
    issue.add_argument("--not-before", help="when it takes over: 2030-01-31T00:00:00Z, or a life from now such as 7d (at once)")
    issue.add_argument("--expires", required=True, help="its end: 365d, or 2030-01-31T00:00:00Z")
    issue.add_argument("--grace", help="how long it may still be used behind its end, with a warning: 30d (not at all)")
    issue.add_argument("--site", default="", metavar="INSTANCE", help="with --issuer-key: the instance id of the site, as site init printed it")
    revoke = made["revoke"]
    revoke.add_argument("jti", nargs="*", help="ids of entitlements, as entitlement list shows them")
    revoke.add_argument("--key", dest="key_id", action="append", metavar="KEY_ID", help="an API key by its public id; repeatable")
    revoke.add_argument("--kid", action="append", help="a signing key of an issuer: its documents are refused from then on; repeatable")
    revoke.add_argument("--next-update", help=f"when the next list is due: 30d, or a time ({NEXT_UPDATE})")
    revoke.add_argument("--before", type=Path, metavar="FILE", help="with --issuer-key: the list before this one, whose entries are kept")
    for sub in (issue, revoke):
        sub.add_argument("--issuer-key", type=Path, metavar="FILE", help="sign with this issuer's key, without any site")
        sub.add_argument("--name", default="", help="with --issuer-key: the issuer's name, by which its serials count (the id of its key)")
        sub.add_argument("--serial", type=int, help="with --issuer-key: above that of the document before (the second of now)")
        sub.add_argument("--to", type=Path, help="the file to write (standard output)")
    made["import"].add_argument("file", type=Path, metavar="FILE", help="the document, armoured or bare; - reads standard input")
    made["list"].add_argument("--org", default="", help="of one organisation only")
    made["show"].add_argument("jti", help="the id, as entitlement list shows it")
    for verb, sub in made.items():
        if verb != "issuer":
            arguments(sub)
    return parser


def main(argv: list[str]) -> int:
    """Runs one verb and returns the exit status."""
    args = _parser().parse_args(argv)
    if args.verb == "issuer":
        return _issuer(args)
    if args.verb in ("issue", "revoke"):
        _fitting(args)
        if args.issuer_key:
            return (_issue_alone if args.verb == "issue" else _revoke_alone)(args)
    with reached(args) as ask:
        return {"issue": _made, "revoke": _made, "import": _import, "list": _list, "show": _show}[args.verb](ask, args)


def _fitting(args: argparse.Namespace) -> None:
    """Returns where the options belong together; raises Invalid."""
    alone = [name for name in ("site", "name", "serial", "before") if getattr(args, name, None)]
    if alone and not args.issuer_key:
        raise Invalid(f"--{alone[0]} is for --issuer-key", expected="the site's own root counts and names by itself", reason="usage")
    if args.issuer_key and (args.data or args.registry):
        raise Invalid("--issuer-key makes a document without any site", do="leave --data and --registry out, then import it there", reason="usage")
    if args.issuer_key and args.verb == "issue" and not args.site:
        raise Invalid("--issuer-key was given without --site", expected="the instance id that airlock site init printed", reason="usage")


def _body(args: argparse.Namespace) -> dict[str, object]:
    if args.verb == "revoke":
        return given(args, "jti", "key_id", "kid", "next_update")
    body = given(args, "org", "tier", "models", "products", "max_keys", "not_before", "expires", "grace") | {"gpus": args.gpus}
    return body | {"actions": commas(args.actions)} | ({"environments": commas(args.environments)} if args.environments else {})


def _issuer(args: argparse.Namespace) -> int:
    private, public = args.to, args.to.with_name(args.to.name + ".pub")
    pem = trust.generate_key()
    shown = trust.public_pem(pem)
    for path, raw, mode in ((public, shown.encode(), 0o644), (private, pem, 0o600)):  # a half made pair must leave no secret
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        except FileExistsError as error:
            raise Conflict(f"{path} is there already", do="name another file: a key is never replaced by accident", reason="exists") from error
        with os.fdopen(fd, "wb") as out:
            out.write(raw)
    facts: Facts = {"kid": trust.kid(shown), "sha256": trust.spki_sha256(shown).hex(), "public": str(public), "pem": shown}
    words = f"issuer {facts['kid']}\n{shown}SHA-256 {facts['sha256']}\n"
    return tell(args, facts, words + f"at the closed side: airlock site issuer {public.name} --sha256 {facts['sha256']} --data DIR")


def _key(path: Path) -> bytes:
    try:
        with path.open("rb") as source:
            return source.read(MAX_KEY_BYTES)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", expected="the issuer's private key", do="airlock entitlement issuer") from error


def _issue_alone(args: argparse.Namespace) -> int:
    now, key = time.time(), _key(args.issuer_key)
    org, rights, begins, ends = licence_of(_body(args), now)
    name, serial = args.name or trust.kid(trust.public_pem(key)), args.serial or int(now)
    return _write(args, d.sign(key, d.ENTITLEMENT, d.entitlement_claims(name, args.site, org, serial, now, rights, begins, ends)))


def _revoke_alone(args: argparse.Namespace) -> int:
    now, key, body = time.time(), _key(args.issuer_key), _body(args)
    before = d.unverified(_text(args.before)) if args.before else None
    if before and not isinstance(before, Revocations):
        raise Invalid(f"{args.before} is no revocation list", expected=d.LABELS[d.REVOCATIONS], reason="document")
    name, serial = args.name or trust.kid(trust.public_pem(key)), args.serial or int(now)
    due = moment(body, "next_update", now, NEXT_UPDATE) or now + d.LIST_LIFE_S
    claims = d.revocation_claims(name, serial, now, revoked_of(body), cast("Revocations | None", before), due)
    return _write(args, d.sign(key, d.REVOCATIONS, claims))


def _write(args: argparse.Namespace, made: d.Document) -> int:
    head = made.head
    facts: Facts = {"jti": head.jti, "issuer": head.issuer, "kid": head.kid, "serial": head.serial, "begins": date(head.begins)}
    return _out(args, facts | {"ends": date(head.ends), "text": d.armour(head.token, head.kind)})


def _out(args: argparse.Namespace, facts: Facts, more: str = "") -> int:
    """Writes the document where it was asked for, and says what it is; without a file the document alone is on standard output."""
    text = str(facts["text"])
    words = f"{facts['jti']} of {facts['issuer']}, serial {facts['serial']}, {facts['begins']} to {facts['ends']}{more}"
    if args.to:
        temporary = args.to.with_name(args.to.name + ".partial")
        try:
            temporary.write_text(text)
            temporary.replace(args.to)
        except OSError as error:
            raise Unavailable(f"{args.to} cannot be written: {error.strerror}", expected="a directory that this user may write") from error
        return tell(args, facts, f"wrote {args.to}: {words}")
    print(words, file=sys.stderr)
    return tell(args, facts, text.rstrip())


def _made(ask: Ask, args: argparse.Namespace) -> int:
    facts = ask("POST", f"entitlements/{args.verb}", _body(args))
    return _out(args, facts, "; " + _told(facts))


def _told(facts: Facts) -> str:
    """What became of a document at the site."""
    if facts["document"] == "revocations":
        done = ", ".join(f"{facts[name]} {name}" for name in ("entitlements", "keys", "leases") if name in facts)
        return f"{facts['state']}" + (f": revoked {done}" if done else "")
    return f"it takes over on {facts['begins']}" if facts["state"] == "later" else str(facts["state"])


def _text(path: Path) -> str:
    try:
        if str(path) == "-":
            raw = sys.stdin.buffer.read(2 * trust.MAX_DOCUMENT_BYTES + 1)
        else:
            with path.open("rb") as source:
                raw = source.read(2 * trust.MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", expected=d.EXPECTED) from error
    return raw.decode("utf-8", "replace")


def _import(ask: Ask, args: argparse.Namespace) -> int:
    facts = ask("POST", "entitlements", {"document": d.unarmour(_text(args.file))})
    whose = f" of {facts['org']}" if facts["org"] else ""
    return tell(args, facts, f"{facts['document']} {facts['jti']}{whose} by {facts['issuer']}, serial {facts['serial']}: {_told(facts)}")


def _list(ask: Ask, args: argparse.Namespace) -> int:
    rows = everything(ask, "entitlements", org=args.org)
    return tell(args, {"items": rows}, table(rows, "jti", "org", "issuer", "serial", "tier", "models", "gpus", "begins", "ends", "state"))


def _show(ask: Ask, args: argparse.Namespace) -> int:
    facts = ask("GET", f"entitlements/{args.jti}")
    lines = [
        f"{name.replace('_', ' '):<14}{', '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in facts.items() if v and name != "text"
    ]
    return tell(args, facts, "\n".join([*lines, str(facts["text"]).rstrip()]))
