"""The classes of an engine's exit, the bounded log, and one engine from start to end as a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from artifact.errors import Invalid, Unavailable
from runtime.exits import classify
from runtime.launch import Launch
from runtime.supervisor import LINE_CAP, LINES, Engine, Keeper, Log

GENERIC = "\nRuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
SHORT = (
    "ValueError: To serve at least one request with the model's max seq len (4096), (2.00 GiB KV cache is needed, which is larger than the available "
    "KV cache memory (1.50 GiB). Based on the available memory, the estimated maximum model length is 3072. Try increasing"
)

CASES = [
    (2, "vllm: error: unrecognized arguments: --no-such-flag", "bad_config", "never", 0),
    (1, "error: argument --dtype: invalid choice", "bad_config", "never", 0),
    (1, "HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/nonexistent/model'", "bad_config", "never", 0),
    (1, "ValidationError: User-specified max_model_len (4096) is greater than the derived max_model_len (512)", "bad_config", "never", 0),
    (1, "Total number of attention heads (4) must be divisible by tensor parallel size (3).", "bad_config", "never", 0),
    (1, "SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered" + GENERIC, "bad_weights", "never", 0),
    (1, "_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4" + GENERIC, "unsupported", "never", 0),
    (1, "OSError: [Errno 98] Address already in use", "port", "once", 0),
    (1, "ValueError: No available memory for the cache blocks. Try increasing gpu_memory_utilization", "does_not_fit", "never", 0),
    (1, SHORT + GENERIC, "does_not_fit", "once", 3072),
    (1, "Free memory on device cuda:0 (1/80 GiB) on startup is less than desired GPU memory utilization (0.92", "gpu_busy", "never", 0),
    (1, "Free memory on device cuda:0 (40/80 GiB) on startup is less than desired GPU memory utilization (0.92", "gpu_busy", "once", 0),
    (1, "Free memory on device cuda:0 (4.4.4/0 GiB) on startup is less than desired GPU memory utilization", "gpu_busy", "never", 0),
    (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "does_not_fit", "never", 0),
    (1, "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm", "bad_config", "never", 0),
    (1, "RuntimeError: [enforce fail at device.cc:212] Unable to find interface for: [127.0.0.1]" + GENERIC, "no_loopback", "never", 0),
    (1, "RuntimeError: Cannot find any model weights with `/m`" + GENERIC, "bad_weights", "never", 0),
    (2, "Error: No such option: --no-such", "bad_config", "never", 0),
    (1, "ValueError: No GPU devices found on the node", "no_gpu", "never", 0),
    (1, "RuntimeError: Failed to bind socket to 127.0.0.1:8000: [Errno 98] Address already in use", "port", "once", 0),
    (1, "[Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use", "port", "once", 0),
    (1, "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "does_not_fit", "never", 0),
    (1, "(The engine plan file is not compatible with this version of TensorRT, expecting library version 10.1", "wrong_engine", "never", 0),
    (1, "(The engine plan file is generated on an incompatible device, expecting compute 8.0 got compute 9.0", "wrong_engine", "never", 0),
    (1, "[TensorRT-LLM][ERROR] Cuda Runtime (out of memory)", "does_not_fit", "never", 0),
    (1, "User-specified context_length (4096) is greater than the derived context_length (512).", "bad_config", "never", 0),
    (1, "Please pass the argument `trust_remote_code=True` to allow custom code to be run.", "needs_code", "never", 0),
    (1, "server_args=ServerArgs(trust_remote_code=True)", "unknown", "back-off", 0),
    (127, "the engine's program cannot be executed: /x/bin/trtllm-serve: No such file or directory", "bad_config", "never", 0),
    (-3, "Received sigquit from a child process. It usually means the child failed.", "unknown", "back-off", 0),
    (-9, "SafetensorError", "oom_kill", "back-off", 0),
    (137, "", "oom_kill", "back-off", 0),
    (0, "EngineDeadError: EngineCore encountered an issue", "engine_died", "back-off", 0),
    (-11, "Segmentation fault", "unknown", "back-off", 0),
]


@pytest.mark.parametrize(("rc", "log", "kind", "retry", "length"), CASES)
def test_recorded_exits_have_their_class(rc: int, log: str, kind: str, retry: str, length: int) -> None:
    found = classify(rc, "first line\n" + log + "\nlast line")
    assert (found.kind, found.retry, found.max_model_len, found.rc) == (kind, retry, length, rc)


def test_an_exit_we_asked_for_is_no_crash_and_words_of_clients_do_not_classify() -> None:
    assert classify(-9, "SafetensorError", asked=True).kind == "stopped"
    # Once it was ready, its log holds what clients sent: it must not decide that the engine never comes back.
    assert classify(1, "ValidationError: body.messages missing", was_ready=True).retry == "back-off"


def test_the_cause_is_quoted() -> None:
    assert "incomplete metadata" in classify(1, "SafetensorError: incomplete metadata" + GENERIC).detail
    assert classify(3, "\n".join(f"line {i}" for i in range(100))).detail.splitlines()[1] == "line 60"


def test_log_is_bounded_in_lines_and_width(tmp_path: Path) -> None:
    log = Log(tmp_path / "x" / "log")
    for _ in range(3):
        log.feed(b"a" * (3 * LINE_CAP))
    log.feed(b"\xff\xfe tail\r\n" + b"x\n" * (2 * LINES) + b"open end")
    log.close()
    assert len(log.lines) == LINES and max(len(line) for line in log.lines) <= LINE_CAP and log.lines[-1] == "open end"
    assert (tmp_path / "x" / "log").read_bytes().endswith(b"x\nopen end\n")


def _launch(tmp_path: Path, code: str, **env: str) -> Launch:
    return Launch((sys.executable, "-c", code), {"PATH": "/usr/bin:/bin", **env}, "/health", tmp_path / "s")


def _run(launch: Launch, tmp_path: Path, ready_s: float = 30.0) -> Engine:
    async def go() -> None:
        await engine.start()
        end.append(await engine.watch())

    end: list[object] = []
    engine = Engine(launch, log_file=tmp_path / "log", ready_s=ready_s)
    asyncio.run(go())
    engine.log.lines.append(repr(end[0]))
    return engine


def test_status_zero_is_a_crash_and_children_die_with_it(tmp_path: Path) -> None:
    code = "import subprocess,sys; print(subprocess.Popen([sys.executable,'-c','import time; time.sleep(99)'],stdout=2).pid, flush=True)"
    engine = _run(_launch(tmp_path, code), tmp_path)
    assert "kind='engine_died'" in engine.log.lines[-1]
    stat, end = Path(f"/proc/{int(engine.log.lines[0])}/stat"), time.monotonic() + 20
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_environment_is_exactly_the_given_one_and_group_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_API_KEY", "secret")
    code = "import os; print(sorted(set(os.environ) - {'LC_CTYPE'}), os.getpgid(0) == os.getppid(), os.readlink('/proc/self/fd/0'))"
    engine = _run(_launch(tmp_path, code, MARK="1"), tmp_path)
    assert engine.log.lines[0] == "['MARK', 'PATH'] True /dev/null"


@pytest.mark.slow
def test_an_engine_that_never_gets_ready_is_ended_at_the_deadline(tmp_path: Path) -> None:
    began = time.monotonic()
    engine = _run(_launch(tmp_path, "import time; time.sleep(99)"), tmp_path, ready_s=0.3)
    assert "kind='start_timeout'" in engine.log.lines[-1] and "retry='never'" in engine.log.lines[-1] and time.monotonic() - began < 10


def test_socket_path_and_program_are_checked_before_the_start(tmp_path: Path) -> None:
    long = Launch(("/bin/true",), {}, "/health", tmp_path / ("x" * 120))
    with pytest.raises(Invalid, match="107"):
        asyncio.run(Engine(long).start())
    with pytest.raises(Unavailable, match="does not start"):
        asyncio.run(Engine(Launch(("/nonexistent/vllm",), {}, "/health", tmp_path / "s")).start())


def test_keeper_gives_up_after_bounded_restarts(tmp_path: Path) -> None:
    said: list[str] = []
    keeper = Keeper(_launch(tmp_path, "import os; os._exit(3)"), log_file=tmp_path / "log", backoff_s=0.01)
    end = asyncio.run(keeper.run(said.append))
    assert end.kind == "unknown" and keeper.restarts == 3 and len(said) == 3


def test_a_slow_start_is_no_steady_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a time of readiness clears the count: an engine that loads long and then fails would be started for ever."""
    monkeypatch.setattr("runtime.supervisor.STEADY_S", 0.0)
    keeper = Keeper(_launch(tmp_path, "import os, time; time.sleep(0.01); os._exit(3)"), log_file=tmp_path / "log", backoff_s=0.01)
    end = asyncio.run(asyncio.wait_for(keeper.run(lambda _: None), 30))
    assert end.kind == "unknown" and keeper.restarts == 3


