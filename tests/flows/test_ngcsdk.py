"""The unmodified ngcsdk against the NGC door over TLS: what it does, the requests that it sends, and what its user reads when it is refused."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.contracts.doors import Door
from tests.contracts.ngc import BUNDLE, FILES, MIRRORED, fill, new_ngc_site, ngc_serving, push_image
from tests.flows.answered import accessed, unanswered
from tests.operated import Operated, operated
from tests.services.clients import client

pytestmark = pytest.mark.server
DRIVER = Path(__file__).resolve().parent.parent / "fakes" / "ngcsdk_driver.py"
P = "/v2/org/acme/team/vision/models/demo"
CALLER = "POST /v3/keys/get-caller-info"
Step = tuple[str, dict[str, Any]]


@dataclass
class Sdk:
    """The client's environment and the server that it is pointed at."""

    python: Path
    server: Operated
    ca: Path
    home: Path

    def run(self, *steps: Step, **env: str) -> list[list[Any]]:
        """Outcome and value of each step, and in `asked` what reached the server."""
        url = self.server.told["ngc"] if self.server.told else ""
        given = {"NGC_CLI_API_URL": url, "NGC_CLI_AUTH_URL": url, "REQUESTS_CA_BUNDLE": str(self.ca), "NGC_CLI_HOME": str(self.home)}
        given |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PATH": os.environ["PATH"], "HOME": str(self.home)}
        before = len(self.lines())
        argv = [str(self.python), "-P", str(DRIVER)]  # beside the driver lies a module that is called as one of the library
        done = subprocess.run(argv, input=json.dumps(steps), capture_output=True, text=True, timeout=120, env=given | env, check=False)
        told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert told, done.stdout + done.stderr
        self.asked = self.lines()[before:]
        assert not unanswered(self.asked), "a probe that no route took"
        out: list[list[Any]] = json.loads(told[0].removeprefix("RESULT "))
        return out

    def lines(self) -> list[dict[str, Any]]:
        """The access lines of the NGC listener so far."""
        return accessed(self.server.log, "ngc")

    def requests(self) -> list[str]:
        """Method and path of the requests of the last run; of a ticket only that it is one."""
        return [f"{line['method']} {re.sub(r'^/dl/.*', '/dl', line['path'])}" for line in self.asked]

    def unanswered(self) -> list[str]:
        """What the last run asked for and did not get."""
        return [f"{line['method']} {line['path']} -> {line['status']}" for line in self.asked if line["status"] not in (200, 206)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    data = tmp_path_factory.mktemp("ngcsdk") / "data"
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        fill(door, data)
        push_image(door, "nvcr.io/nim/meta/app")
    with operated(data, keys, AIRLOCK_TLS="self-signed", AIRLOCK_NGC="127.0.0.1:0", AIRLOCK_ANONYMOUS="on") as found:
        yield found


@pytest.fixture
def sdk(server: Operated, tmp_path: Path) -> Sdk:
    home = tmp_path / "home"
    home.mkdir()
    return Sdk(client("ngcsdk"), server, server.data / "tls" / "cert.pem", home)


def configure(door: Door, who: str, **more: str) -> Step:
    return "configure", {"api_key": door.keys[who], "org_name": "acme", **more}


def step(verb: str, *positional: str, **arguments: Any) -> Step:
    return verb, {"": list(positional), **arguments}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_download_with_a_personal_key(sdk: Sdk, tmp_path: Path) -> None:
    out = sdk.run(configure(sdk.server, "person", team_name="vision"), step("download", "acme/vision/demo:1.10", destination=str(tmp_path)))
    assert [o[0] for o in out] == ["ok", "ok"], out
    assert out[1][1]["status"] == "Completed", out
    assert contents(tmp_path / "demo_v1.10") == FILES
    assert sdk.unanswered() == []
    asked = [r for r in sdk.requests() if r != "GET /dl"]
    assert asked == [*[CALLER] * 5, f"GET {P}", f"GET {P}/versions/1.10", CALLER, f"GET {P}/versions/1.10/files", f"GET {P}/1.10/files"]
    assert sdk.requests().count("GET /dl") == len(FILES)


def test_download_of_some_files_with_a_service_key(sdk: Sdk, tmp_path: Path) -> None:
    fetch = step("download", "acme/vision/demo:1.10", destination=str(tmp_path), file_patterns=["*.json", "*.txt"])
    out = sdk.run(configure(sdk.server, "acme"), fetch)
    assert out[1][1]["status"] == "Completed" and set(contents(tmp_path / "demo_v1.10")) == {"config.json", "empty.txt"}
    assert sdk.requests().count(f"GET {P}/1.10/files") == 2 and sdk.requests().count("GET /dl") == 2 and sdk.unanswered() == []


def test_a_mirrored_model_is_found_by_its_ngc_name(sdk: Sdk, tmp_path: Path) -> None:
    out = sdk.run(configure(sdk.server, "root"), step("download", "nim/meta/llama:fp16", destination=str(tmp_path)))
    assert out[1][1]["status"] == "Completed" and contents(tmp_path / "llama_vfp16") == FILES and sdk.unanswered() == []


def test_a_guest_downloads_what_is_public(sdk: Sdk, tmp_path: Path) -> None:
    out = sdk.run(*(step("download", target, destination=str(tmp_path)) for target in ("acme/open/free:1", "acme/vision/demo:1.10")))
    assert out[0][1]["status"] == "Completed" and contents(tmp_path / "free_v1") == FILES, out
    assert out[1][0] == "AuthenticationException" and not (tmp_path / "demo_v1.10").exists(), out
    guest = "GET /v2/models/acme/open/free"
    asked = [r for r in sdk.requests()[:-1] if r != "GET /dl"]
    assert asked[:5] == [guest, guest, f"{guest}/versions/1", f"{guest}/versions/1/files", "GET /v2/models/org/acme/team/open/free/1/files"]


def test_info_and_lists(sdk: Sdk) -> None:
    out = sdk.run(
        configure(sdk.server, "acme"),
        step("info", "acme/vision/demo"),
        step("info", "acme/vision/demo:1.10"),
        step("files", "acme/vision/demo:1.10"),
        step("list", "acme/vision/demo"),
        step("list", "acme/vision/*"),
    )
    assert [o[0] for o in out] == ["ok"] * 6, out
    assert {file["path"] for file in out[3][1]} == set(FILES)
    assert [version["versionId"] for version in out[4][1]] == ["1.10", "1.0"]
    assert "acme/vision/demo" in json.dumps(out[5][1]) or "demo" in json.dumps(out[5][1])
    assert sdk.unanswered() == []
    searches = [r for r in sdk.requests() if "/v2/search/" in r]
    assert searches == [f"GET /v2/search/{at}/resources/MODEL" for at in ("catalog", "org/acme/team/vision", "subscriber/catalog")]


def test_signature(sdk: Sdk, tmp_path: Path) -> None:
    fetch = [step("signature", f"acme/vision/demo:{version}", destination=str(tmp_path)) for version in ("1.10", "1.0")]
    out = sdk.run(configure(sdk.server, "acme"), *fetch)
    assert out[1][0] == "ok" and contents(tmp_path / "demo_v1.10") == {"result.sigstore": BUNDLE}
    assert out[2][0] != "ok" and "is not signed" in out[2][1] and sdk.unanswered() == []


def test_images(sdk: Sdk) -> None:
    out = sdk.run(configure(sdk.server, "root"), step("images", "nim/meta/app"), step("image", "nim/meta/app"), step("image", "nim/meta/app:1.0"))
    assert [o[0] for o in out] == ["ok"] * 4, out
    assert "1.0" in json.dumps(out[1][1]) and "arm64" in json.dumps(out) and sdk.unanswered() == []


def test_refusals_as_the_user_reads_them(sdk: Sdk, tmp_path: Path) -> None:
    cases = {
        "nothing": ("acme/vision/demo:1.10", "AccessDeniedException", "403 Response: the grant on|403 Response: no grant of this key covers"),
        "low": ("nim/meta/paid:1", "NgcAPIError", "402 Response: ngc/nim/meta/paid requires the enterprise tier"),
        "acme": ("other/secret:1", "ResourceNotFoundException", "404 Response: this key sees no model of that name"),
    }
    steps = [
        part for who, (target, _, _) in cases.items() for part in (configure(sdk.server, who), step("download", target, destination=str(tmp_path)))
    ]
    out = sdk.run(*steps, step("download", "acme/vision/demo:9.9", destination=str(tmp_path)))
    for (kind, said), (_, wanted, words) in zip(out[1:6:2], cases.values(), strict=True):
        assert kind == wanted and re.search(words, said), out
    assert "could not be found" in out[6][1], out


def terms(server: Operated, name: str = MIRRORED, **body: str) -> None:
    """Says under what terms a model may be read."""
    done = server.ask("POST", "/airlock/v1/terms", json.dumps({"name": name, **body}), "root")
    assert done.status == 200, done.body


def test_terms_and_blocks_as_the_user_reads_them(sdk: Sdk, tmp_path: Path) -> None:
    fetch = (configure(sdk.server, "root"), step("download", "nim/meta/llama:fp16", destination=str(tmp_path)))
    try:
        for body, words in (
            ({"license": "the vendor's"}, "412 Response: nobody here has accepted"),
            ({"blocked": "a court"}, "451 Response: ngc/nim/meta/llama is"),
        ):
            terms(sdk.server, **body)
            kind, said = sdk.run(*fetch)[1]
            assert kind != "ok" and words in said, said
    finally:
        terms(sdk.server, license="", blocked="")
    assert sdk.run(*fetch)[1][1]["status"] == "Completed"


def test_configure_is_refused(sdk: Sdk) -> None:
    cases: list[tuple[str, dict[str, str], str]] = [
        ("expired", {}, "Invalid SAK key"),
        ("person", {"org_name": "other"}, "doesn't match organization"),
        ("person", {"team_name": "elsewhere"}, "Invalid team. Choose from"),
        ("acme", {"team_name": "vision"}, "Invalid team. Choose from"),
    ]
    out = sdk.run(*(("configure", configure(sdk.server, who)[1] | more) for who, more, _ in cases))
    for (kind, said), (_, _, words) in zip(out, cases, strict=True):
        assert kind != "ok" and words in said, out


@pytest.mark.full
def test_a_file_of_several_ranges_arrives_whole(tmp_path: Path) -> None:
    """The client fetches 512 MiB at a time, in parallel, and checks no sum: the bytes are compared here."""
    data, weights = tmp_path / "data", os.urandom(600_000_000)
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        door.push("acme/vision/big", "1", {"w.safetensors": weights})
    (tmp_path / "home").mkdir()
    with operated(data, keys, AIRLOCK_TLS="self-signed", AIRLOCK_NGC="127.0.0.1:0") as server:
        sdk = Sdk(client("ngcsdk"), server, data / "tls" / "cert.pem", tmp_path / "home")
        out = sdk.run(configure(server, "root"), step("download", "acme/vision/big:1", destination=str(tmp_path)))
        assert out[1][1]["status"] == "Completed" and sdk.requests().count("GET /dl") == 2, out
    assert contents(tmp_path / "big_v1") == {"w.safetensors": weights}


def test_the_certificate_names_the_listener(server: Operated, sdk: Sdk) -> None:
    assert server.told
    place = urlsplit(server.told["ngc"])
    pem = ssl.get_server_certificate((place.hostname or "", place.port or 0))
    assert pem.strip() == sdk.ca.read_text().strip()
