"""Requests to NGC's API with one key: the kinds of keys, the exchange of legacy ones, NGC's envelope, and its refusals as errors with what to do.

The key goes to the API's and the token's own hosts and to nobody else. What NGC says is untrusted: bounded, and its words only as one line.
"""

from __future__ import annotations

import base64
import contextlib
import threading
import time
import uuid
from collections.abc import Mapping
from urllib.parse import quote, urlencode

import urllib3
from urllib3.exceptions import HTTPError

from artifact.errors import AirlockError, Denied, Invalid, NotFound, TooLarge, Unauthenticated, Unavailable
from artifact.manifest import parse_json
from mirror.web import Fetcher

MAX_JSON = 64 * 1024 * 1024
MAX_VALUES = 1_000_000  # of one answer: parsed, small ones take many times their bytes
MAX_REFUSAL = 64 * 1024
REFUSAL_S = 10.0
LIFE_S = 600  # of a token that does not say how long it lives; NGC's live 15 minutes
EARLY_S = 300  # before its end a token is renewed, as NGC's own client does


class Api:
    """One NGC API with one key, for what lies below one organisation or team; safe for several threads."""

    def __init__(self, endpoint: str, auth: str, key: str = "", ca_file: str = "", scopes: tuple[str, ...] = ()) -> None:
        self._key, self._scopes = key, scopes
        self.guest = not key
        self.legacy = bool(key) and not key.startswith("nvapi-") and key.count(".") != 2
        self._visitor = str(uuid.uuid4())
        self._token, self._renew_at = "", 0.0
        self._lock = threading.Lock()
        self.fetcher = _Ngc(self, endpoint, ca_file)
        self._basic = base64.b64encode(f"$oauthtoken:{key}".encode()).decode()
        self._auth = _Ngc(self, auth, ca_file, {"Authorization": f"Basic {self._basic}"}) if self.legacy else None

    def headers(self) -> dict[str, str]:
        """What a request to the API's own host carries, a legacy key being exchanged in time; raises Unauthenticated, Unavailable."""
        if self.guest:
            return {"X-NGC-Guest-Token": self._visitor}
        if self._auth is None:
            return {"Authorization": f"Bearer {self._key}"}
        with self._lock:
            if time.monotonic() >= self._renew_at:
                self._exchange(self._auth)
            return {"Authorization": f"Bearer {self._token}"}

    def forget(self, sent: str) -> bool:
        """Drops the token that a request carried and that was refused; False where another one would be no better."""
        with self._lock:
            fresh = self.legacy and bool(self._token)
            if fresh and sent == f"Bearer {self._token}":
                self._token, self._renew_at = "", 0.0
            return fresh

    def _exchange(self, auth: Fetcher) -> None:
        query = urlencode([("service", "ngc"), *(("scope", scope) for scope in self._scopes)])
        doc = parse_json(auth.document(f"/token?{query}", MAX_REFUSAL), "NGC's token answer")
        token, life = doc.get("token"), doc.get("expires_in")
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable() or " " in token:
            raise Unauthenticated("NGC's token service gave no token", expected="a field token", do="check the key", reason="token")
        seconds = life if type(life) is int and 0 < life < 86_400 else LIFE_S
        self._token, self._renew_at = token, time.monotonic() + max(seconds - EARLY_S, seconds / 2)

    def json(self, path: str, limit: int = MAX_JSON) -> dict[str, object]:
        """The object that a path of the API answers with, its envelope looked at; raises as Fetcher.document, and Invalid, TooLarge."""
        return self._read(self.fetcher.document(path, limit), path)

    def who(self) -> tuple[str, str]:
        """The organisation that a personal or service key belongs to, and its kind; empty where NGC tells neither; raises as json does."""
        if not self._key.startswith("nvapi-"):
            self.headers()  # a legacy key shows that it is good by its exchange
            return "", ""
        path = "/v3/keys/get-caller-info"
        found = self._read(self.fetcher.document(path, MAX_REFUSAL, form=urlencode({"credentials": self._key})), path)
        return self.word(found.get("orgName")), self.word(found.get("type"))

    def _read(self, raw: bytes, path: str) -> dict[str, object]:
        if raw.count(b",") > MAX_VALUES:
            raise TooLarge(f"NGC's answer about {path[:200]} holds more than {MAX_VALUES} values", expected=f"at most {MAX_VALUES}")
        try:
            doc = parse_json(raw, f"NGC's answer about {path[:200]}", MAX_JSON)
        except Invalid as error:
            raise Invalid(
                f"NGC's answer about {path[:200]} is no JSON object", expected="NGC's documented JSON", do="check endpoint", reason="upstream"
            ) from error
        code, words = self._told(doc)
        if code not in ("", "SUCCESS"):
            raise Invalid(f"NGC answers {path[:200]} with {code}{words and ': ' + words}", expected="SUCCESS", reason="upstream", status=200)
        return doc

    def _told(self, doc: Mapping[str, object]) -> tuple[str, str]:
        status = doc.get("requestStatus")
        if not isinstance(status, Mapping):
            return "", ""
        return self.word(status.get("statusCode")), self.word(status.get("statusDescription"), 300)

    def word(self, value: object, most: int = 100) -> str:
        """A text of NGC's for an error or a record: one line, bounded, nothing with the key or its token in it."""
        if not isinstance(value, str):
            return ""
        secrets = [s for s in (self._key, self._token, self._basic if self._key else "") if s]
        return "" if any(s in value for s in secrets) else " ".join("".join(c if c.isprintable() else " " for c in value).split())[:most]

    def refusal(self, status: int, raw: bytes, what: str) -> AirlockError:
        """The error for a status other than the wanted one, with NGC's own words where it has some."""
        try:
            words = self._told(parse_json(raw, "NGC's refusal"))[1]
        except AirlockError:
            words = ""
        kind, because, do, reason = _REFUSALS.get(status, (Invalid, "", "check the item's name and version", "upstream"))
        if status in (408, 429) or status >= 500:
            kind, because, do, reason = Unavailable, "", "run again later: it resumes", "upstream"
        said = f"; it says: {words}" if words else ""
        return kind(f"NGC answers {status} for {what[:200]}{because and ': ' + because}{said}", do=do, reason=reason, status=status)


