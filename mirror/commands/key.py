"""`airlock mirror key add|list|remove|check`: whose upstream key it is, what its account has bought, until when; the key stays in its variable."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from artifact.errors import Invalid, Unauthenticated
from artifact.grant import TIERS, date
from artifact.upstream import LATEST, TEXTS, check_product
from mirror.home import MirrorHome
from mirror.ngc_api import Api
from mirror.plan import HUB_ENDPOINT, NGC_AUTH, NGC_ENDPOINT
from mirror.records import SOURCES, Key, Records, words
from mirror.sources.huggingface import HubSource

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._\-]{0,62}[a-z0-9])?\Z")
EXAMPLES = {
    "add": "airlock mirror key add nvidia --env NGC_KEY --source ngc --org acme --product nv-ai-enterprise --tier enterprise --ends 2027-03-01",
    "list": "airlock mirror key list --json",
    "remove": "airlock mirror key remove nvidia",
    "check": "airlock mirror key check hub",
}


def moment(text: str) -> int:
    """Seconds since 1970 of a date (its first moment, UTC) or an RFC 3339 time; raises Invalid."""
    try:
        found = datetime.fromisoformat(text)
        at = int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())
        if not 0 < at < LATEST:
            raise ValueError(text)
    except (ValueError, OverflowError) as error:
        raise Invalid(f"{text[:40]!r} is no date", expected="YYYY-MM-DD, or a time such as 2027-03-01T12:00:00Z", reason="date") from error
    return at


def home_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --home and --json."""
    default = os.environ.get("AIRLOCK_MIRROR")
    parser.add_argument("--home", type=Path, default=default, required=not default, help="the mirror's home (env AIRLOCK_MIRROR)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(argv: list[str]) -> int:
    """Runs one of the four; returns the exit status."""
    parser = argparse.ArgumentParser(prog="airlock mirror key", description="Records of the upstreams' keys; no key is ever written down.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    helps = {
        "add": "record a key, or record it anew",
        "list": "what is recorded",
        "remove": "forget a record",
        "check": "ask the upstream whose it is",
    }
    made = {verb: verbs.add_parser(verb, help=helps[verb], epilog=f"example: {EXAMPLES[verb]}") for verb in helps}
    for verb, sub in made.items():
        if verb != "list":
            sub.add_argument("name", help="what this mirror calls the key")
        home_argument(sub)
    add = made["add"]
    add.add_argument("--env", required=True, metavar="VARIABLE", help="the variable that holds the key now; only its name and the key's id are kept")
    add.add_argument("--source", required=True, choices=SOURCES, help="which kind of upstream")
    add.add_argument("--org", required=True, help="the account at the upstream that the key belongs to")
    add.add_argument("--product", action="append", default=[], help="a product that the account has bought; may be given more than once")
    add.add_argument("--tier", choices=TIERS, default="", help="the account's tier")
    add.add_argument("--ends", default="", metavar="DATE", help="when the subscription ends: from the first moment of that day (UTC) on it is over")
    add.add_argument("--key-ends", default="", metavar="DATE", help="when the key itself ends, where it does")
    made["check"].add_argument("--endpoint", default="", help=f"the Hub or NGC API to ask ({HUB_ENDPOINT}, {NGC_ENDPOINT})")
    made["check"].add_argument("--auth-endpoint", default="", help=f"where NGC's legacy keys are exchanged (the endpoint; of NVIDIA's {NGC_AUTH})")
    made["check"].add_argument("--ca-file", default="", help="CA of that host's certificate")
    given = parser.parse_args(argv)
    records = Records(MirrorHome.open(given.home))
    return {"add": _add, "list": _list, "remove": _remove, "check": _check}[given.verb](records, given)


def _value(variable: str) -> str:
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        # What was given as the variable's name may be the key itself: it is not repeated.
        raise Unauthenticated("the variable holds no key", expected="the name of a set variable, its value one printable word", do="export it first")
    return key


def _add(records: Records, given: argparse.Namespace) -> int:
    if not _NAME.match(given.name):
        raise Invalid("the name of the record is none", expected="1 to 64 of a-z, 0-9 and . _ -", reason="name")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", given.env):
        raise Invalid("--env is not the name of an environment variable", expected="a name such as NGC_KEY, never the key", reason="key_env")
    value = _value(given.env)
    texts = [given.name, given.env, given.org, *given.product]
    if any(value in text for text in texts):
        raise Invalid("the key itself stands in one of the words", expected="words without the key", reason="records")
    products = tuple(dict.fromkeys(check_product(p) for p in given.product if p))
    ends, key_ends = (moment(text) if text else 0 for text in (given.ends, given.key_ends))
    org = words(given.org, "the account", TEXTS["upstream_org"])
    key = Key(given.name, records.key_id(value), given.env, given.source, org, products, given.tier, ends, key_ends, int(time.time()))
    records.put(key)
    print(json.dumps(_public(key)) if given.json else _text(key))
    return 0


def _public(key: Key) -> dict[str, object]:
    out: dict[str, object] = asdict(key)
    for name in ("subscription_end", "key_end", "added", "checked"):
        at = out[name]
        out[name] = date(at) if isinstance(at, int) and at else ""
    return out | {"products": list(key.products)}


def _text(key: Key) -> str:
    parts = [f"{key.name}  {key.key_id}  {key.source}  account {key.org}  in {key.variable}"]
    parts += [", ".join(key.products)] if key.products else []
    parts += [f"tier {key.tier}"] if key.tier else []
    parts += [f"subscription ends {date(key.subscription_end)}"] if key.subscription_end else []
    parts += [f"key ends {date(key.key_end)}"] if key.key_end else []
    parts += [f"user {key.user}, role {key.role or '-'}, asked {date(key.checked)}"] if key.checked else []
    return "  ".join(parts)


def _list(records: Records, given: argparse.Namespace) -> int:
    keys = records.keys()
    print(json.dumps({"items": [_public(key) for key in keys]}) if given.json else "\n".join(map(_text, keys)) or "no key is recorded")
    return 0


def _remove(records: Records, given: argparse.Namespace) -> int:
    gone = records.remove(given.name)
    print(json.dumps({"removed": gone.name}) if given.json else f"the record of {gone.name} is gone; names that were fetched keep its facts")
    return 0


def _check(records: Records, given: argparse.Namespace) -> int:
    key = records.named(given.name)
    value = _value(key.variable)
    if records.key_id(value) != key.key_id:
        raise Unauthenticated(
            f"the variable {key.variable} holds another key than the one recorded as {key.name}",
            expected=f"the key with the id {key.key_id}",
            do=f"set the variable, or record the new key: airlock mirror key add {key.name} …",
            reason="upstream_key",
        )
    if key.source == "hf":
        user, role = HubSource(given.endpoint or HUB_ENDPOINT, value, given.ca_file).who()
        key = records.checked(key, user, role, time.time())
    elif key.source == "ngc":
        auth = given.auth_endpoint or given.endpoint or NGC_AUTH
        user, role = Api(given.endpoint or NGC_ENDPOINT, auth, value, given.ca_file, (f"group/ngc:{key.org}",)).who()
        key = records.checked(key, user, role, time.time())
    print(json.dumps(_public(key)) if given.json else _text(key))
    return 0
