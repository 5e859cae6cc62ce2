"""What the S3 face says, as XML, and how keys of its two kinds of bucket name files; and the walk by which a listing is cut into pages; pure.

A bucket of the first kind holds what NIM_REPOSITORY_OVERRIDE asks for: each file under the percent-encoded text behind `ngc://`. One of the second
holds each file under `<name>:<ref>/<path>`, so that `s3://BUCKET/<name>:<ref>` is a model's folder. No request and no right is known here.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote, unquote, unquote_to_bytes
from xml.sax.saxutils import escape

from artifact.errors import Invalid, NotFound, TooLarge
from artifact.manifest import check_name, check_path
from registry.ngc_shapes import model_names, split_name

XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"
HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
MODELS = "models"
MOST_KEY = 1024
MOST_KEYS = 1000
FILE = "?file="
_IN_NAMES = re.compile(r"[a-z0-9._/-]*\Z")
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# What S3 calls a part of a bucket or an object that this face has none of.
PARTS = frozenset(
    (
        *("accelerate", "acl", "analytics", "attributes", "cors", "encryption", "intelligent-tiering", "inventory", "legal-hold", "lifecycle"),
        *("logging", "metrics", "notification", "object-lock", "ownershipControls", "policy", "policyStatus", "publicAccessBlock", "replication"),
        *("requestPayment", "restore", "retention", "select", "session", "tagging", "torrent", "uploads", "versioning", "versions", "website"),
    )
)


@dataclass(frozen=True)
class Wanted:
    """The file that a key names: the canonical names that it may be under, in order, the ref, and the path in the model."""

    names: tuple[str, ...]
    ref: str
    path: str


def fields(query: bytes) -> dict[str, str]:
    """The first value of each name of a query, a plus being a plus; raises Invalid for more than 200 or what is no UTF-8."""
    out: dict[str, str] = {}
    parts = [part for part in query.split(b"&") if part]
    if len(parts) > 200:
        raise Invalid("the query string is not acceptable", expected="at most 200 fields", reason="argument")
    for part in parts:
        name, _, value = part.partition(b"=")
        try:
            out.setdefault(unquote_to_bytes(name).decode(), unquote_to_bytes(value).decode())
        except UnicodeDecodeError:
            raise Invalid("the query is no UTF-8", reason="uri") from None
    return out


def place(raw_path: bytes, host: str, domain: str) -> tuple[str, str]:
    """Bucket and key of a request, empty where it names none: virtual-host style below `domain`, else path style; raises Invalid, TooLarge."""
    try:
        path = unquote_to_bytes(raw_path).decode().removeprefix("/")
    except UnicodeDecodeError:
        raise Invalid("the path is no UTF-8", expected="the key in UTF-8, percent-encoded", reason="uri") from None
    name = re.sub(r":\d*\Z", "", host).lower().rstrip(".")
    if domain and name.endswith(f".{domain}"):
        bucket, key = name.removesuffix(f".{domain}"), path
    else:
        bucket, _, key = path.partition("/")
    if len(key.encode()) > MOST_KEY * 3:  # an encoded key takes three bytes for one
        raise TooLarge("the key is too long", expected=f"at most {MOST_KEY * 3} bytes", reason="key_length")
    return bucket, key


class Encoded:
    """Keys of NIM_REPOSITORY_OVERRIDE: `quote(org[/team]/model:version?file=path)`; a key that was encoded less means the same."""

    def wanted(self, key: str) -> Wanted:
        """What a key names; raises NotFound."""
        target, mark, path = unquote(key).partition(FILE)
        name, colon, ref = target.partition(":")
        if not (mark and colon and ref):
            raise _none(key)
        with suppress(Invalid, NotFound):
            return Wanted(tuple(model_names(name.split("/"))), ref, check_path(path))
        raise _none(key)

    def within(self, prefix: str) -> str:
        """What the names of all repositories whose keys begin with `prefix` begin with: nothing, since a key spells a name in more than one way."""
        return ""

    def start(self, name: str, display: str) -> str:
        """What the keys of a repository begin with; empty where no key names it."""
        for text in dict.fromkeys((display.removeprefix("ngc/"), name.removeprefix("ngc/"))):
            with suppress(Invalid, NotFound):
                if split_name(text) and name in model_names(text.split("/")):
                    return quote(f"{text}:", safe="")
        return ""

    def version(self, ref: str) -> str:
        """What follows for a ref; empty where no key can name it."""
        return "" if FILE in ref else quote(ref + FILE, safe="")

    def path(self, path: str) -> str:
        """What follows for a file."""
        return quote(path, safe="")


class Plain:
    """Keys of a model's folder: `<canonical name>:<ref>/<path>`, a ref's own `/` and `%` escaped."""

    def wanted(self, key: str) -> Wanted:
        """What a key names; raises NotFound."""
        name, colon, rest = key.partition(":")
        ref, slash, path = rest.partition("/")
        if not (slash and colon and ref):
            raise _none(key)
        with suppress(Invalid):
            return Wanted((check_name(name),), unquote(ref), check_path(path))
        raise _none(key)

    def within(self, prefix: str) -> str:
        """What the names of all repositories whose keys begin with `prefix` begin with."""
        name = prefix.partition(":")[0]
        return name if _IN_NAMES.match(name) else ""

    def start(self, name: str, display: str) -> str:
        """What the keys of a repository begin with."""
        return f"{name}:"

    def version(self, ref: str) -> str:
        """What follows for a ref."""
        return ref.replace("%", "%25").replace("/", "%2F") + "/"

    def path(self, path: str) -> str:
        """What follows for a file."""
        return path


def _none(key: str) -> NotFound:
    return NotFound(f"there is no object {key[:200]!r}", do="list the bucket", reason="entry")


# ---- listings


@dataclass(frozen=True)
class Entry:
    """One object: SHA-256 in hex, bytes, and when its revision was made, in seconds since 1970."""

    etag: str
    size: int
    at: float


Below = Callable[[], Iterable["Node"]]
Node = tuple[str, Below | Entry]  # a key and its object, or what all keys of a subtree begin with; siblings sorted, none a start of another


@dataclass(frozen=True)
class Asked:
    """What a listing asks for: keys behind `after` that begin with `prefix`, grouped at the first `delimiter` behind it, at most `most`."""

    prefix: str = ""
    delimiter: str = ""
    after: str = ""
    most: int = MOST_KEYS


@dataclass
class Page:
    """The keys and groups of one page, the last of them in order where there is more."""

    keys: list[tuple[str, Entry]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    more: str = ""

    @property
    def count(self) -> int:
        """Keys and groups together, as max-keys counts them."""
        return len(self.keys) + len(self.groups)


def page(nodes: Iterable[Node], asked: Asked) -> Page:
    """The first page of what is asked for; subtrees that it does not reach into are never opened."""
    out, last = Page(), ""
    if not asked.most:
        return out
    for text, entry in _walk(nodes, asked):
        if entry is None and text == last:
            continue
        if out.count == asked.most:
            out.more = last
            break
        if entry is None:
            out.groups.append(text)
        else:
            out.keys.append((text, entry))
        last = text
    return out


def _walk(nodes: Iterable[Node], asked: Asked) -> Iterator[tuple[str, Entry | None]]:
    told = ""
    for start, below in nodes:
        leaf = isinstance(below, Entry)
        if not start.startswith(asked.prefix) and (leaf or not asked.prefix.startswith(start)):
            continue
        if start <= asked.after and (leaf or not asked.after.startswith(start)):
            continue
        if told and start.startswith(told):
            continue
        rest = start[len(asked.prefix) :] if start.startswith(asked.prefix) else ""
        if asked.delimiter and asked.delimiter in rest and start > asked.after:  # a subtree that begins before it may have nothing behind it
            told = asked.prefix + rest.partition(asked.delimiter)[0] + asked.delimiter
            if told != asked.after:
                yield told, None
        elif isinstance(below, Entry):
            yield start, below
        else:
            yield from _walk(below(), asked)


def token_of(last: str) -> str:
    """The continuation token behind a key or group."""
    return base64.urlsafe_b64encode(last.encode()).decode("ascii")


def behind(token: str) -> str:
    """The key or group that a continuation token is of; raises Invalid."""
    with suppress(ValueError):  # what is no base64, no ASCII or no UTF-8
        last = base64.urlsafe_b64decode(token.encode("ascii")).decode()
        if token_of(last) == token:
            return last
    raise Invalid("the continuation token is not one of this registry", reason="argument")


# ---- XML


def text(value: object) -> str:
    """A text as XML holds it; what XML cannot hold is told by a mark."""
    return escape(_NO_XML.sub("\ufffd", str(value)))


def tag(name: str, inside: str, attributes: str = "") -> str:
    """An element around XML."""
    return f"<{name}{attributes}>{inside}</{name}>"


def document(root: str, inside: str) -> bytes:
    """A whole answer."""
    return (HEAD + tag(root, inside, f' xmlns="{XMLNS}"')).encode()


def when(at: float) -> str:
    """Seconds since 1970 as S3's XML writes them."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def listed(bucket: str, found: Page, asked: Asked, *, url: bool, version: int, given: str = "") -> bytes:
    """The answer of ListObjectsV2, or (`version` 1) of ListObjects; `given` is the token or marker that the client sent."""

    def shown(value: str) -> str:
        return text(quote(value, safe="/") if url else value)

    out = tag("Name", text(bucket)) + tag("Prefix", shown(asked.prefix)) + tag("MaxKeys", str(asked.most))
    out += tag("Delimiter", shown(asked.delimiter)) if asked.delimiter else ""
    out += tag("EncodingType", "url") if url else ""
    out += tag("IsTruncated", "true" if found.more else "false")
    if version == 1:
        out += tag("Marker", shown(given)) + (tag("NextMarker", shown(found.more)) if found.more else "")
    else:
        out += tag("KeyCount", str(found.count)) + (tag("ContinuationToken", text(given)) if given else "")
        out += tag("NextContinuationToken", token_of(found.more)) if found.more else ""
    for key, entry in found.keys:
        facts = tag("Key", shown(key)) + tag("LastModified", when(entry.at)) + tag("ETag", f"&quot;{entry.etag}&quot;")
        out += tag("Contents", facts + tag("Size", str(entry.size)) + tag("StorageClass", "STANDARD"))
    out += "".join(tag("CommonPrefixes", tag("Prefix", shown(group))) for group in found.groups)
    return document("ListBucketResult", out)


def buckets(owner: str, names: Sequence[str]) -> bytes:
    """The answer of ListBuckets."""
    told = "".join(tag("Bucket", tag("Name", text(name)) + tag("CreationDate", when(0))) for name in sorted(names))
    return document("ListAllMyBucketsResult", tag("Owner", tag("ID", text(owner)) + tag("DisplayName", text(owner))) + tag("Buckets", told))


def refusal(code: str, words: str, more: Sequence[tuple[str, str]]) -> bytes:
    """An error, which has no namespace."""
    facts = tag("Code", code) + tag("Message", text(words))
    return (HEAD + tag("Error", facts + "".join(tag(name, text(value)) for name, value in more))).encode()
