"""What is wrong between a client's place and a registry, asked in the order in which a client meets it.

Environment, proxy, DNS, TCP, TLS, clock, HTTP, key, token realm, models, the place that bytes come from, the NGC listener.

Here for `airlock doctor`. Each finding is a line with its fix; the first one that failed gives the exit code. No line holds a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from artifact import reasons
from artifact.errors import AirlockError, Invalid, Unauthenticated, Unavailable
from artifact.manifest import MANIFEST_TYPES, parse_reference
from artifact.probes import Answer, Reached, ask, clock, reach, trusts
from artifact.surroundings import CA_FILES, FAIL, OK, WARN, Line, look, proxy, untold
from artifact.transport import Transport, clean, joined, origin

EXIT_CODES: Mapping[str, int] = {
    **reasons.EXIT_CODES,
    "environment": 60,
    "proxy": 61,
    "clock": 62,
    "not_airlock": 63,
    "realm": 64,
    "redirect": 65,
    "ngc": 66,
}
DENIED = 25  # any other refusal of a key that is known
_REALM = re.compile(r'realm="([^"]*)"')


@dataclass(frozen=True)
class Case:
    """What is looked at: the URLs, how they are trusted, the key, a model by name and version, the environment, and seconds for each probe."""

    registry: str
    ngc: str
    ca_file: str
    key: str
    model: str
    environ: Mapping[str, str]
    timeout_s: float

    def __repr__(self) -> str:
        return f"Case({self.registry!r})"


class Doctor:
    """Asks, and notes a line for each thing asked."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.lines: list[Line] = []

    def note(self, check: str, state: str, what: str, do: str = "", reason: str = "") -> None:
        """Notes one line, without the key whatever was told."""
        if len(self.case.key) > 7:
            what, do = (text.replace(self.case.key, "[key]") for text in (what, do))
        self.lines.append(Line(check, state, what, do, reason))

    def refused(self, check: str, error: AirlockError, reason: str = "") -> None:
        """Notes an error of the registry or of the way to it."""
        self.note(check, FAIL, error.what, error.do, reason or error.reason)

    def examine(self) -> list[Line]:
        """All lines; raises Invalid for a URL or a name that is none."""
        case = self.case
        origin(case.registry)
        if case.ngc:
            origin(case.ngc)
        if case.model:
            self._asked()
        self.lines += look(case.environ, case.registry.rstrip("/"), case.ngc)
        self._proxies()
        found = self._server(case.registry, "")
        if found and self._airlock() and self._key():
            self._realm()
            self._models()
        if case.ngc and self._server(case.ngc, "ngc."):
            self._ngc()
        return self.lines

    def _proxies(self) -> None:
        for url in filter(None, (self.case.registry, self.case.ngc)):
            there = proxy(self.case.environ, url)
            host = urlsplit(url).hostname
            if not there:
                continue
            found = reach(f"http://{there}", "", self.case.timeout_s)
            if found.up:
                what = f"clients send what is for {host} to the proxy {there}; the lines below go straight"
                self.note("proxy", WARN, what, f"add {host} to NO_PROXY and no_proxy, unless the proxy knows the way to it")
            else:
                what = f"clients send what is for {host} to the proxy {there}, and {found.lines[-1].what.partition(': ')[2]}"
                self.note("proxy", FAIL, what, f"add {host} to NO_PROXY and no_proxy, or unset the proxy variables", "proxy")
            return
        self.note("proxy", OK, "clients go straight to it")

    def _server(self, url: str, prefix: str) -> bool:
        found = reach(url, self.case.ca_file, self.case.timeout_s, prefix)
        self.lines += found.lines
        self._trust(url, found, prefix)
        if found.up:
            try:
                answer = ask("GET", url.rstrip("/") + "/healthz", self.case.ca_file, self.case.timeout_s)
            except Unavailable as error:
                self.refused(f"{prefix}http", error)
                return False
            self.lines.append(clock(answer.headers.get("date", ""), prefix))
        return found.up

    def _trust(self, url: str, found: Reached, prefix: str) -> None:
        """What the variables say to clients about this server's certificate."""
        given = {name: self.case.environ[name] for name in CA_FILES if self.case.environ.get(name)}
        stranger = not found.up and "authority that is not trusted" in found.lines[-1].what
        if urlsplit(url).scheme != "https" or not (stranger or (found.up and (given or self.case.ca_file))):
            return
        strangers = [name for name, file in given.items() if not trusts(url, file, self.case.timeout_s)]
        if strangers:
            what = f"{', '.join(strangers)} set to a file that does not vouch for {urlsplit(url).netloc}"
            self.note(f"{prefix}authority", FAIL, what, "let it name a PEM file that holds this site's authority", "tls")
        if not prefix:
            self.lines.append(untold({name: file for name, file in given.items() if name not in strangers}))

    def _airlock(self) -> bool:
        """Whether a registry of ours answers there, by its own API's refusal of a caller without a key."""
        url = self.case.registry.rstrip("/") + "/airlock/v1/whoami"
        try:
            answer = ask("GET", url, self.case.ca_file, self.case.timeout_s)
        except Unavailable as error:
            self.refused("http", error)
            return False
        if answer.status >= 500:
            self.note("http", FAIL, f"the server answered {answer.status}", "see the registry's log, or the proxy's in front of it", "unavailable")
            return False
        if "request_id" not in _object(answer) and "key_id" not in _object(answer):
            server = clean(answer.headers.get("server", "no name"))[:40]
            what = f"{url} answered {answer.status}, and not as this product's registry does (Server: {server})"
            self.note("http", FAIL, what, "correct host and port: this is another server, or a proxy that does not pass all paths on", "not_airlock")
            return False
        self.note("http", OK, "a registry of ours answers")
        return True

    def _transport(self, url: str) -> Transport:
        return Transport(url, self.case.key, ca_file=self.case.ca_file or None, timeout_s=self.case.timeout_s)

    def _get(self, base: str, path: str, method: str = "GET", **more: Any) -> Answer:
        """One request with the key; raises the error of a refusal."""
        transport = self._transport(base)
        response = transport.request(method, path, bearer=True, **more)
        return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, transport.take(response, 1 << 20))

    def _key(self) -> bool:
        if not self.case.key:
            self.note("key", FAIL, "no key is set", "set AIRLOCK_KEY, NGC_API_KEY or HF_TOKEN to a key of this registry", "key_absent")
            return False
        try:
            told = _object(self._get(self.case.registry, "/airlock/v1/standing"))
        except Unauthenticated as error:
            self.refused("key", error, "key_invalid" if error.reason == "key_absent" else "")
            return False
        except AirlockError as error:
            self.refused("key", error)
            return False
        what = f"{clean(told.get('key_id'))} of {clean(told.get('org'))}, tier {clean(told.get('tier') or 'none')}"
        warnings = told.get("warnings")
        if isinstance(warnings, list) and warnings:
            self.note("key", WARN, f"{what}; {clean(json.dumps(warnings))}", "renew what ends (airlock entitlement check)")
        else:
            self.note("key", OK, what)
        return True

    def _realm(self) -> None:
        """Where container clients are sent for a token, and whether they get one."""
        try:
            answer = ask("GET", self.case.registry.rstrip("/") + "/v2/", self.case.ca_file, self.case.timeout_s)
        except Unavailable as error:
            self.refused("token", error)
            return
        realm = _REALM.search(answer.headers.get("www-authenticate", ""))
        if answer.status == 200:
            self.note("token", OK, "container clients need no token")
            return
        where = realm[1] if realm else ""
        try:
            same = origin(where) == origin(self.case.registry)
        except Invalid:
            same = False
        if not same:
            what = f"container clients are sent to {clean(where)[:100] or 'nowhere'} for a token, not to {self.case.registry}"
            self.note("token", FAIL, what, "correct AIRLOCK_PUBLIC_URL at the registry, or ask it by that name", "realm")
            return
        try:
            transport = self._transport(self.case.registry)
            transport.take(transport.request("GET", f"{where}?service={quote(origin(where)[1])}"), 1 << 20)
        except AirlockError as error:
            self.refused("token", error, "realm" if isinstance(error, Invalid) else "")
            return
        self.note("token", OK, "container clients get a token")

    def _models(self) -> None:
        """What the key sees; and, of the model that is asked for or else the first, a small read by the Hub's way and by OCI's."""
        try:
            listed = json.loads(self._get(self.case.registry, "/api/models?limit=100").body)
            names = [str(m["id"]) for m in listed]
        except (AirlockError, ValueError, KeyError, TypeError) as error:
            self.refused("models", error if isinstance(error, AirlockError) else Unavailable("the list of models cannot be read"))
            return
        if not names:
            self.note("models", WARN, "this key sees no model", "mirror, import or push one, or ask for a key with a grant")
        else:
            self.note("models", OK, f"this key sees {len(names)}{' or more' if len(names) == 100 else ''}: {', '.join(map(clean, names[:3]))}")
        if self.case.model:
            self._manifest()
        name, ref = self._asked() if self.case.model else (names[0] if names else "", "main")
        if name:
            self._file(name, ref)

    def _asked(self) -> tuple[str, str]:
        found = parse_reference(self.case.model, "main")
        return found.name, found.ref

    def _manifest(self) -> None:
        """The manifest of the model that is asked for, as container clients read it."""
        name, ref = self._asked()
        try:
            transport = self._transport(self.case.registry)
            accept = {"Accept": ", ".join(MANIFEST_TYPES)}
            raw = transport.take(transport.request("GET", f"/v2/{name}/manifests/{quote(ref)}", headers=accept), 4 << 20)
            self.note("model.oci", OK, f"{self.case.model}: a manifest of {len(raw)} bytes")
        except AirlockError as error:
            self.refused("model.oci", error)

    def _file(self, name: str, ref: str) -> None:
        """The first bytes of one file, as hub clients read them: from the registry, or from the place that it sends them to."""
        try:
            about = _object(self._get(self.case.registry, f"/api/models/{quote(name)}/revision/{quote(ref, safe='')}"))
            files = [str(s["rfilename"]) for s in about.get("siblings", []) if isinstance(s, dict) and s.get("rfilename")]
            if not files:
                self.note("model.hub", WARN, f"{name} holds no file", "look at what was pushed")
                return
            path = f"/{quote(name)}/resolve/{quote(ref, safe='')}/{quote(next((f for f in files if f == 'config.json'), files[0]))}"
            headers = {"Authorization": f"Bearer {self.case.key}", "Range": "bytes=0-0"}
            answer = ask("GET", self.case.registry.rstrip("/") + path, self.case.ca_file, self.case.timeout_s, headers)
        except AirlockError as error:
            self.refused("model.hub", error)
            return
        if answer.status in (301, 302, 303, 307, 308):
            self._redirect(answer.headers.get("location", ""))
        elif answer.status in (200, 206, 416):  # 416: the file is empty
            self.note("model.hub", OK, f"{name}: bytes come from the registry itself")
        else:
            self.note("model.hub", FAIL, f"GET {path} answered {answer.status}", "see the registry's log", "unavailable")

    def _redirect(self, target: str) -> None:
        """The store that bytes come from: the same steps as for the registry, without the key."""
        fix = "make it reachable and trusted from here (name, port, its authority in the same PEM file), or set AIRLOCK_STREAM_TO at the registry"
        try:
            url = joined(self.case.registry, target)
            found = reach(url, self.case.ca_file, self.case.timeout_s, "redirect.")
        except Invalid:
            self.note("redirect", FAIL, "the registry sends clients to a place that is no URL", "see `public` in AIRLOCK_BLOBS", "redirect")
            return
        self.lines += [line if line.state == OK else Line(line.check, line.state, line.what, fix, "redirect") for line in found.lines]
        if not found.up:
            return
        try:
            answer = ask("GET", url, self.case.ca_file, self.case.timeout_s, {"Range": "bytes=0-0"})
        except Unavailable as error:
            self.note("redirect.http", FAIL, error.what, fix, "redirect")
            return
        place = urlsplit(url).netloc
        if answer.status in (200, 206, 416):
            self.note("redirect.http", OK, f"bytes come from {place}")
        else:
            do = "see the store's log: its clock, its name in the signed URL (`public` in AIRLOCK_BLOBS), a proxy that changes the Host header"
            self.note("redirect.http", FAIL, f"the store at {place} answered {answer.status}", do, "redirect")

    def _ngc(self) -> None:
        """Whether the listener is that of NGC's API, which is asked before the key goes there, knows the key, and lists the model."""
        path = "/v3/keys/get-caller-info"
        try:
            stranger = ask("POST", self.case.ngc.rstrip("/") + path, self.case.ca_file, self.case.timeout_s)
        except Unavailable as error:
            self.refused("ngc.http", error)
            return
        if "requestStatus" not in _object(stranger):
            what = f"this is not the NGC listener: POST {path} answered {stranger.status} without a requestStatus"
            self.note("ngc.key", FAIL, what, "give the URL of AIRLOCK_NGC (another port than the registry's)", "ngc")
            return
        if not self.case.key:
            return
        try:
            told = _object(self._get(self.case.ngc, path, "POST", headers={"Content-Type": "application/x-www-form-urlencoded"}))
        except AirlockError as error:
            if isinstance(error, Unauthenticated):
                error.reason = "key_invalid" if error.reason in ("key_absent", error.code) else error.reason
                error.do = error.do or "ask the administrator for a new key"
            self.refused("ngc.key", error)
            return
        self.note("ngc.key", OK, f"the NGC listener knows the key, of {clean(told.get('orgName'))}")
        if not self.case.model:
            return
        name, ref = self._asked()
        parts = name.removeprefix("ngc/").split("/")
        if len(parts) not in (2, 3) or name.startswith("hf/"):
            self.note("ngc.model", WARN, f"NGC clients have no word for {name}", "ask for it by OCI or the Hub's way")
            return
        team = f"/team/{parts[1]}" if len(parts) == 3 else ""
        try:
            listed = _object(self._get(self.case.ngc, f"/v2/org/{parts[0]}{team}/models/{parts[-1]}/versions/{quote(ref)}/files"))
            files = listed.get("modelFiles")
            self.note("ngc.model", OK, f"{name}:{ref}: {len(files) if isinstance(files, list) else 0} files listed")
        except AirlockError as error:
            self.refused("ngc.model", error)


def _object(answer: Answer) -> dict[str, Any]:
    """The JSON object of an answer; empty for anything else."""
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def exit_code(lines: list[Line]) -> int:
    """0 without a failed line; else the code of the first one's reason, or that of whatever is not available where it has none of its own."""
    first = next((line for line in lines if line.state == FAIL), None)
    if first is None:
        return 0
    refusals = ("model.oci", "model.hub", "ngc.model", "ngc.key", "key")
    denied = first.check in refusals and first.reason not in ("unavailable", "connection")
    return EXIT_CODES.get(first.reason, DENIED if denied else Unavailable.exit_code)
