"""Whether this mirror may fetch an item: what the item requires against the records of its key and of accepted licences; pure but for the records.

Asked for every item before the first byte of any. It talks to no upstream: what the Hub says of a key and a gate is the source's to ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from shlex import quote

from artifact.errors import Denied
from artifact.grant import date
from mirror.plan import Item
from mirror.records import Acceptance, Key, Records

SILENT = ("", "other", "unknown")  # licences as upstreams state them that say nothing


@dataclass(frozen=True)
class Right:
    """Under what an item is fetched: the id of its key, the key's record and the acceptance of its licence, where there are such."""

    item: Item
    key_id: str
    key: Key | None
    acceptance: Acceptance | None

    def check_license(self, stated: str) -> None:
        """Compares what the upstream states now with what the plan requires; raises Denied `upstream_license`."""
        wanted = self.item.requires.license
        if wanted and stated.casefold() not in SILENT and stated.casefold() != wanted.casefold():
            raise Denied(
                f"{self.item.source} is under the licence {stated[:100]!r} now, and its item requires {wanted!r}",
                expected=wanted,
                do="read the new licence, set license of the item's requires, and accept it with airlock mirror accept",
                reason="upstream_license",
            )

    def facts(self, stated: str, user: str = "", evidence: str = "") -> dict[str, object]:
        """The fields of this item's upstream facts (docs/format.md section 7) but for source, gated and the time of the fetch."""
        key, accepted, requires = self.key, self.acceptance, self.item.requires
        shown = [part for part in (evidence, accepted.evidence if accepted else "") if part]
        return {
            "upstream_org": key.org if key else user,
            "key_id": self.key_id,
            "key_end": key.key_end if key else 0,
            "product": requires.product,
            "tier": requires.tier,
            "subscription_end": key.subscription_end if key else 0,
            "license": stated or requires.license,
            "accepted_by": accepted.by if accepted else "",
            "accepted_at": accepted.at if accepted else 0,
            "evidence": "; ".join(shown),
        }


def right(item: Item, key: str, records: Records, now: float) -> Right:
    """The right to fetch an item; raises Denied: upstream_product, upstream_subscription, upstream_tier, upstream_license."""
    found, requires = records.find(key), item.requires
    if requires.product:
        _product(item, found)
    if requires.tier:
        _tier(item, found)
    if (requires.product or requires.tier) and found and found.subscription_end and now >= found.subscription_end:
        raise Denied(
            f"the subscription of the key {found.name} (account {found.org}) ended {date(found.subscription_end)}, and {item.source} requires it",
            expected="a subscription that has not ended",
            do=f"renew it at the upstream, then say so: {_add(item, found)} --ends YYYY-MM-DD",
            reason="upstream_subscription",
        )
    accepted = records.acceptance(item.source, requires.license)
    if requires.license and accepted is None:
        raise Denied(
            f"nobody has accepted the licence {requires.license!r} of {item.source}",
            expected="a record of who accepted it, and when",
            do=f'airlock mirror accept {quote(item.source)} --by "Name <mail>" --license {quote(requires.license)}',
            reason="upstream_license",
        )
    return Right(item, records.key_id(key), found, accepted)


def _add(item: Item, key: Key | None) -> str:
    source = key.source if key else "ngc" if item.kind == "nim" or item.base_url == "https://nvcr.io" else item.kind
    tier = item.requires.tier or (key.tier if key else "")
    name, org = (key.name, key.org) if key else ("NAME", "ORG")
    products = list(dict.fromkeys([*(key.products if key else ()), *([item.requires.product] if item.requires.product else [])]))
    words = [f"airlock mirror key add {name} --env {item.key_env or 'VARIABLE'} --source {source} --org {quote(org)}"]
    return " ".join([*words, *(f"--product {p}" for p in products), *([f"--tier {tier}"] if tier else [])])


def _missing(item: Item, what: str, reason: str) -> Denied:
    if not item.key_env:
        return Denied(
            f"{item.source} requires {what}, and its item names no key",
            expected="key_env: the variable that holds a key with that right",
            do=f"set key_env of the item, then {_add(item, None)}",
            reason=reason,
        )
    return Denied(
        f"{item.source} requires {what}, and this mirror has no record of the key in {item.key_env}",
        expected="a record that says whose key it is and what its account has bought",
        do=_add(item, None),
        reason=reason,
    )


def _product(item: Item, key: Key | None) -> None:
    wanted = item.requires.product
    if key is None:
        raise _missing(item, f"the product {wanted}", "upstream_product")
    if wanted not in key.products:
        raise Denied(
            f"{item.source} requires the product {wanted}; the key {key.name} (account {key.org}) has {', '.join(key.products) or 'none'}",
            expected=wanted,
            do=f"buy it for that account or use another key; if the account has it: {_add(item, key)}",
            reason="upstream_product",
        )


def _tier(item: Item, key: Key | None) -> None:
    wanted = item.requires.tier
    if key is None:
        raise _missing(item, f"the tier {wanted}", "upstream_tier")
    if key.tier != "enterprise" and key.tier != wanted:
        raise Denied(
            f"{item.source} requires the tier {wanted}; the key {key.name} (account {key.org}) has {key.tier or 'none'}",
            expected=f"tier {wanted}" if wanted == "enterprise" else "tier developer or enterprise",
            do=f"use a key of that tier; if the account has it: {_add(item, key)}",
            reason="upstream_tier",
        )
