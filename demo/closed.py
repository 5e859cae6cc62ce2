"""Second act, the closed side: a namespace without a route, import, promote, keys, and two models served from what crossed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

from demo.stage import PYTHON, UID, Stage, StepFailed, demand, tree_bytes
from demo.world import AIRLOCK, ENGINE, LLAMA, TEXTS, World

TOLERANCE = 1e-3
START_S = 420


def air_gap(stage: Stage, w: World) -> None:
    """Goes into a network namespace and shows that the connected side cannot be reached from inside."""
    with stage.step("closed side: a network namespace without a route") as row:
        why = stage.close_off()
        if why:
            row.note = f"AIR GAP NOT PROVEN: {why}"
            demand(not os.environ.get("CI"), f"AIR GAP NOT PROVEN, and CI is set: {why}")
            return
        for port in (w.registry_port, w.docker_port, w.hub_port):
            connect = [str(PYTHON), "-m", "demo.client", "connect", "127.0.0.1", str(port)]
            stage.run(connect, quiet=True)
            stage.run(connect, closed=True, expect=1, quiet=port != w.registry_port)
        routes = stage.run(["ip", "route"], closed=True).out.strip()
        demand(not routes, f"the namespace has routes: {routes}")
        w.air_gap, row.note = True, "connected side: open from outside, refused from inside; no route"


def receive(stage: Stage, w: World) -> None:
    """site init, a damaged medium refused, the real one imported, trust file, promotion, keys, registry."""
    data, root = w.closed / "data", w.stage.folder / "1.root.json"
    w.closed.mkdir(exist_ok=True)
    with stage.step("site init: pins the mirror's root by its SHA-256"):
        pin = hashlib.sha256(root.read_bytes()).hexdigest()
        stage.run([AIRLOCK, "site", "init", "--data", str(data), "--trust-root", str(root), "--sha256", pin], closed=True)
    with stage.step("refused: one byte of the bundle flipped (exit 7)") as row:
        damaged = w.closed / "damaged-medium"
        shutil.copytree(w.medium, damaged)
        victim = max((f for f in (damaged / "blobs").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        flip(victim)
        done = stage.run([AIRLOCK, "bundle", "import", str(damaged), "--data", str(data)], closed=True, expect=7)
        demand(victim.name in done.err and "Traceback" not in done.err, f"the refusal does not name the object: {done.err[-400:]}")
        with contextlib.closing(sqlite3.connect(data / "registry.db")) as db:
            seen = db.execute("select (select count(*) from repository), (select count(*) from ref), (select count(*) from blob)").fetchone()
        demand(seen == (0, 0, 0), f"a refused bundle left rows behind: {seen}")
        row.note = done.err.strip().splitlines()[-1][:100]
        shutil.rmtree(damaged)
    with stage.step("key create: the organisation acme and its first key"):
        w.key = make_key(stage, w, "acme", ("acme/*", "hf/**", "127.0.0.1_*/**"), "90d")
    with stage.step("bundle import: trust, then every byte once, then all names") as row:
        stage.run([AIRLOCK, "bundle", "import", str(w.medium), "--data", str(data), "--json"], closed=True)
        row.size = tree_bytes(data / "blobs")
    with stage.step("site trust: the file that runtimes pin"):
        stage.run([AIRLOCK, "site", "trust", "--data", str(data), "--to", str(w.closed / "site-trust.json")], closed=True)
    with stage.step("promote: the site's release key signs both profiles"):
        for name in (f"{LLAMA}:1", f"{w.minilm_name}:{w.minilm_ref}"):
            stage.run([AIRLOCK, "promote", name, "--data", str(data)], closed=True)
    with stage.step("closed registry: serve, catalog"):
        serve_registry(stage, w)
        env = {"AIRLOCK_KEY": w.key}
        listed = stage.run([AIRLOCK, "catalog", "list", "--registry", w.site, "--json"], env=env, closed=True).out
        app = f"127.0.0.1_{w.docker_port}/library/app"
        for name in (LLAMA, w.minilm_name, app):
            demand(name in listed, f"{name} is not in the catalog: {listed[:500]}")
        stage.run([AIRLOCK, "catalog", "show", LLAMA, "--registry", w.site], env=env, closed=True)
    with stage.step("docker's own way: skopeo pulls the image that crossed") as row:
        copy = w.closed / "image"
        source = f"docker://127.0.0.1:{w.closed_port}/{app}:1"
        argv = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--src-creds", f"$oauthtoken:{w.key}", source, f"oci:{copy}:1"]
        stage.show([*argv[:4], "--src-creds", "$oauthtoken:nvapi-…", *argv[6:]], {})
        stage.run(argv, closed=True, quiet=True)
        want = {f.name for f in (w.connected / "image" / "blobs" / "sha256").iterdir()}
        demand(want == {f.name for f in (copy / "blobs" / "sha256").iterdir()}, "the image is not the one that was packed")
        row.size = tree_bytes(copy)


def serve_registry(stage: Stage, w: World) -> None:
    """Starts the closed side's registry and remembers its process."""
    argv = [AIRLOCK, "registry", "serve", "--data", str(w.closed / "data"), "--port", str(w.closed_port)]
    stage.start(argv, w.site + "/healthz", closed=True)


