"""Operating the registry: health, readiness, figures, log lines, and a stop that loses nothing, all against a real process."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.contracts.doors import Door, new_site, sha
from tests.operated import LONG_S, Operated, operated, wait_for

pytestmark = pytest.mark.server
MIB = 1024 * 1024


@pytest.fixture
def site(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    data = tmp_path / "data"
    return data, new_site(data)


@pytest.fixture
def server(site: tuple[Path, dict[str, str]]) -> Iterator[Operated]:
    with operated(*site) as found:
        yield found


def noise(size: int, seed: str) -> bytes:
    block = b"".join(hashlib.sha256(f"{seed}{i}".encode()).digest() for i in range(2048))
    return (block * (size // len(block) + 1))[: size - 16] + hashlib.md5(seed.encode()).digest()


# ---- health and figures


def test_health_and_readiness_name_their_checks(server: Operated) -> None:
    assert server.operator("/healthz") == (200, '{"status": "ok"}')
    status, text = server.operator("/readyz")
    assert (status, json.loads(text)["checks"]) == (200, {"draining": "ok", "database": "ok", "store": "ok"})
    assert server.operator("/v2/")[0] == 404
    assert server.ask("GET", "/metrics", who=None).status in (401, 404), "the doors serve no figures"
    assert server.ask("GET", "/readyz", who=None).status in (401, 404)


def test_not_ready_while_the_store_or_the_database_is_away(server: Operated) -> None:
    for path, check in ((server.data / "partial", "store"), (server.data / "registry.db", "database")):
        path.rename(path.with_suffix(".away"))
        wait_for(lambda: server.operator("/readyz")[0] == 503, f"not ready without {path.name}")
        found = json.loads(server.operator("/readyz")[1])["checks"]
        assert found[check] != "ok" and [v for k, v in found.items() if k != check] == ["ok", "ok"], found
        path.with_suffix(".away").rename(path)
        wait_for(lambda: server.operator("/readyz")[0] == 200, f"ready again with {path.name}")
    assert server.operator("/healthz")[0] == 200


def test_figures_count_what_happened(server: Operated) -> None:
    digest, raw = server.image("acme/m", "1", [noise(100_000, "a")])
    layer = json.loads(raw)["layers"][0]["digest"]
    before = server.figures()
    assert server.ask("GET", f"/v2/acme/m/blobs/{layer}").status == 200
    assert server.ask("GET", f"/v2/acme/m/manifests/{digest}").status == 200
    assert server.ask("HEAD", f"/v2/acme/m/manifests/{digest}").status == 200
    assert server.ask("GET", "/v2/acme/m/manifests/1", who="other").status == 404
    assert server.ask("GET", "/v2/acme/m/manifests/1", who=None).status == 401
    assert server.ask("GET", "/v2/acme/m/manifests/nothing").status == 404
    assert server.ask("POST", "/v2/acme/m/blobs/uploads/").status == 202

    def grown() -> dict[str, float]:
        now = server.figures()
        return {k: v - before.get(k, 0) for k, v in now.items() if v != before.get(k, 0)}

    wanted = {
        'airlock_http_requests_total{door="oci",method="GET",status="2xx"}': 2,
        'airlock_http_requests_total{door="oci",method="HEAD",status="2xx"}': 1,
        'airlock_http_requests_total{door="oci",method="GET",status="4xx"}': 3,
        'airlock_pulls_total{kind="blob"}': 1,
        'airlock_pulls_total{kind="manifest"}': 1,
        'airlock_denials_total{reason="not_visible"}': 1,
        'airlock_denials_total{reason="key_absent"}': 1,
        'airlock_uploads{state="open"}': 1,
    }
    wait_for(lambda: wanted.items() <= grown().items(), f"figures {grown()}", 20)
    found = grown()
    assert found['airlock_http_bytes_total{direction="out"}'] >= 100_000 + len(raw)
    assert found['airlock_http_request_seconds_count{door="oci"}'] == 7
    assert not [k for k in found if "airlock_errors" in k], found


def test_the_last_run_of_a_job_is_a_figure(server: Operated) -> None:
    with sqlite3.connect(server.data / "registry.db") as db:
        report = json.dumps({"blobs": 7, "bytes": 4096, "dry": True, "why": "acme/secret", "Bad name": 1})
        db.execute("INSERT OR REPLACE INTO job (name, cursor, started, ended, report) VALUES ('gc', 'acme/secret', 100, 160, ?)", (report,))
        db.execute("INSERT INTO job (name, cursor, started, ended, report) VALUES ('acme/secret', '', 1, 1, 'no json')")

    def read() -> dict[str, float]:
        return {k: v for k, v in server.figures().items() if k.startswith("airlock_job")}

    found = wait_for(read, "job figures")
    gc = {k: v for k, v in found.items() if 'job="gc"' in k}
    assert gc == {
        f'airlock_job_figure{{figure="{k}",job="gc"}}': v
        for k, v in (("blobs", 7), ("bytes", 4096), ("started_seconds", 100), ("ended_seconds", 160))
    }
    assert "secret" not in server.operator("/metrics")[1]


def test_a_scheduled_collection_leaves_a_line_and_figures(site: tuple[Path, dict[str, str]]) -> None:
    with operated(*site, AIRLOCK_GC_EVERY_S="1") as server:
        line = wait_for(lambda: [x for x in server.lines() if x.get("message") == "job ended"], "the line of the job")[0]
        assert (line["job"], line["error"], line["dry_run"]) == ("gc", "", False)
        wait_for(lambda: server.figures().get('airlock_job_figure{figure="ended_seconds",job="gc"}', 0) > 0, "its end as a figure")


def test_labels_stay_few_whatever_clients_send(server: Operated) -> None:
    for i in range(60):
        server.ask("GET", f"/v2/n{i}/x{i}/manifests/t{i}", who="acme" if i % 2 else None)
        server.ask("BREW" if i % 2 else "PURGE", f"/{i}/y")
        server.ask("GET", f"/airlock/v1/word{i}")
        server.ask("GET", f"/o{i}/m/resolve/r{i}/f{i}")
    found = [k for k in server.figures() if k.startswith("airlock")]
    words = {word for k in found for word in re.findall(r'="([^"]*)"', k)}
    assert not [w for w in words if re.search(r"[/:@]|\d{2}", w) and not re.fullmatch(r"[0-9.]+|\+Inf|[1-5]xx", w)], words
    assert len(found) < 120, len(found)


def test_slow_clients_do_not_take_the_listener_away(server: Operated) -> None:
    assert server.told
    port = int(server.told["metrics"].rsplit(":", 1)[1])
    slow = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(100)]
    ended: set[socket.socket] = set()
    until = time.monotonic() + 60
    while len(ended) < len(slow) and time.monotonic() < until:
        for sock in slow:
            if sock not in ended:
                try:
                    sock.sendall(b"G")
                    sock.settimeout(0.01)
                    if not sock.recv(100):
                        ended.add(sock)
                except TimeoutError:
                    pass
                except OSError:
                    ended.add(sock)
        assert server.operator("/healthz")[0] == 200 and server.operator("/readyz")[0] == 200
    assert len(ended) == len(slow), "a byte now and then keeps no place for long"
    for sock in slow:
        sock.close()


# ---- log lines and request ids


def test_a_request_id_is_taken_told_and_recorded(server: Operated) -> None:
    given = "build-1234.step_5"
    answer = server.ask("GET", "/v2/acme/none/manifests/1", who="other", X_Request_ID=given)
    assert answer.headers["x-request-id"] == given
    assert server.ask("GET", "/airlock/v1/catalog/none", X_Request_ID="other-id-1").json()["request_id"] == "other-id-1"
    line = wait_for(lambda: [x for x in server.lines() if x.get("request_id") == given], "an access line")[0]
    assert (line["log"], line["status"], line["method"], line["reason"]) == ("airlock.access", 404, "GET", "not_visible")

    def audited() -> str:
        with sqlite3.connect(server.data / "registry.db") as db:
            return "\n".join(db.iterdump())

    wait_for(lambda: given in audited(), "the id in an audit row")


@pytest.mark.parametrize("given", ["short", "a" * 65, "has space in it", "-starts-with-dash", "line\tbreak12", "ünïcode-id"])
def test_another_request_id_is_replaced(server: Operated, given: str) -> None:
    answer = server.ask("GET", "/v2/", X_Request_ID=given.encode("utf-8").decode("latin-1"))
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_every_log_line_is_one_json_object(server: Operated) -> None:
    server.ask("GET", "/v2/")
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    messages = [line.get("message") for line in server.lines()]
    assert messages[0] == "started" and messages[-1] == "stopped" and "draining" in messages


# ---- the stop


def slow_pull(door: Door, repo: str, digest: str) -> socket.socket:
    """A pull of which only the first bytes are read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.settimeout(LONG_S)
    sock.connect(("127.0.0.1", door.port))
    sock.sendall(f"GET /v2/{repo}/blobs/{digest} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.keys['acme']}\r\n\r\n".encode())
    assert sock.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
    return sock