def test_what_a_killed_guardian_leaves_is_ended_before_its_number_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    ended = os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, number: (held.append(Path(f"/proc/{group}").exists()), ended(group, number)))
    code = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    engine = _run(_launch(tmp_path, code), tmp_path)
    assert held and all(held) and "oom_kill" in engine.log.lines[-1]


def test_keeper_shortens_the_context_once_only(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1:]); print('estimated maximum model length is 3072'); sys.exit(1)"
    keeper = Keeper(_launch(tmp_path, code), log_file=tmp_path / "log", backoff_s=0.01)
    said: list[str] = []
    end = asyncio.run(keeper.run(said.append))
    assert end.kind == "does_not_fit" and keeper.restarts == 1 and "warning" in said[0]
    assert [line for line in (tmp_path / "log").read_text().splitlines() if "[" in line] == ["[]", "['--max-model-len', '3072']"]


def test_a_busy_gpu_is_tried_once_with_what_is_free(tmp_path: Path) -> None:
    words = "Free memory on device cuda:0 (40.0/80.0 GiB) on startup is less than desired GPU memory utilization (0.92, 73.6 GiB)."
    code = f"import sys; print(sys.argv[1:]); print({words!r}); sys.exit(1)"
    keeper = Keeper(_launch(tmp_path, code), log_file=tmp_path / "log", backoff_s=0.01)
    said: list[str] = []
    end = asyncio.run(keeper.run(said.append))
    assert end.kind == "gpu_busy" and keeper.restarts == 1 and "a share of 0.480" in said[0]
    assert [line for line in (tmp_path / "log").read_text().splitlines() if "[" in line] == ["[]", "['--gpu-memory-utilization', '0.480']"]