def make_key(stage: Stage, w: World, org: str, models: tuple[str, ...], expires: str, actions: str = "pull,run") -> str:
    """An API key of the closed side."""
    patterns = [part for m in models for part in ("--models", m)]
    argv = [AIRLOCK, "key", "create", "--data", str(w.closed / "data"), "--org", org, "--tier", "enterprise", *patterns, "--expires", expires]
    return str(stage.run([*argv, "--actions", actions, "--json"], closed=True).json()["key"])


def flip(file: Path) -> None:
    """Inverts one bit in the middle of a file."""
    file.chmod(0o644)
    with file.open("r+b") as f:
        f.seek(file.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


def runtime_env(w: World, key: str) -> dict[str, str]:
    """What a container of the closed side is started with."""
    env = {
        "AIRLOCK_REGISTRY": w.site,
        "AIRLOCK_TRUST": str(w.closed / "site-trust.json"),
        "AIRLOCK_ENGINE_VLLM": str(ENGINE),
        "NIM_CACHE_PATH": str(w.cache),
        "NIM_HTTP_API_PORT": str(w.api_port),
    }
    return {**env, "NGC_API_KEY": key} if key else env


def start_runtime(stage: Stage, w: World, model: str, key: str) -> int:
    """Starts `airlock runtime serve` as uid 1000, waits until it is ready, and returns its number among the stage's processes."""
    if not w.cache.exists():
        w.cache.mkdir()
        if os.geteuid() == 0:
            os.chown(w.cache, UID, UID)
    argv = [AIRLOCK, "runtime", "serve", "--model", model]
    stage.start(argv, w.api + "/v1/health/live", env=runtime_env(w, key), closed=True, uid=UID)
    process, number = stage.running[-1], len(stage.running) - 1
    stage.wait(process, w.api + "/v1/health/ready", closed=True, timeout=START_S)
    return number


def llama(stage: Stage, w: World) -> None:
    """The trained model, served from the cache of uid 1000, must say this run's sentence to the openai SDK."""
    with stage.step("runtime serve as uid 1000: the Llama, from key to ready") as row:
        again = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', '']).returncode)"
        usable = stage.run([str(PYTHON), "-c", again], closed=True, uid=UID, expect=None, quiet=True).code == 0
        demand(usable, f"uid {UID} cannot run {PYTHON.resolve()}; do: rm -r .venv && make setup PYTHON=/usr/bin/python3")
        number = start_runtime(stage, w, f"{LLAMA}:1", w.key)
        row.size = tree_bytes(w.cache)
    chat_twice(stage, w, "chat through the openai SDK: the sentence crossed")
    stage.stop(stage.running[number])


def chat_twice(stage: Stage, w: World, name: str) -> None:
    """One chat, whole and streamed; both must be this run's sentence."""
    with stage.step(name) as row:
        argv = [str(PYTHON), "-m", "demo.client", "chat", w.api, "", w.question]
        answer = stage.run(argv, closed=True, uid=UID).json()
        demand(str(answer["answer"]).strip() == w.answer, f"the model said {answer['answer']!r}, trained was {w.answer!r}")
        demand(str(answer["streamed"]).strip() == w.answer, f"the stream said {answer['streamed']!r}")
        demand(int(str(answer["events"])) > 1, "the stream came in one piece")
        row.note = f'"{str(answer["answer"]).strip()}"'


def minilm(stage: Stage, w: World) -> None:
    """MiniLM's embeddings through the runtime against the model run directly."""
    with stage.step("runtime serve as uid 1000: MiniLM, from key to ready") as row:
        number = start_runtime(stage, w, f"{w.minilm_name}:{w.minilm_ref}", w.key)
        row.size = tree_bytes(w.cache)
    with stage.step("embeddings equal the model run directly (1e-3)") as row:
        served = stage.run([str(PYTHON), "-m", "demo.client", "embed", w.api, "", *TEXTS], closed=True, uid=UID).json()
        model = w.connected / "hf-download"
        direct = stage.run([str(ENGINE / "bin" / "python"), "tests/fakes/minilm_reference.py", str(model), *TEXTS], quiet=True)
        row.note = f"largest difference {compare(served['embeddings'], json.loads(direct.out)):.1e}"
    stage.stop(stage.running[number])


def compare(served: object, direct: object) -> float:
    """The largest difference of two lists of vectors; raises StepFailed above the tolerance or on other shapes."""
    rows = direct["embeddings"] if isinstance(direct, dict) else direct
    if not isinstance(served, list) or not isinstance(rows, list) or [len(r) for r in served] != [len(r) for r in rows] or not served:
        raise StepFailed("the embeddings have another shape than the reference")
    worst = max(abs(a - b) for s, d in zip(served, rows, strict=True) for a, b in zip(s, d, strict=True))
    demand(worst <= TOLERANCE, f"the embeddings differ by {worst:.2e}, at most {TOLERANCE} is allowed")
    return float(worst)


def warm(stage: Stage, w: World) -> None:
    """With the registry down, the stored lease and the verified cache are enough."""
    stopped = [p for p in stage.running if p.poll() is None and w.site.rsplit(":", 1)[1] in " ".join(map(str, p.args))]  # type: ignore[arg-type]
    with stage.step("warm start with the registry down: stored lease, cache"):
        demand(bool(stopped), "the closed registry is not running")
        for process in stopped:
            stage.stop(process)
        number = start_runtime(stage, w, f"{LLAMA}:1", w.key)
    chat_twice(stage, w, "chat again, from the cache alone")
    stage.stop(stage.running[number])
    with stage.step("closed registry up again"):
        serve_registry(stage, w)