def rest(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(MIB):
        parts.append(part)
    return b"".join(parts).partition(b"\r\n\r\n")[2]


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return True
    return False


def test_a_stop_lets_a_slow_pull_end_and_suspends_an_upload(site: tuple[Path, dict[str, str]]) -> None:
    data, keys = site
    body, upload = noise(48 * MIB, "pull"), noise(16 * MIB, "push")
    with operated(data, keys) as server:
        server.image("acme/m", "1", [body])
        pull = slow_pull(server, "acme/m", sha(body))
        place = server.ask("POST", "/v2/acme/m/blobs/uploads/").headers["location"]
        push = socket.create_connection(("127.0.0.1", server.port), LONG_S)
        head = f"PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {keys['acme']}\r\nContent-Length: {len(upload)}\r\n\r\n"
        push.sendall(head.encode() + upload[: 8 * MIB])
        wait_for(lambda: sum(p.stat().st_size for p in (data / "partial").iterdir()) >= 4 * MIB, "4 MiB of the upload on disk")

        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.operator("/readyz")[0] == 503, "not ready")
        assert json.loads(server.operator("/readyz")[1])["checks"]["draining"] == "yes"
        wait_for(lambda: refused(server.port), "no more connections")
        with suppress(ConnectionResetError):  # what had been sent was not read any more, so the answer may be lost: the client resumes all the same
            assert push.recv(12, socket.MSG_WAITALL) in (b"HTTP/1.1 503", b"")
        assert server.process.poll() is None, "the pull is still open"
        assert server.operator("/healthz")[0] == 200
        assert hashlib.sha256(rest(pull)).digest() == hashlib.sha256(body).digest()
        assert server.ended() == 0
        assert [x for x in server.lines() if x.get("message") == "uploads suspended"]

    with operated(data, keys) as server:
        path = "/" + place.split("/", 3)[3] if "://" in place else place
        found = server.ask("GET", path)
        assert found.status == 204, found.body
        offset = int(found.headers["range"].split("-")[1]) + 1
        assert 4 * MIB <= offset <= 8 * MIB
        sent = server.ask("PATCH", found.headers["location"], upload[offset:], Content_Range=f"{offset}-{len(upload) - 1}")
        assert sent.status == 202, sent.body
        join = "&" if "?" in sent.headers["location"] else "?"
        assert server.ask("PUT", f"{sent.headers['location']}{join}digest={sha(upload)}", b"").status == 201
        assert server.ask("GET", f"/v2/acme/m/blobs/{sha(upload)}").body == upload


