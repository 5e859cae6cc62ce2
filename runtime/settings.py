"""One frozen value from the environment and the arguments; it reads no file, opens no socket and must never print the key.

Names are NIM's where NIM has one (nim-container.md section 2), so that the run line of a NIM works here unchanged.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from artifact import reasons
from artifact.errors import Invalid
from artifact.manifest import Reference, parse_reference
from runtime import tuning
from runtime.bounds import Limits, asks_callers, limits
from runtime.tuning import Tuning

DEFAULT_CACHE = "/opt/nim/.cache"
# What an engine may inherit. Everything else (keys, tokens, proxies) stays here: the engine runs code that reads data from outside.
INHERITED = frozenset({"PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_REQUIRE_CUDA"})
INHERITED_PREFIXES = ("NCCL_", "OMP_", "MKL_", "KMP_", "VLLM_CPU_")
ENGINE_PREFIX = "AIRLOCK_ENGINE_"  # and the engine's name in capitals: the directory of its environment
LOG_LEVELS = ("TRACE", "DEBUG", "DEFAULT", "INFO", "WARNING", "ERROR", "CRITICAL")

GPU_SHARE = 0.92  # of a GPU's memory, what vLLM takes by default and what profiles are judged against

# Exit statuses of `airlock runtime` by the reason of the error; docs/operations.md has the same table for people.
EXIT_CODES: Mapping[str, int] = {
    **reasons.EXIT_CODES,
    "entitlement_revoked": 23,
    "action_missing": 25,
    "grant_not_yet": 25,
    "entitlement_absent": 25,
    "entitlement_not_yet": 25,
    "entitlement_models": 25,
    "entitlement_actions": 25,
    "product_missing": 25,
    "environment": 25,
    "profile_not_granted": 25,
    "license_unaccepted": 25,
    "legal_block": 25,
    "lease": 28,
    "lease_absent": 28,
    "lease_returned": 28,
    "lease_revoked": 28,
    "lease_expired": 29,
    "no_profile": 30,
    "profile_unknown": 31,
    "not_promoted": 32,
    "no_profiles": 33,
    "gpu": 34,
    "engine_absent": 35,
    "engine_failed": 36,
    "port_taken": 37,
    "weights": 39,
    "gpus_exceeded": 44,
    "offline": 45,
    "unsigned": 46,
    "model_content": 47,
    "disk_full": 48,
    "variable": 49,
    "shared_memory": 50,
    "profile_unexpected": 51,
    "slo_missed": 52,
    "regression": 53,
}


@dataclass(frozen=True)
class Settings:
    """Everything `airlock runtime` was told; `key` is the one secret and stays out of repr."""

    model: str
    ref: str
    registry: str
    key: str = field(default="", repr=False)
    trust: Path | None = None
    ca_file: Path | None = None
    cache: Path = Path(DEFAULT_CACHE)
    engines: tuple[tuple[str, Path], ...] = ()
    tuning: Tuning = field(default_factory=Tuning)
    profile: str = ""
    host: str = "0.0.0.0"  # noqa: S104 - a container serves its network, as a NIM does
    port: int = 8000
    served_names: tuple[str, ...] = ()
    max_model_len: int = 0
    kv_percent: float = 0.0
    relax_memory: bool = False
    lora: bool = False
    gpu_deadline_s: float = 30.0
    start_deadline_s: float = 1200.0
    timeout_s: float = 30.0
    watch_s: float = 900.0
    workers: int = 4
    instance: str = ""
    log_level: str = "INFO"
    visible_cuda: str | None = None
    visible_nvidia: str | None = None
    simulated: bool = False
    local: Path | None = None  # a model directory that nobody signed
    manifest: Path | None = None
    unsigned: str = ""
    offline: bool = False
    download: bool = True
    selector: tuple[tuple[str, str], ...] = ()
    expect_profile: str = ""
    kv_sequences: int = 1
    device_order: str | None = None
    ephemeral: bool = False
    scrub_bytes_s: int = 20_000_000
    jsonl: bool = False
    cache_named: bool = True
    caller_keys: bool = False
    limits: Limits = field(default_factory=Limits)
    inherited: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def name_ref(self) -> str:
        """`name:ref` as people write it."""
        return f"{self.model}:{self.ref}"

    def engine(self, name: str) -> Path | None:
        """The directory of an engine's environment, as AIRLOCK_ENGINE_<NAME> says."""
        return dict(self.engines).get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the API answers to: NIM_SERVED_MODEL_NAME, else the model's name, of a NIM's model that which its callers know."""
        return self.served_names or (self.model.removeprefix("ngc/nim/"),)


def from_environment(environ: Mapping[str, str], model: str, *, host: str = "", port: int = 0, profile: str = "", named: bool = True) -> Settings:
    """Settings of one run; arguments win over the environment; raises Invalid naming the variable, or that no model is named where one must be."""
    given, local = _model(environ, model, named)
    wanted = parse_reference(given) if given else Reference("", "")
    registry = environ.get("AIRLOCK_REGISTRY", "").strip().rstrip("/")
    if registry and "://" not in registry:
        registry = f"https://{registry}"
    if registry and not registry.startswith(("http://", "https://")):
        raise Invalid("AIRLOCK_REGISTRY is no http or https URL", expected="http://HOST[:PORT] or https://HOST[:PORT]", do="correct AIRLOCK_REGISTRY")
    level = environ.get("NIM_LOG_LEVEL", "INFO").strip().upper() or "INFO"
    if level not in LOG_LEVELS:
        raise Invalid(f"NIM_LOG_LEVEL is {level[:40]!r}", expected=", ".join(LOG_LEVELS))
    return Settings(
        model=wanted.name,
        ref=wanted.ref,
        registry=registry,
        key=_first(environ, "NGC_API_KEY", "NGC_CLI_API_KEY"),
        trust=_path(environ, "AIRLOCK_TRUST"),
        ca_file=_path(environ, "AIRLOCK_CA_FILE") or _path(environ, "SSL_CERT_FILE"),
        cache=_path(environ, "NIM_CACHE_PATH") or Path(DEFAULT_CACHE),
        cache_named=bool(environ.get("NIM_CACHE_PATH", "").strip()),
        engines=_engines(environ),
        tuning=tuning.from_environment(environ),
        profile=profile or _first(environ, "NIM_MODEL_PROFILE", "NIM_MANIFEST_PROFILE"),
        host=host or environ.get("AIRLOCK_HOST", "0.0.0.0"),  # noqa: S104 - see Settings.host
        port=port or _whole(environ, ("NIM_HTTP_API_PORT", "NIM_SERVER_PORT"), 8000, 1, 65535),
        served_names=_names(environ, "NIM_SERVED_MODEL_NAME") or _names(environ, "NIM_SERVER_SERVED_MODEL_NAME"),
        max_model_len=_whole(environ, ("NIM_MAX_MODEL_LEN",), 0, 1, 100_000_000),
        kv_percent=_share(environ, "NIM_KVCACHE_PERCENT"),
        relax_memory=_flag(environ, "NIM_RELAX_MEM_CONSTRAINTS"),
        lora=bool(environ.get("NIM_PEFT_SOURCE", "").strip()),
        gpu_deadline_s=float(_whole(environ, ("AIRLOCK_GPU_DEADLINE_S",), 30, 1, 3600)),
        start_deadline_s=float(_whole(environ, ("AIRLOCK_START_DEADLINE_S",), 1200, 1, 86400)),
        timeout_s=float(_whole(environ, ("AIRLOCK_TIMEOUT_S",), 30, 1, 600)),
        watch_s=float(_whole(environ, ("AIRLOCK_WATCH_S",), 900, 1, 86400)),
        workers=_whole(environ, ("AIRLOCK_WORKERS",), 4, 1, 64),
        instance=environ.get("AIRLOCK_INSTANCE", "").strip() or socket.gethostname(),
        log_level="INFO" if level == "DEFAULT" else level,
        expect_profile=environ.get("AIRLOCK_EXPECT_PROFILE", "").strip(),
        kv_sequences=_whole(environ, ("NIM_NUM_KV_CACHE_SEQ_LENS",), 1, 1, 1_000_000),
        device_order=environ.get("CUDA_DEVICE_ORDER"),
        visible_cuda=environ.get("CUDA_VISIBLE_DEVICES"),
        visible_nvidia=environ.get("NVIDIA_VISIBLE_DEVICES"),
        simulated=bool(environ.get("FAKE_NVML_CONFIG")),
        local=local,
        manifest=_path(environ, "NIM_MANIFEST_PATH"),
        unsigned=_reason(environ),
        offline=_flag(environ, "AIRLOCK_OFFLINE"),
        download=not _flag(environ, "NIM_DISABLE_MODEL_DOWNLOAD"),
        selector=_selector(environ),
        ephemeral=_flag(environ, "AIRLOCK_EPHEMERAL_CACHE"),
        caller_keys=asks_callers(environ),
        limits=limits(environ),
        scrub_bytes_s=_whole(environ, ("AIRLOCK_SCRUB_MB_S",), 20, 0, 100_000) * 1_000_000,
        jsonl=_flag(environ, "NIM_JSONL_LOGGING") or _flag(environ, "NIM_LOGGING_JSONL"),
        inherited=tuple(sorted((k, v) for k, v in environ.items() if k in INHERITED or k.startswith(INHERITED_PREFIXES))),
    )


def _first(environ: Mapping[str, str], *names: str) -> str:
    """The first of the variables that holds more than spaces."""
    return next((text for name in names if (text := environ.get(name, "").strip())), "")


def _model(environ: Mapping[str, str], given: str, named: bool) -> tuple[str, Path | None]:
    """The model's name in this site's spelling, and the local directory where one is named; raises Invalid."""
    text = given or _first(environ, "AIRLOCK_MODEL", "NIM_MODEL_NAME", "NIM_MODEL_PATH", "NIM_FT_MODEL")
    if not text and not named:
        return "", None
    if not text:
        raise Invalid("no model is named", expected="NAME[:VERSION]", do="say --model, or set AIRLOCK_MODEL in the image or the container")
    if text.startswith("/"):
        path = Path(text)
        return _first(environ, "AIRLOCK_MODEL") or f"local/{path.name.lower()}:local", path
    scheme, sep, rest = text.partition("://")
    if not sep:
        return text, None
    if scheme not in ("ngc", "hf"):
        raise Invalid(
            f"the model {text[:100]!r} lies outside of this site",
            expected="NAME[:VERSION], ngc://, hf:// or an absolute path",
            do="push it to the registry: airlock model push",
        )
    name, colon, version = rest.partition(":")  # names are lower case here, versions are as they were given
    return f"{scheme}/{name.lower()}{colon}{version}", None


def _reason(environ: Mapping[str, str]) -> str:
    text = environ.get("AIRLOCK_ALLOW_UNSIGNED", "").strip()
    if text and (text.lower() in ("0", "1", "true", "false", "yes", "no", "on", "off") or not text.isprintable() or len(text) > 300):
        raise Invalid(
            f"AIRLOCK_ALLOW_UNSIGNED is {text[:40]!r}",
            expected="the reason in words, on one line of at most 300 characters",
            do="say who decided it and why",
        )
    return text


def _selector(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Tags that a profile must have: NIM_TAGS_SELECTOR, and the sizes that have variables of their own; raises Invalid."""
    found = dict(tuning.parse_selector(environ.get("NIM_TAGS_SELECTOR", ""), "NIM_TAGS_SELECTOR"))
    for variable, tag in (("NIM_TENSOR_PARALLEL_SIZE", "tp"), ("NIM_PIPELINE_PARALLEL_SIZE", "pp")):
        if number := _whole(environ, (variable,), 0, 1, 1024):
            found[tag] = str(number)
    return tuple(sorted(found.items()))


