"""The front against a scripted engine, both real processes: routes, error shapes, streams byte for byte, aborts, deaths, drain, restarts."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import ROOT, find_port
from tests.contracts.fronts import CHAT, DRIVER, MODEL, SECRET, Serve, Served, in_both_shapes, serve

pytestmark = pytest.mark.server
__all__ = ["serve"]


def test_live_at_once_ready_follows_the_engine(serve: Serve) -> None:
    served = serve("--fake-load-s", "4", wait=False)
    began = time.monotonic()
    assert served.ask("GET", "/v1/health/live")[0] == 200
    assert time.monotonic() - began < 2
    assert served.ask("GET", "/v1/health/ready")[0] == 503
    status, body, _ = served.ask("POST", "/v1/chat/completions", CHAT)
    assert status == 503
    in_both_shapes(body, 503)
    served.wait(served.ready)


def test_openai_client(serve: Serve) -> None:
    client = serve().client()
    assert [m.id for m in client.models.list()] == ["acme/tiny"]
    messages: Any = CHAT["messages"]
    assert client.chat.completions.create(model="acme/tiny", messages=messages).choices[0].message.content == "The answer is forty-two."
    stream = client.chat.completions.create(model="acme/tiny", messages=messages, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "The answer is forty-two."
    assert client.completions.create(model="acme/tiny", prompt="x").choices[0].text == "The answer is forty-two."
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.NotFoundError, match="does not support this route"):
        client.embeddings.create(model="acme/tiny", input="x")


def test_stream_is_byte_identical_to_the_engines(serve: Serve) -> None:
    served = serve()
    body = json.dumps({**CHAT, "stream": True}).encode()
    with socket.socket(socket.AF_UNIX) as direct:
        direct.connect(str(served.folder / "e.sock"))
        direct.sendall(b"POST /v1/chat/completions HTTP/1.0\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        raw = b"".join(iter(lambda: direct.recv(65536), b""))
    assert served.stream() == raw.partition(b"\r\n\r\n")[2]
    assert raw.endswith(b"data: [DONE]\n\n")


def test_alias_is_answered_under_the_name_asked_for(serve: Serve) -> None:
    served = serve(names=("acme/tiny", "short"))
    assert served.ask("POST", "/v1/chat/completions", {**CHAT, "model": "short"})[1]["model"] == "short"
    frames = [json.loads(f[6:]) for f in served.stream(model="short").split(b"\n\n") if f and b"[DONE]" not in f]
    assert len(frames) == 6 and {f["model"] for f in frames} == {"short"}
    assert [m["id"] for m in served.ask("GET", "/v1/models")[1]["data"]] == ["acme/tiny", "short"]


def test_only_listed_routes_reach_the_engine(serve: Serve) -> None:
    served = serve()
    for path in (
        "/invocations",
        "//v1/models/../../invocations",
        "/v1/%2e%2e/invocations",
        "/docs",
        "/update_weights",
        "/v1/chat/completions/../../invocations",
    ):
        for method in ("GET", "POST"):
            status, body, _ = served.ask(method, path, {})
            assert status == 404, path
            in_both_shapes(body, 404)
    status, body, headers = served.ask("GET", "/v1/chat/completions")
    assert status == 405 and headers["Allow"] == "POST"
    in_both_shapes(body, 405)
    assert not served.records()


def test_no_local_path_and_no_credential_crosses_the_front(serve: Serve) -> None:
    served = serve()
    for path in ("/v1/models", "/v1/metadata", "/v1/version", "/metrics", "/v1/metrics"):
        status, body, headers = served.ask("GET", path)
        assert status == 200 and MODEL not in f"{body}{headers}" and "/e.sock" not in str(body), path
    status, body, _ = served.ask("POST", "/v1/chat/completions", {"model": "acme/tiny"})
    assert status == 400 and MODEL not in str(body)
    in_both_shapes(body, 400)
    assert served.ask("GET", "/v1/models")[1]["data"][0] | {"created": 0} == {
        "id": "acme/tiny",
        "object": "model",
        "created": 0,
        "owned_by": "airlock",
        "root": "acme/tiny",
        "parent": None,
        "max_model_len": 512,
        "permission": [],
    }
    (seen,) = served.records()
    assert SECRET not in json.dumps(seen) and not {"authorization", "cookie"} & {h.lower() for h in seen["headers"]}
    environ = Path(f"/proc/{_engine_pid(served)}/environ").read_bytes()
    assert SECRET.encode() not in environ and set(environ.strip(b"\0").split(b"\0")) == {b"PATH=/usr/bin:/bin", b"FAKE_ONLY=1"}


def _engine_pid(served: Served) -> int:
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
    return int(children[0])


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 200_000, b'{"model": 7}', b'{"model": ["acme/tiny"]}'])
def test_hostile_bodies_get_an_error_and_no_upstream_request(serve: Serve, raw: bytes) -> None:
    served = serve()
    status, body, _ = served.ask("POST", "/v1/chat/completions", raw=raw)
    assert status in (400, 404)
    in_both_shapes(body, status)
    assert not served.records() and served.ready()


def test_a_body_over_the_limit_is_refused(serve: Serve) -> None:
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port)) as s:
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        answer = b""
        with contextlib.suppress(OSError):
            for _ in range(40):
                s.sendall(piece)
        with contextlib.suppress(OSError):
            answer = s.recv(65536)
    assert not answer or b" 413 " in answer.split(b"\r\n")[0]
    assert served.ready() and not served.records()


def test_embeddings_accept_what_nim_clients_send(serve: Serve) -> None:
    served = serve("--runner", "pooling")
    body = {"model": "acme/tiny", "input": ["a", "b"], "input_type": "query", "encoding_format": None, "truncate": "NONE"}
    status, answer, _ = served.ask("POST", "/v1/embeddings", body)
    assert status == 200 and len(answer["data"]) == 2
    assert served.records()[0]["body"] == {"model": "acme/tiny", "input": ["a", "b"]}
    assert served.ask("POST", "/v1/embeddings", {**body, "truncate": "START"})[0] == 200
    assert served.records()[1]["body"] == {"model": "acme/tiny", "input": ["a", "b"], "truncate_prompt_tokens": -1, "truncation_side": "left"}
    assert served.ask("POST", "/v1/embeddings", {**body, "truncate": "MIDDLE"})[0] == 400
    for alias, status in (("acme/tiny-query", 200), ("acme/tiny-passage", 200), ("acme/tiny-query-query", 404), ("acme/tiny-x", 404)):
        found, answer, _ = served.ask("POST", "/v1/embeddings", {"model": alias, "input": "a"})
        assert found == status and (status == 404 or (answer["model"] == alias and served.records()[-1]["body"]["model"] == "acme/tiny"))
    assert served.ask("POST", "/v1/chat/completions", CHAT | {"model": "acme/tiny-query"})[0] == 404
    status, answer, _ = served.ask("POST", "/v1/chat/completions", CHAT)
    assert status == 404 and "does not support this route" in answer["message"]


def test_client_that_leaves_aborts_the_engines_request(serve: Serve) -> None:
    served = serve("--fake-frames", "1000", "--fake-frame-s", "0.02")
    with socket.create_connection(("127.0.0.1", served.port)) as s:
        body = json.dumps({**CHAT, "stream": True}).encode()
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in s.recv(4096)
    served.wait(lambda: any(r.get("aborted") for r in served.records()), 5)
    served.wait(lambda: "airlock_requests_in_flight 0" in served.ask("GET", "/metrics")[1], 5)
    assert 'finished_reason="abort",model_name="acme/tiny"} 1' in served.ask("GET", "/v1/metrics")[1]


def test_engine_death_in_a_stream_gives_an_error_frame_and_a_restart(serve: Serve) -> None:
    served = serve("--fake-frames", "50", "--fake-frame-s", "0.02", "--fake-die-after", "3")
    data = served.stream()
    frames = [f for f in data.split(b"\n\n") if f]
    assert len(frames) == 4 and b"[DONE]" not in data and data.endswith(b"\n\n")
    in_both_shapes(json.loads(frames[-1][6:]), 500)
    served.wait(lambda: "airlock_engine_restarts_total 1" in served.ask("GET", "/metrics")[1])
    served.wait(served.ready)
    with pytest.raises(openai.APIError):
        list(served.client().chat.completions.create(model="acme/tiny", messages=[{"role": "user", "content": "x"}], stream=True))


def test_engine_death_before_the_answer_is_503(serve: Serve) -> None:
    status, body, _ = serve("--fake-die-after", "0").ask("POST", "/v1/chat/completions", CHAT)
    assert status == 503
    in_both_shapes(body, 503)


def test_a_stalled_stream_ends_with_an_error_frame(serve: Serve) -> None:
    served = serve("--fake-stall-after", "3", idle_s=0.5)
    data = served.stream()
    assert data.count(b'"delta"') == 3 and b"sent nothing for" in data and b"[DONE]" not in data
    assert served.ready()


def test_a_stream_without_done_is_told_as_broken(serve: Serve) -> None:
    data = serve("--fake-no-done").stream()
    assert data.count(b'"delta"') == 6 and b'"object": "error"' in data and b"[DONE]" not in data


def test_unhealthy_engine_turns_ready_off_and_is_restarted(serve: Serve, tmp_path: Path) -> None:
    flag = tmp_path / "sick"
    served = serve("--fake-health", str(flag))
    before = _engine_pid(served)
    flag.touch()
    served.wait(lambda: not served.ready(), 2)  # as docs/operations.md says
    served.wait(lambda: "airlock_engine_restarts_total 1" in served.ask("GET", "/metrics")[1])
    flag.unlink()
    served.wait(served.ready)
    assert _engine_pid(served) != before


def test_sigterm_drains_the_stream(serve: Serve) -> None:
    served = serve("--fake-frames", "60", "--fake-frame-s", "0.05")
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": True}))
    answer = connection.getresponse()
    first = answer.read(10)
    served.process.send_signal(signal.SIGTERM)
    served.wait(lambda: not served.ready())
    assert (first + answer.read()).endswith(b"data: [DONE]\n\n")
    assert served.process.wait(20) == 0


def test_sigterm_with_a_stream_longer_than_the_drain(serve: Serve, tmp_path: Path) -> None:
    child = tmp_path / "child"
    served = serve("--fake-frames", "5000", "--fake-frame-s", "0.02", "--fake-child", str(child), "--fake-ignore-term", drain_s=0.3, stop_s=0.3)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": True}))
    answer = connection.getresponse()
    first, engine = answer.read(10), _engine_pid(served)
    served.process.send_signal(signal.SIGTERM)
    data = first + answer.read()
    assert b"[DONE]" not in data and b'"object": "error"' in data
    assert served.process.wait(20) == 0
    for pid in (engine, int(child.read_text())):
        assert _gone(pid), "a process of the engine's group is left"


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_killed_front_takes_the_engine_with_it(serve: Serve) -> None:
    served = serve()
    engine = _engine_pid(served)
    served.process.kill()
    served.process.wait()
    end = time.monotonic() + 2  # as docs/operations.md says
    while not _gone(engine):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_context_that_does_not_fit_is_shortened_once(serve: Serve) -> None:
    served = serve("--max-model-len", "4096", "--fake-needs-len", "3072")
    assert served.ask("GET", "/v1/models")[1]["data"][0]["max_model_len"] == 3072


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (["--no-such-flag"], "bad_config"),
        (["--fake-start-rc", "1", "--fake-start-log", "SafetensorError: Error while deserializing header"], "bad_weights"),
        (["--fake-load-s", "60"], "start_timeout"),
    ],
)
def test_a_hopeless_engine_ends_the_front_with_its_reason(serve: Serve, flags: list[str], kind: str) -> None:
    served = serve(*flags, wait=False, ready_s=2.0 if kind == "start_timeout" else 45.0)
    out, _ = served.process.communicate(timeout=60)
    assert served.process.returncode == 36
    error = json.loads(out.splitlines()[-1])
    assert error["reason"] == "engine_failed" and f"({kind})" in error["what"]


def test_port_in_use_is_told_before_the_engine_starts(serve: Serve, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        args = {"socket": str(tmp_path / "s"), "port": port, "names": ["a"], "log": str(tmp_path / "l"), "argv": ["/nonexistent"], "settings": {}}
        done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(args)], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 36 and json.loads(done.stdout)["reason"] == "port_taken"


def test_a_missing_engine_program_is_told(tmp_path: Path) -> None:
    args = {"socket": str(tmp_path / "s"), "port": find_port(), "names": ["a"], "log": str(tmp_path / "l"), "argv": ["/nonexistent"], "settings": {}}
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(args)], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 36 and json.loads(done.stdout)["reason"] == "engine_failed" and "Traceback" not in done.stderr