def test_a_second_signal_ends_at_once(site: tuple[Path, dict[str, str]]) -> None:
    body = noise(48 * MIB, "pull")
    with operated(*site) as server:
        server.image("acme/m", "1", [body])
        pull = slow_pull(server, "acme/m", sha(body))
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refused(server.port), "no more connections")
        time.sleep(1)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) in (0, 143)
        pull.close()


def test_pulls_that_outlast_the_drain_time_are_cut(site: tuple[Path, dict[str, str]]) -> None:
    body = noise(48 * MIB, "pull")
    with operated(*site, AIRLOCK_DRAIN_TIMEOUT_S="2") as server:
        server.image("acme/m", "1", [body])
        pull = slow_pull(server, "acme/m", sha(body))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        with pytest.raises(OSError, match=r"."):
            short = rest(pull)
            raise OSError("cut") if len(short) < len(body) else AssertionError("the pull was whole")


def test_the_delay_takes_requests_while_not_ready(site: tuple[Path, dict[str, str]]) -> None:
    with operated(*site, AIRLOCK_DRAIN_DELAY_S="8") as server:
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.operator("/readyz")[0] == 503, "not ready")
        assert server.ask("GET", "/v2/").status == 200, "a balancer that has not noticed yet still gets answers"
        assert server.ended() == 0


def test_a_hangup_does_not_end_a_server_without_tls(server: Operated) -> None:
    server.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert server.ask("GET", "/healthz").status == 200


def test_idle_kept_connections_do_not_hold_the_stop(site: tuple[Path, dict[str, str]]) -> None:
    with operated(*site) as server:
        idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        idle.request("GET", "/healthz")
        assert idle.getresponse().read() == b'{"status": "ok"}'
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        idle.close()