class _Ngc(Fetcher):
    """A Fetcher whose refusals are NGC's; a refused token of a legacy key is exchanged anew, once."""

    def __init__(self, api: Api, endpoint: str, ca_file: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(endpoint, ca_file=ca_file, headers=(lambda: headers) if headers else api.headers)
        self._api, self._exchanges = api, headers is not None

    def refused(self, response: urllib3.BaseHTTPResponse, what: str) -> AirlockError:
        """The error for an answer that is none of those that were asked for, its body read within bounds."""
        raw, until = b"", time.monotonic() + REFUSAL_S
        with contextlib.suppress(HTTPError, OSError):
            while len(raw) <= MAX_REFUSAL and time.monotonic() < until and (block := response.read1(MAX_REFUSAL, decode_content=False)):
                raw += block
        return self._api.refusal(response.status, raw[:MAX_REFUSAL], what)

    def _hops(self, url: str, headers: dict[str, str], signed: bool = False, home: bool = False, form: str = "") -> urllib3.BaseHTTPResponse:
        sent = "" if signed or self._exchanges else self._own_headers().get("Authorization", "")
        response = super()._hops(url, headers, signed, home, form)
        if response.status != 401 or not sent or not self._api.forget(sent):
            return response
        response.close()
        return super()._hops(url, headers, signed, home, form)


_REFUSALS: dict[int, tuple[type[AirlockError], str, str, str]] = {
    401: (Unauthenticated, "no key, or a bad or expired one", "set key_env of the item to a variable that holds a valid NGC key", "upstream_401"),
    402: (
        Denied,
        "this key's account has no subscription that covers it",
        "subscribe that account (NVIDIA AI Enterprise or the developer programme), or use a key of one that is",
        "upstream_402",
    ),
    403: (
        Denied,
        "this key may not read it",
        "use a key of the organisation and team that owns it, or whose account was given access",
        "upstream_403",
    ),
    404: (NotFound, "not there for this key", "check organisation, team, model, version and key", "repo"),
    412: (
        Denied,
        "its licence or terms were not accepted for this key's account",
        "accept them in the NGC catalogue with that account, then record it: airlock mirror accept SOURCE --by WHO",
        "upstream_412",
    ),
    451: (
        Denied,
        "refused for legal reasons, such as a region where it is not offered",
        "ask NVIDIA; fetch it only where and for whom it is offered",
        "upstream_451",
    ),
}


def quoted(*parts: str) -> str:
    """Parts of a path as one, each escaped."""
    return "/".join(quote(part, safe="") for part in parts)
