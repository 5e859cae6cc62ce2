"""`airlock doctor` against faults made for it: each is told in its own words, with its own exit code, and no line holds a key."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from artifact.doctor import EXIT_CODES
from artifact.surroundings import proxy
from runtime.settings import EXIT_CODES as RUNTIME_CODES
from tests.conftest import AIRLOCK, airlock
from tests.contracts.doors import Door
from tests.contracts.doors import serving as serving_registry
from tests.contracts.ngc import fill, new_ngc_site, ngc_serving
from tests.contracts.stores import s3_url
from tests.fakes.tls import authority, leaf, serving_tls
from tests.flows.test_watch import faked
from tests.operated import Operated, operated, wait_for
from tests.services import nginx, rgw

pytestmark = pytest.mark.server
DAY = datetime.timedelta(days=1)
LOCAL = ipaddress.ip_address("127.0.0.1")
CA = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")


@dataclass
class Told:
    """What one run said."""

    status: int
    lines: list[dict[str, str]]

    def of(self, check: str) -> dict[str, str]:
        found = [line for line in self.lines if line["check"] == check]
        assert found, [line["check"] for line in self.lines]
        return next((line for line in found if line["state"] != "ok"), found[0])

    def failed(self) -> list[str]:
        return [line["check"] for line in self.lines if line["state"] == "fail"]


def examine(url: str, *argv: str, key: str = "", keys: dict[str, str] | None = None, **env: str) -> Told:
    """Runs the command in an environment that holds nothing but what is given."""
    given = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **({"AIRLOCK_KEY": key} if key else {}), **env}
    command = [str(AIRLOCK), "doctor", "--registry", url, "--json", *argv]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=given, check=False)
    assert time.monotonic() - began < 100 and done.stdout, done.stderr
    said = done.stdout + done.stderr
    assert "Traceback" not in said and (not key or key not in said) and not any(k in said for k in (keys or {}).values())
    doc: dict[str, Any] = json.loads(done.stdout)
    assert doc["exit_code"] == done.returncode
    assert all(line["do"] for line in doc["lines"] if line["state"] == "fail" and line["check"] not in ("model.oci", "model.hub", "ngc.model"))
    return Told(done.returncode, doc["lines"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    data = tmp_path_factory.mktemp("doctor") / "data"
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        fill(door, data)
    with operated(data, keys, AIRLOCK_TLS="self-signed", AIRLOCK_NGC="127.0.0.1:0", AIRLOCK_S3="127.0.0.1:0") as found:
        yield found


def trust(server: Operated) -> dict[str, str]:
    return dict.fromkeys(("AIRLOCK_CA_FILE", *CA), str(server.data / "tls" / "cert.pem"))


def ngc(server: Operated) -> str:
    assert server.told
    return server.told["ngc"]


def test_nothing_is_wrong(server: Operated) -> None:
    found = examine(server.url, "--ngc", ngc(server), "--model", "acme/vision/demo:1.10", key=server.keys["root"], **trust(server))
    assert found.status == 0 and {line["state"] for line in found.lines} == {"ok"}, found.lines
    assert "4 files" in found.of("ngc.model")["what"] and "a manifest of" in found.of("model.oci")["what"]
    assert "bytes come from the registry" in found.of("model.hub")["what"] and "token" in found.of("token")["what"]
    assert "tier enterprise" in found.of("key")["what"] and "this key sees" in found.of("models")["what"]


def test_the_table_for_people(server: Operated) -> None:
    env = {"PATH": os.environ["PATH"], "AIRLOCK_KEY": server.keys["root"], "HF_ENDPOINT": server.url + "/api", **trust(server)}
    done = subprocess.run([str(AIRLOCK), "doctor", "--registry", server.url], capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 60 and server.keys["root"] not in done.stdout
    assert "fail  environment  HF_ENDPOINT ends with /api" in done.stdout and f"fix: export HF_ENDPOINT={server.url}\n" in done.stdout, done.stdout


@pytest.mark.parametrize(("who", "status", "words"), [("expired", 22, "expired on"), ("wrong", 21, "not valid here"), ("", 20, "no key is set")])
def test_the_key(server: Operated, who: str, status: int, words: str) -> None:
    key = "nvapi-" + "0" * 58 if who == "wrong" else server.keys.get(who, "")
    found = examine(server.url, "--ngc", ngc(server), key=key, keys=server.keys, **trust(server))
    assert (found.status, found.of("key")["state"]) == (status, "fail") and words in found.of("key")["what"], found.lines


def test_a_revoked_key(server: Operated) -> None:
    row = json.loads(airlock("key", "create", "--data", str(server.data), "--org", "acme", "--models", "**", "--json").stdout)
    airlock("key", "revoke", "--data", str(server.data), row["key_id"])
    found = examine(server.url, key=row["key"], **trust(server))
    assert found.status == 23 and "was revoked on" in found.of("key")["what"], found.lines


def test_a_model_that_the_key_may_not_have(server: Operated) -> None:
    for who, model, status in (("low", "ngc/nim/meta/paid:1", 26), ("acme", "other/secret:1", 24), ("nothing", "acme/vision/demo:1.10", 25)):
        found = examine(server.url, "--model", model, "--ngc", ngc(server), key=server.keys[who], **trust(server))
        assert found.status == status and found.failed() == ["model.oci", "model.hub", "ngc.model"], (who, found.status, found.lines)


def test_an_authority_that_nobody_told_of(server: Operated) -> None:
    found = examine(server.url, key=server.keys["root"])
    assert found.status == 42 and "authority that is not trusted" in found.of("tls")["what"] and "SHA-256" in found.of("tls")["what"]
    assert all(v in found.of("authority")["do"] for v in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "AIRLOCK_CA_FILE"))
    half = examine(server.url, key=server.keys["root"], **{**trust(server), "REQUESTS_CA_BUNDLE": "", "CURL_CA_BUNDLE": ""})
    line = half.of("authority")
    assert half.status == 0 and line["state"] == "warn" and "huggingface_hub 0.36" in line["what"] and "REQUESTS_CA_BUNDLE" in line["do"], line


def test_a_variable_that_names_another_authority(server: Operated, tmp_path: Path) -> None:
    other = str(authority(tmp_path / "other").file)
    found = examine(server.url, key=server.keys["root"], **{**trust(server), "SSL_CERT_FILE": other})
    assert found.status == 42 and found.failed() == ["authority"] and found.of("authority")["what"].startswith("SSL_CERT_FILE set to a file"), (
        found.lines
    )
    gone = examine(server.url, key=server.keys["root"], **{**trust(server), "REQUESTS_CA_BUNDLE": str(tmp_path / "none.pem")})
    assert gone.status == 60 and "REQUESTS_CA_BUNDLE" in gone.of("environment")["what"], gone.lines


@pytest.mark.parametrize(
    ("case", "words", "do"),
    [
        ("name", "is for another name than 127.0.0.1; for 127.0.0.2", "write the name"),
        ("expired", "has expired", "renew it"),
        ("early", "is not valid yet", "clock"),
    ],
)
def test_a_certificate_that_does_not_fit(tmp_path: Path, case: str, words: str, do: str) -> None:
    now = datetime.datetime.now(datetime.UTC)
    ours = authority(tmp_path / "ca")
    begin, end = {"expired": (now - 9 * DAY, now - DAY), "early": (now + DAY, now + 9 * DAY)}.get(case, (now - DAY, now + DAY))
    with serving_tls(leaf(ours, tmp_path / "leaf", ipaddress.ip_address("127.0.0.2") if case == "name" else LOCAL, begin, end)) as port:
        found = examine(f"https://127.0.0.1:{port}", "--ca", str(ours.file), key="nvapi-" + "1" * 58)
    assert found.status == 42 and words in found.of("tls")["what"] and do in found.of("tls")["do"], found.lines


def test_a_clock_that_is_wrong(server: Operated) -> None:
    ahead = examine(server.url, key=server.keys["root"], **trust(server), **faked(datetime.timedelta(hours=2)))
    assert ahead.status == 62 and "ahead of the server's" in ahead.of("clock")["what"], ahead.lines
    years = examine(server.url, key=server.keys["root"], **trust(server), **faked(datetime.timedelta(days=800)))
    assert years.status == 62 and "correct this machine's clock" in years.of("tls")["do"] and "has expired" in years.of("tls")["what"], years.lines
    behind = examine(server.url, key=server.keys["root"], **trust(server), **faked(datetime.timedelta(days=-30)))
    assert behind.status == 62 and "is not valid yet" in behind.of("tls")["what"], behind.lines


def test_names_and_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    refused = examine(f"http://127.0.0.1:{port}")
    assert refused.status == 40 and refused.failed() == ["tcp"] and "refuses the connection" in refused.of("tcp")["what"]
    unknown = examine("https://registry.no-such-site.invalid")
    assert unknown.status == 41 and unknown.failed() == ["dns"], unknown.lines


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def take() -> None:
            try:
                while True:
                    held.append(listener.accept()[0])
            except OSError:
                return

        threading.Thread(target=take, daemon=True).start()
        yield listener.getsockname()[1]
        for found in held:
            found.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_port_that_stays_silent(scheme: str) -> None:
    with silent() as port:
        found = examine(f"{scheme}://127.0.0.1:{port}", "--timeout", "0.5")
    assert found.status == 43 and "did not answer within 0.5 s" in found.of("http" if scheme == "http" else "tls")["what"], found.lines


def test_a_proxy_that_leads_nowhere(server: Operated) -> None:
    env = {**trust(server), "HTTPS_PROXY": "http://user:secret-word@127.0.0.1:9"}
    found = examine(server.url, key=server.keys["root"], **env)
    line = found.of("proxy")
    assert (
        found.status == 61 and "127.0.0.1:9 refuses" in line["what"] and "NO_PROXY" in line["do"] and "secret-word" not in json.dumps(found.lines)
    ), line
    assert examine(server.url, key=server.keys["root"], NO_PROXY="10.0.0.0/8,127.0.0.1", **env).status == 0


def test_whom_no_proxy_leaves_out() -> None:
    for left_out, goes in [
        ("", True),
        ("site", False),
        (".site", False),
        ("registry.site:443", False),
        ("*", False),
        ("te", True),
        ("other,registry.site", False),
    ]:
        assert bool(proxy({"https_proxy": "http://p:3128", "no_proxy": left_out}, "https://registry.site")) is goes, left_out
    assert proxy({"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "10.0.0.0/8"}, "https://10.1.2.3:5000") == ""
    assert (
        proxy({"HTTP_PROXY": "http://p:3128"}, "https://registry.site") == ""
        and proxy({"ALL_PROXY": "socks5h://p"}, "https://registry.site") == "p:1080"
    )


def test_a_server_that_is_not_ours(tmp_path: Path) -> None:
    document = tmp_path / "doc"
    document.write_text("```nginx\nlocation / { return 404; } # http://127.0.0.1:5000 /srv/airlock/blobs/\n```")
    with nginx.serving(document, "", tmp_path, nginx.owner()) as url:
        found = examine(url, key="nvapi-" + "1" * 58)
    assert found.status == 63 and "Server: nginx" in found.of("http")["what"] and "key" not in [line["check"] for line in found.lines], found.lines


def test_the_registry_is_not_its_ngc_listener(server: Operated) -> None:
    found = examine(server.url, "--ngc", server.url, key=server.keys["root"], **trust(server))
    assert found.status == 66 and found.failed() == ["ngc.key"], found.lines
    assert server.told
    for key in (server.keys["root"], ""):
        before = server.log.read_text().count('"door": "s3"')
        found = examine(server.url, "--ngc", server.told["s3"], key=key, **trust(server))
        assert found.status == (66 if key else 20) and "ngc.key" in found.failed(), found.lines
        wait_for(lambda seen=before: server.log.read_text().count('"door": "s3"') >= seen + 2, "its lines")  # type: ignore[misc]
    asked = [line for line in server.log.read_text().splitlines() if "get-caller-info" in line and '"door": "s3"' in line]
    assert len(asked) == 2, "a stranger is asked once each time, and is given no key"


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_of_authorities_that_is_none(server: Operated, tmp_path: Path, content: str | None) -> None:
    given = tmp_path / "ca.pem"
    if content:
        given.write_text(content)
    found = examine(server.url, "--ca", str(given), key=server.keys["root"])
    assert found.status == 60 and f"{given} cannot be used" in found.of("tls")["what"] and "--ca" in found.of("tls")["do"], found.lines


def test_a_public_url_that_sends_container_clients_elsewhere(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving_registry(data, keys := new_ngc_site(data), AIRLOCK_PUBLIC_URL="http://registry.elsewhere.invalid") as door:
        found = examine(door.url, key=keys["root"])
    line = found.of("token")
    assert found.status == 64 and "registry.elsewhere.invalid/token" in line["what"] and "AIRLOCK_PUBLIC_URL" in line["do"], found.lines


def test_variables_of_clients(server: Operated, tmp_path: Path) -> None:
    place = ngc(server).removeprefix("https://")
    cases: list[tuple[dict[str, str], str, str]] = [
        ({"HF_ENDPOINT": server.url + "/api/"}, "fail", "ends with /api"),
        ({"HF_ENDPOINT": "registry.site"}, "fail", "is no URL"),
        ({"HF_ENDPOINT": "https://huggingface.co"}, "warn", "another place"),
        ({"HF_HUB_OFFLINE": "1"}, "warn", "ask nobody"),
        ({"NGC_API_ENDPOINT": f"https://{place}"}, "warn", "ModelExpress wants one, a NIM none"),
        ({"NGC_API_ENDPOINT": f"{place}/"}, "warn", "ends with a slash"),
        ({"NGC_API_SCHEME": "http"}, "fail", "NGC_API_SCHEME"),
        ({"NGC_CLI_API_URL": f"http://{place}"}, "fail", "begins with http://"),
        ({"NGC_CLI_API_URL": "https://registry.site"}, "fail", "has no port"),
        ({"NGC_API_KEY": "nvapi-with a blank"}, "fail", "characters that no key has"),
        ({"HF_TOKEN": "nvapi-another"}, "warn", "different keys"),
    ]
    for env, state, words in cases:
        found = examine(server.url, "--ngc", ngc(server), key=server.keys["root"], **trust(server), **env)
        line = found.of("environment")
        assert (line["state"], words in line["what"], found.status) == (state, True, 60 if state == "fail" else 0), (env, found.lines)
    (tmp_path / "file").write_text("")
    cache = examine(server.url, key=server.keys["root"], **trust(server), HF_HOME=str(tmp_path / "file" / "hub"))
    assert cache.status == 38 and "HF_HOME" in cache.of("environment")["what"], cache.lines


def test_a_store_that_is_out_of_reach(tmp_path: Path) -> None:
    """The registry sends clients to a public endpoint whose name only the inside knows; then to one behind an authority that they do not trust."""
    data = tmp_path / "data"
    keys = new_ngc_site(data)
    url = s3_url(tmp_path)
    with serving_registry(data, keys, AIRLOCK_BLOBS=f"{url}&public=http://s3.inside.invalid:9000") as door:
        push(door)
        found = examine(door.url, "--model", "acme/m:1", key=keys["root"])
        line = found.of("redirect.dns")
        assert found.status == 65 and "s3.inside.invalid does not resolve" in line["what"] and "AIRLOCK_STREAM_TO" in line["do"], found.lines
    here = rgw.shared()
    with serving_registry(data, keys, AIRLOCK_BLOBS=f"{url}&public={here.http.replace('127.0.0.1', 'localhost')}") as door:
        fine = examine(door.url, "--model", "acme/m:1", key=keys["root"])
        assert fine.status == 0 and "bytes come from localhost:" in fine.of("redirect.http")["what"], fine.lines
    with serving_registry(data, keys, AIRLOCK_BLOBS=f"{url}&public={here.https.replace('127.0.0.1', 'localhost')}") as door:
        strange = examine(door.url, "--model", "acme/m:1", key=keys["root"])
        assert strange.status == 65 and strange.failed() == ["redirect.tls"] and "Signature" not in json.dumps(strange.lines), strange.lines


def push(door: Door) -> None:
    """A model of one file in the store."""
    from tests.contracts.test_hub_door import push as push_model

    push_model(door, "acme/m", {"config.json": b'{"a": 1}' * 100_000}, ref="1")


def test_what_is_no_url() -> None:
    for argv, words in (
        (["--registry", "registry.site"], "not an http or https URL"),
        ([], "no registry is named"),
        (["--registry", "http://x", "--model", "A B"], "name"),
    ):
        done = airlock("doctor", *argv, check=False, AIRLOCK_REGISTRY="")
        assert done.returncode == 6 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_codes_are_those_of_the_runtime_where_the_reason_is_the_same() -> None:
    own = {"environment", "proxy", "clock", "not_airlock", "realm", "redirect", "ngc"}
    assert {r: c for r, c in EXIT_CODES.items() if r not in own} == {r: RUNTIME_CODES[r] for r in EXIT_CODES if r not in own}
    assert len({EXIT_CODES[r] for r in own}) == len(own) and not {EXIT_CODES[r] for r in own} & set(RUNTIME_CODES.values())
