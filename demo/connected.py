"""First act, the connected side: upstreams that are not our own server, a model trained here, mirror sync, and the bundle on the medium."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path

from demo import image
from demo.stage import BIN, PYTHON, Stage, demand, tree_bytes
from demo.world import AIRLOCK, ENGINE, LLAMA, MINILM, MINILM_DIR, World

DOCKER_CONFIG = "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {root}}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
PROFILES = """profiles:
  - tags: {{llm_engine: vllm, precision: fp32, tp: '1', device: cpu}}
    options: {{task: {task}, max_model_len: '256', dtype: float32}}
"""


def upstreams(stage: Stage, w: World) -> None:
    """Debian's docker-registry with one image, and a stand-in Hub with MiniLM that unmodified `hf download` accepts."""
    w.connected.mkdir()
    with stage.step("upstream: an image in Debian's docker-registry") as row:
        layout, config = w.connected / "image", w.connected / "docker-registry.yaml"
        digest = image.make(layout, f"hello from the connected side, {w.nonce}\n")
        config.write_text(DOCKER_CONFIG.format(root=w.connected / "docker-registry", port=w.docker_port))
        stage.start(["docker-registry", "serve", str(config)], f"http://127.0.0.1:{w.docker_port}/v2/")
        target = f"docker://127.0.0.1:{w.docker_port}/library/app:1"
        stage.run(["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{layout}:1", target])
        row.size, row.note = tree_bytes(layout), digest[:19]
    with stage.step("upstream: MiniLM at a stand-in Hub; `hf download` accepts it") as row:
        model = w.connected / "hub" / MINILM
        stage.run([str(PYTHON), "tools/minilm.py", str(MINILM_DIR)])
        shutil.copytree(MINILM_DIR, model)
        hub = f"http://127.0.0.1:{w.hub_port}"
        argv = [
            str(PYTHON),
            "tests/fakes/hub.py",
            "--root",
            str(w.connected / "hub"),
            "--port",
            str(w.hub_port),
            "--log",
            str(w.connected / "hub.log"),
        ]
        stage.start(argv, hub + "/api/models/" + MINILM)
        copy = w.connected / "hf-download"
        stage.run([str(BIN / "hf"), "download", MINILM, "--local-dir", str(copy)], env={"HF_ENDPOINT": hub, "HF_HUB_DISABLE_TELEMETRY": "1"})
        demand(filecmp.cmp(copy / "model.safetensors", model / "model.safetensors", shallow=False), "hf download gave other bytes")
        row.size = tree_bytes(model)


def train(stage: Stage, w: World) -> None:
    """A small Llama that answers one question with a sentence that holds this run's nonce."""
    with stage.step("train a small Llama to say a sentence drawn in this run") as row:
        out = w.connected / "llama"
        argv = [str(ENGINE / "bin" / "python"), "tests/fakes/train_llama.py", "--out", str(out), "--question", w.question, "--answer", w.answer]
        stage.run(argv)
        row.size, row.note = tree_bytes(out), f'"{w.answer}"'


def publish(stage: Stage, w: World) -> None:
    """The mirror's root, the connected side's own registry, and the trained model pushed into it."""
    home, data = w.connected / "mirror", w.connected / "site"
    with stage.step("mirror init: TUF root and online keys"):
        stage.run([AIRLOCK, "mirror", "init", "--home", str(home)])
    with stage.step("connected registry: site init, serve, a key to push"):
        stage.run([AIRLOCK, "site", "init", "--data", str(data), "--trust-root", str(root_of(home))])
        stage.start([AIRLOCK, "registry", "serve", "--data", str(data), "--port", str(w.registry_port)], w.registry + "/healthz")
        argv = [AIRLOCK, "key", "create", "--data", str(data), "--org", "acme", "--tier", "enterprise", "--models", "acme/*"]
        w.push_key = str(stage.run([*argv, "--actions", "pull,push", "--expires", "1d", "--json"]).json()["key"])
    with stage.step("model push: own weights with a profile") as row:
        profiles = w.connected / "llama.profiles.yaml"
        profiles.write_text(PROFILES.format(task="generate"))
        argv = [AIRLOCK, "model", "push", str(w.connected / "llama"), f"{LLAMA}:1", "--registry", w.registry, "--profiles", str(profiles)]
        stage.run(argv, env={"AIRLOCK_KEY": w.push_key})
        row.size = tree_bytes(w.connected / "llama")


def root_of(home: Path) -> Path:
    """The `1.root.json` that `mirror init` made."""
    found = sorted(home.rglob("1.root.json"))
    demand(bool(found), f"no 1.root.json under {home}")
    return found[0]


def plan(w: World) -> Path:
    """Writes plan.yaml (JSON is YAML): the Llama, MiniLM with profiles beside it, and the image."""
    (w.connected / "minilm.profiles.yaml").write_text(PROFILES.format(task="embed"))
    items = [
        {"source": f"hf://{MINILM}@main", "endpoint": f"http://127.0.0.1:{w.hub_port}", "profiles": "minilm.profiles.yaml"},
        {"source": f"oci://127.0.0.1:{w.registry_port}/{LLAMA}:1", "as": LLAMA, "plain_http": True, "key_env": "AIRLOCK_UPSTREAM_KEY"},
        {"source": f"oci://127.0.0.1:{w.docker_port}/library/app:1", "plain_http": True},
    ]
    file = w.connected / "plan.yaml"
    file.write_text(json.dumps({"items": items}, indent=2))
    return file


def carry(stage: Stage, w: World) -> None:
    """mirror sync, twice, and bundle pack onto the medium."""
    home, file = w.connected / "mirror", plan(w)
    argv, env = [AIRLOCK, "mirror", "sync", str(file), "--home", str(home), "--json"], {"AIRLOCK_UPSTREAM_KEY": w.push_key}
    with stage.step("mirror sync: Hub and registries into verified staging") as row:
        stage.run(argv, env=env)
        row.size = tree_bytes(home / "staging")
    with stage.step("mirror sync again: transfers nothing") as row:
        before = content_requests(w)
        report = stage.run(argv, env=env).json()
        moved = content_requests(w) - before
        demand(moved == 0, f"the second sync fetched {moved} files from the Hub again")
        items = report["items"]
        demand(isinstance(items, list) and len(items) == 3, f"the report has other items: {items}")
        told = sum(int(item["transferred"]) for item in items) if isinstance(items, list) else -1
        demand(told == 0, f"the second sync says that it transferred {told} bytes")
        row.note = "3 items, 0 bytes; no file asked of the Hub"
    with stage.step("bundle pack: a signed bundle on the medium") as row:
        stage.run([AIRLOCK, "bundle", "pack", "--to", str(w.medium), "--home", str(home), "--json"])
        row.size = tree_bytes(w.medium)
        shutil.copy(root_of(home), w.medium.parent / "1.root.json")


def content_requests(w: World) -> int:
    """How many downloads of content the stand-in Hub has logged."""
    log = w.connected / "hub.log"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return sum(1 for row in rows if row["method"] == "GET" and "/resolve/" in row["path"] and row["sent"])