def test_a_taken_port_costs_one_restart_on_another(tmp_path: Path) -> None:
    code = "import sys; print('port', sys.argv[2]); print('[Errno 98] Address already in use'); sys.exit(1)"
    launch = Launch((sys.executable, "-c", code, "--port", "0"), {"PATH": "/usr/bin:/bin"}, "/health", None)
    keeper = Keeper(launch, log_file=tmp_path / "log", backoff_s=0.01)
    said: list[str] = []
    end = asyncio.run(keeper.run(said.append))
    ports = [int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("port")]
    assert end.kind == "port" and keeper.restarts == 1 and len(set(ports)) == 2 and min(ports) > 1023 and "trying once more" in said[0]


def test_files_are_ours_alone_links_are_made_again_and_the_key_is_not_logged(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    code = "import os,stat; mode = oct(stat.S_IMODE(os.stat('x/f.yaml').st_mode))"
    code += "; print(open('x/f.yaml').read(), mode, os.path.realpath('x/l/name'), flush=True); os._exit(3)"
    launch = replace(
        _launch(tmp_path, code),
        cwd=tmp_path,
        files={tmp_path / "x" / "f.yaml": "the-key"},
        links={tmp_path / "x" / "l" / "name": tmp_path / "weights"},
        key="the-key",
    )
    for _ in range(2):
        engine = _run(launch, tmp_path)
        assert engine.log.lines[0] == f"[key] 0o600 {tmp_path / 'weights'}"
    assert "the-key" not in repr(launch) and "the-key" not in (tmp_path / "log").read_text()
    with pytest.raises(Unavailable, match="cannot be made"):
        asyncio.run(Engine(replace(launch, files={tmp_path / "weights": "x"})).start())


def test_a_child_that_left_the_group_and_cleared_its_environment_is_ended(tmp_path: Path) -> None:
    hidden = (
        "import subprocess,sys; print(subprocess.Popen([sys.executable,'-I','-c','import time; time.sleep(99)'],start_new_session=True,env={}).pid)"
    )
    engine = _run(_launch(tmp_path, f"import subprocess,sys; subprocess.run([sys.executable,'-c',{hidden!r}]); sys.exit(7)"), tmp_path)
    assert "rc=7" in engine.log.lines[-1] and not Path(f"/proc/{engine.log.lines[0]}").exists()


def test_the_signal_that_ended_an_engine_is_told(tmp_path: Path) -> None:
    engine = _run(_launch(tmp_path, "import os,signal; os.kill(os.getpid(), signal.SIGSEGV)"), tmp_path)
    assert "rc=-11" in engine.log.lines[-1]


def test_an_engine_ends_by_signals_that_a_shell_had_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        engine = _run(_launch(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGQUIT); os._exit(7)"), tmp_path)
    finally:
        signal.signal(signal.SIGQUIT, before)
    assert "rc=-3" in engine.log.lines[-1]


def test_stop_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    code = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"

    async def go() -> str:
        engine = Engine(_launch(tmp_path, code), log_file=tmp_path / "log")
        await engine.start()
        watch = asyncio.create_task(engine.watch())
        while "deaf" not in engine.log.text():
            await asyncio.sleep(0.01)
        await engine.stop(0.2)
        end = await watch
        assert not Path(f"/proc/{engine.pid}").exists()
        return end.kind

    assert asyncio.run(go()) == "stopped"
