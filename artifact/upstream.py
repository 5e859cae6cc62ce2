"""What is known of the upstream of a name when it was fetched: account, key, product, subscription, licence; travels in a bundle's index.

Here because mirror and registry must read the same fields in the same bounds (docs/format.md section 7). It judges no entitlement and keeps nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from artifact.errors import Invalid
from artifact.grant import TIERS
from artifact.manifest import check_digest, check_name, check_ref

LATEST = 1e11  # the year 5138: what is later is no time in seconds
TEXTS = {"source": 700, "upstream_org": 200, "key_id": 100, "license": 200, "accepted_by": 200, "evidence": 2000}
MOMENTS = ("key_end", "subscription_end", "accepted_at", "fetched")
_PRODUCT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+\-]{0,99}\Z")


@dataclass(frozen=True)
class Upstream:
    """The upstream's facts about one name: `product` and `tier` are what the artefact requires; times in seconds since 1970, 0 where unknown."""

    name: str
    ref: str
    digest: str
    source: str = ""
    upstream_org: str = ""
    key_id: str = ""
    key_end: float = 0.0
    product: str = ""
    tier: str = ""
    subscription_end: float = 0.0
    license: str = ""
    accepted_by: str = ""
    accepted_at: float = 0.0
    gated: bool = False
    evidence: str = ""
    fetched: float = 0.0


def check_product(text: object) -> str:
    """A product's name as its vendor writes it, such as nv-ai-enterprise; empty for none; raises Invalid."""
    if not isinstance(text, str) or (text and not _PRODUCT.match(text)):
        raise Invalid(
            "the product is no name of one", expected="1 to 100 letters, digits and . _ : / + -, such as nv-ai-enterprise", reason="product"
        )
    return text


def check_tier(text: object) -> str:
    """A tier, empty for none; raises Invalid."""
    if not isinstance(text, str) or (text and text not in TIERS):
        raise Invalid("the tier is none that is known", expected=" or ".join(TIERS), reason="tier")
    return text


def check_fact(value: Mapping[str, object]) -> Upstream:
    """One entry of an index's `upstream` from untrusted JSON, absent fields empty and unknown ones left out; raises Invalid."""
    name, ref, digest = (value.get(key) for key in ("name", "ref", "digest"))
    if not isinstance(name, str) or not isinstance(ref, str) or not isinstance(digest, str):
        raise Invalid("facts of an upstream are about no name", expected="name, ref and digest", reason="upstream")
    gated = value.get("gated", False)
    if not isinstance(gated, bool):
        raise Invalid(f"gated of the upstream of {name[:100]} is not true or false", reason="upstream")
    texts: dict[str, Any] = {key: _text(value.get(key, ""), key, most) for key, most in TEXTS.items()}
    times: dict[str, Any] = {key: _moment(value.get(key, 0), key) for key in MOMENTS}
    if not texts["source"].isascii():
        raise Invalid("source of an upstream is not plain text", expected="ASCII", reason="upstream")
    product, tier = check_product(value.get("product", "")), check_tier(value.get("tier", ""))
    return Upstream(check_name(name), check_ref(ref), check_digest(digest), product=product, tier=tier, gated=gated, **texts, **times)


def _text(value: object, key: str, most: int) -> str:
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise Invalid(f"{key} of an upstream is not text on one line", expected=f"at most {most} printable characters", reason="upstream")
    return value


def _moment(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LATEST:
        raise Invalid(f"{key} of an upstream is no time", expected="seconds since 1970, or 0", reason="upstream")
    return float(value)