def _engines(environ: Mapping[str, str]) -> tuple[tuple[str, Path], ...]:
    found = ((k[len(ENGINE_PREFIX) :].lower(), _path(environ, k)) for k in sorted(environ) if k.startswith(ENGINE_PREFIX))
    return tuple((name, path) for name, path in found if path)


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    text = environ.get(name, "").strip()
    return Path(text).absolute() if text else None


def _whole(environ: Mapping[str, str], names: tuple[str, ...], default: int, least: int, most: int) -> int:
    for name in names:
        text = environ.get(name, "").strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
            raise Invalid(f"{name} is {text[:40]!r}", expected=f"a whole number from {least} to {most}", do=f"correct or unset {name}")
        return int(text)
    return default


def _share(environ: Mapping[str, str], name: str) -> float:
    text = environ.get(name, "").strip()
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise Invalid(f"{name} is {text[:40]!r}", expected="a share above 0 and at most 1, such as 0.9", do=f"correct or unset {name}")
    return value


def _flag(environ: Mapping[str, str], name: str) -> bool:
    return tuning.switch(environ, name) is True


def _names(environ: Mapping[str, str], variable: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in environ.get(variable, "").split(",") if part.strip())
    for name in names:
        # A name becomes an argument of the engine: one that begins with a dash would be read as a flag.
        if name.startswith("-") or len(name) > 255 or any(ord(c) <= 32 or ord(c) == 127 for c in name):
            raise Invalid(f"{variable} holds {name[:100]!r}", expected="names without spaces that do not begin with '-'")
    return names
