"""The token endpoint, GET and POST of `/token` and `/proxy_auth`: a key against an opaque token for the asked scopes, cut down to its grants.

The GET form is the distribution project's token specification, the POST form its OAuth2 specification with grant_type=password. There is no refresh
token: clients that hold one stop sending their key, and fail where it is not taken. It decides nothing; unknown parameters are ignored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from urllib.parse import parse_qsl

from artifact import errors
from registry import refusals
from registry.exchange import Exchange
from registry.tokens import parse_scopes

PATHS = ("/token", "/proxy_auth")
FORM = "application/x-www-form-urlencoded"
MAX_FORM = 64 * 1024
MAX_FIELDS = 200
_TABLE: dict[type[errors.AirlockError], tuple[int, str]] = {
    errors.Unauthenticated: (401, "UNAUTHORIZED"),
    errors.Denied: (403, "DENIED"),
    errors.Throttled: (429, "TOOMANYREQUESTS"),
    errors.Unavailable: (503, "UNAVAILABLE"),
    errors.TooLarge: (413, "SIZE_INVALID"),
    errors.Unsupported: (400, "UNSUPPORTED"),
}


class TokenDoor:
    """Answers one token request."""

    async def __call__(self, x: Exchange) -> None:
        """Answers in JSON; a client that left gets nothing."""
        await x.serve(self._serve(x), lambda error: self._refuse(x, error))

    async def _serve(self, x: Exchange) -> None:
        if x.method in ("GET", "HEAD"):
            await self._answer(x, [v for k, v in x.query if k == "scope"], None)
        elif x.method == "POST":
            await self._post(x)
        else:
            await self._refuse(x, errors.Unsupported(f"{x.method} is not served here", expected="GET or POST"), 405)

    async def _post(self, x: Exchange) -> None:
        if x.headers.get("content-type", "").split(";")[0].strip().lower() != FORM:
            raise errors.Invalid("the body is no form", expected=FORM, reason="body")
        raw = await x.read_body(MAX_FORM, "the token request")
        try:
            form = parse_qsl(raw.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
        except ValueError as error:  # UnicodeDecodeError among them
            raise errors.Invalid("the form cannot be read", expected=f"{FORM}, at most {MAX_FIELDS} fields", reason="body") from error
        kind = next((v for k, v in form if k == "grant_type"), "")
        if kind != "password":
            do = "send the key as the password, or use GET with Basic"
            raise errors.Unsupported(f"the grant type {kind[:40]!r} is not served", expected="password", do=do, reason="unsupported_grant_type")
        password = next((v for k, v in form if k == "password"), None)
        await self._answer(x, [v for k, v in form if k == "scope"], password if password is not None else x.key() or "", form=True)

    async def _answer(self, x: Exchange, scopes: Sequence[str], key: str | None, form: bool = False) -> None:
        """The token as both fields that clients read; a subset of the scopes, or none of them, is an answer all the same."""
        asked = parse_scopes(scopes)
        now, request_id = time.time(), x.note["request_id"]
        if key is None and x.key() is None:  # clients without credentials ask too, and go on with what everybody may read
            token, given, life = await x.sql(lambda: x.guard.token(None, asked, request_id, now))
        else:
            token, given, life = await x.call(lambda call: x.guard.token(call, asked), key)
        doc: dict[str, object] = {"token": token, "access_token": token, "expires_in": life}
        if form:
            doc["scope"] = " ".join(map(str, given))
        await x.json(200, doc, {"cache-control": "no-store"})

    async def _refuse(self, x: Exchange, error: errors.AirlockError, status: int = 0) -> None:
        found, code = refusals.form(_TABLE, error, (400, "UNSUPPORTED"))
        status = status or found
        headers = {"cache-control": "no-store"} | refusals.headers(status, error)
        if status == 401:
            headers["www-authenticate"] = f'Basic realm="{x.base_url}"'
        if status == 405:
            headers["allow"] = "GET, POST"
        detail = {"reason": error.reason, "expected": error.expected, "do": error.do}
        doc: dict[str, object] = {"errors": [{"code": code, "message": refusals.words(error), "detail": detail}]}
        if error.reason == "unsupported_grant_type":
            doc["error"] = error.reason  # the form of RFC 6749 section 5.2
        await x.json(status, doc, headers)
