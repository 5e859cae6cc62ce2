"""Third act: what must not start does not start, says why in the documented words, and ends with the documented status."""

from __future__ import annotations

import time

from demo.closed import make_key, runtime_env
from demo.stage import UID, Stage, demand
from demo.world import AIRLOCK, GPU_ONLY, LLAMA, World

SEED_LINE = "NGC authentication failed: invalid API key or no entitlement for this NIM"
NOT_VISIBLE = "this key sees no model of that name (absent, or another organisation's)"
NO_PROFILE = "No profile found for the detected hardware"
GPU_PROFILES = "profiles:\n  - tags: {llm_engine: vllm, precision: bf16, tp: '2', gpu: H100}\n    options: {task: generate}\n"
FORGED = "nvapi-" + "A" * 49


def refused(stage: Stage, w: World, name: str, key: str, cause: str, code: int, model: str = f"{LLAMA}:1") -> None:
    """One start that must fail before any weight or engine: the seed's line, the cause in our words, the exit status."""
    with stage.step(f"refused: {name} (exit {code})") as row:
        cache = w.closed / "cache-of-the-refused"
        env = {**runtime_env(w, key), "NIM_CACHE_PATH": str(cache)}
        if not cache.exists():
            stage.run(["install", "-d", *(["-o", str(UID), "-g", str(UID)] if stage.is_root else []), str(cache)], quiet=True)
        done = stage.run([AIRLOCK, "runtime", "serve", "--model", model], env=env, closed=True, uid=UID, expect=code, timeout=60)
        demand(SEED_LINE in done.text, f"the seed's line is missing: {done.text[-600:]}")
        demand(cause in done.text, f"the cause {cause!r} is missing: {done.text[-600:]}")
        demand("Traceback" not in done.text, "a traceback was shown")
        demand(not any(f.suffix == ".safetensors" for f in cache.rglob("*")), "weights were fetched before the refusal")
        row.note = cause


def keys(stage: Stage, w: World) -> None:
    """Key absent, invalid, expired, and of another organisation."""
    short = make_key(stage, w, "acme", ("acme/*",), "1s")
    other = make_key(stage, w, "globex", ("globex/*",), "90d")
    time.sleep(1.5)
    refused(stage, w, "no key", "", "NGC_API_KEY is not set", 20)
    refused(stage, w, "an invalid key", FORGED, "the registry does not know this API key", 21)
    refused(stage, w, "an expired key", short, "the API key expired on", 22)
    refused(stage, w, "a key of another organisation", other, NOT_VISIBLE, 24)


def hardware(stage: Stage, w: World) -> None:
    """A model whose only profile wants GPUs that are not here; it was pushed on the closed side itself."""
    key = make_key(stage, w, "acme", ("acme/*",), "1d", "pull,push,run")
    profiles = w.closed / "gpu.profiles.yaml"
    profiles.write_text(GPU_PROFILES)
    with stage.step("closed side: own model pushed and promoted, for 2 x H100 only"):
        argv = [AIRLOCK, "model", "push", str(w.connected / "llama"), f"{GPU_ONLY}:1", "--registry", w.site, "--profiles", str(profiles)]
        stage.run(argv, env={"AIRLOCK_KEY": key}, closed=True)
        stage.run([AIRLOCK, "promote", f"{GPU_ONLY}:1", "--data", str(w.closed / "data")], closed=True)
    with stage.step("refused: no profile fits this machine (exit 30)") as row:
        done = stage.run(
            [AIRLOCK, "runtime", "serve", "--model", f"{GPU_ONLY}:1"], env=runtime_env(w, key), closed=True, uid=UID, expect=30, timeout=60
        )
        demand(NO_PROFILE in done.text and "Traceback" not in done.text, f"the words are missing: {done.text[-600:]}")
        demand("vllm-h100-bf16-tp2" in done.text, f"the rejected profile is not named: {done.text[-600:]}")
        row.note = NO_PROFILE


def port(stage: Stage, w: World) -> None:
    """The API's port is taken (here by the registry): said before weights are fetched or the engine starts."""
    with stage.step("refused: the API port is taken (exit 37)") as row:
        env = {**runtime_env(w, w.key), "NIM_HTTP_API_PORT": str(w.closed_port)}
        done = stage.run([AIRLOCK, "runtime", "serve", "--model", f"{LLAMA}:1"], env=env, closed=True, uid=UID, expect=37, timeout=60)
        demand(f"port {w.closed_port}" in done.text and "Traceback" not in done.text, f"the port is not named: {done.text[-600:]}")
        row.note = next(line for line in done.err.splitlines() if f"port {w.closed_port}" in line)[:100]


def all_of(stage: Stage, w: World) -> None:
    """Every refusal."""
    keys(stage, w)
    hardware(stage, w)
    port(stage, w)
