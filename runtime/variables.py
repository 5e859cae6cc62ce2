"""Every environment variable that `airlock runtime` knows: what it means here, or why it does not; docs/nim-variables.md is this table.

Names that a NIM has are NIM's (its documentation of 1.x and 2.x). A variable whose silent loss would change what is run, or how it is protected,
is refused; one that only tunes what we do in another way is told and passed over. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from artifact.errors import Invalid

STATES = ("supported", "ignored", "refused")
OFF = ("", "0", "false", "no", "off")
# What Kubernetes and Docker put beside a service that is called nim: no settings.
_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_\w+)?)?)\Z")


@dataclass(frozen=True)
class Variable:
    """One row: names (the first that is set counts), what happens with it, default, meaning or reason, values that ask for nothing."""

    names: tuple[str, ...]
    state: str
    default: str
    meaning: str
    harmless: tuple[str, ...] = OFF


def _rows(state: str, *rows: tuple[str, str, str]) -> tuple[Variable, ...]:
    return tuple(Variable(tuple(names.split()), state, default, meaning) for names, default, meaning in rows)


VARIABLES: tuple[Variable, ...] = (
    *_rows(
        "supported",
        ("NGC_API_KEY NGC_CLI_API_KEY", "", "The API key of this site's registry; the one secret. Never printed, never given to the engine."),
        ("AIRLOCK_REGISTRY", "", "URL of this site's registry: where key check, lease and weights come from."),
        ("AIRLOCK_TRUST", "", "Path of site-trust.json (`airlock site trust`): the keys that release and lease are verified with."),
        ("AIRLOCK_CA_FILE SSL_CERT_FILE", "", "PEM file of the authority that signed the registry's certificate."),
        (
            "AIRLOCK_MODEL NIM_MODEL_NAME NIM_MODEL_PATH NIM_FT_MODEL",
            "",
            "The model without `--model`: NAME[:VERSION], `ngc://org/team/model:version`, `hf://org/model[:revision]`; an absolute path"
            " is a local directory, which needs AIRLOCK_ALLOW_UNSIGNED. `s3://`, `gs://` and `modelscope://` are refused: push it to the registry.",
        ),
        (
            "NIM_CACHE_PATH",
            "/opt/nim/.cache",
            "Where weights, leases and compiled code are kept. Without it a volume mounted at `/opt/nim/cache` is used where none is at the default.",
        ),
        ("NIM_MODEL_PROFILE NIM_MANIFEST_PROFILE", "", "Pins a profile by id or description; anything else refuses to start."),
        (
            "NIM_TAGS_SELECTOR",
            "",
            "`key=value,key=value`: only profiles with these tags are looked at; none: `Could not match a profile in manifest`.",
        ),
        (
            "AIRLOCK_EXPECT_PROFILE",
            "",
            "The profile that must come out of the choice, as id, name or `key=value,…`; any other refuses to start (51). It chooses nothing.",
        ),
        ("NIM_NUM_KV_CACHE_SEQ_LENS", "1", "How many sequences of the full length the memory estimate plans for."),
        ("NIM_TENSOR_PARALLEL_SIZE", "", "The same as the selector `tp=N`."),
        ("NIM_PIPELINE_PARALLEL_SIZE", "", "The same as the selector `pp=N`."),
        ("NIM_DISABLE_MODEL_DOWNLOAD", "0", "1: weights are taken from the cache only; the registry is still asked for key and lease."),
        (
            "AIRLOCK_OFFLINE",
            "0",
            "1: no connection is opened, whatever key is set: release, lease and weights come from the cache, verified, or the start is refused.",
        ),
        (
            "AIRLOCK_ALLOW_UNSIGNED",
            "",
            "A reason in words: runs a local model directory or NIM_MANIFEST_PATH without this site's signature; logged, and told to the registry.",
        ),
        (
            "NIM_MANIFEST_PATH",
            "",
            "A NIM model manifest or a profile document whose profiles stand for the released ones; needs AIRLOCK_ALLOW_UNSIGNED.",
        ),
        ("AIRLOCK_EPHEMERAL_CACHE", "0", "1: a cache in the container's own layer, which is lost with it, is meant; otherwise it refuses the start."),
        ("AIRLOCK_SCRUB_MB_S", "20", "How fast weights are read again while the model is served, in MB/s; 0: never."),
        ("NIM_SERVED_MODEL_NAME NIM_SERVER_SERVED_MODEL_NAME", "the model's name, without ngc/nim/", "Names that the API answers to, with commas."),
        ("NIM_HTTP_API_PORT NIM_SERVER_PORT", "8000", "Port of the API."),
        ("AIRLOCK_HOST", "all", "Address of the API."),
        (
            "AIRLOCK_CALLER_KEYS",
            "0",
            "1: who asks must send a key of this site (`Authorization: Bearer`) that a grant lets run the model; a NIM asks nobody.",
        ),
        ("AIRLOCK_MAX_BODY_MB", "32", "Largest body of a request, in MiB; 413 above."),
        ("AIRLOCK_MAX_BODIES_MB", "1024", "All bodies in work together, in MiB; 429 above."),
        ("AIRLOCK_MAX_REQUESTS", "256", "Requests at the engine at once; what is more waits."),
        ("AIRLOCK_MAX_QUEUED", "256", "Requests that may wait; 429 above."),
        ("AIRLOCK_QUEUE_S", "30", "How long one may wait; 429 then."),
        ("AIRLOCK_MAX_IMAGES", "16", "Images, videos and sounds of a request; 400 above."),
        ("AIRLOCK_STORED_RESPONSES", "1000", "Responses (`/v1/responses`) that are kept; the oldest is forgotten first."),
        ("AIRLOCK_STORED_S", "3600", "How long a response is kept, in seconds."),
        ("NIM_MAX_MODEL_LEN", "the model's", "Longest sequence, in tokens."),
        ("NIM_KVCACHE_PERCENT", "0.92", "Share of a GPU's memory that the engine takes, above 0 and at most 1."),
        ("NIM_RELAX_MEM_CONSTRAINTS", "0", "1: a profile that does not fit the free memory by our estimate is run all the same."),
        (
            "NIM_PEFT_SOURCE",
            "",
            "Directory with one LoRA adapter (safetensors) per directory, whose name is its model name; needs AIRLOCK_ALLOW_UNSIGNED."
            " Set: only profiles that support LoRA are looked at.",
        ),
        ("NIM_MAX_LORA_RANK", "the profile's, 32", "Highest rank of an adapter."),
        ("NIM_MAX_GPU_LORAS", "the engine's", "Adapters that one batch may use."),
        ("NIM_MAX_CPU_LORAS", "the engine's", "Adapters that are kept in host memory."),
        ("NIM_ENABLE_KV_CACHE_REUSE", "the engine's", "1 or 0: beginnings of prompts that were seen before are not computed again."),
        ("NIM_GUIDED_DECODING_BACKEND", "the engine's", "What structured output is made with, by the engine's own name."),
        ("NIM_TOOL_CALL_PARSER", "", "How the engine finds tool calls in the model's text, by the engine's own name."),
        ("NIM_ENABLE_AUTO_TOOL_CHOICE", "0", "1: the model may choose a tool by itself; needs NIM_TOOL_CALL_PARSER."),
        (
            "NIM_CHAT_TEMPLATE",
            "the model's",
            "A file of the model, by its path in it; an absolute path from outside needs AIRLOCK_ALLOW_UNSIGNED. The text itself is not taken.",
        ),
        ("NIM_TOKENIZER_MODE", "the engine's", "The engine's word for how it loads the tokenizer."),
        ("NIM_DISABLE_CUDA_GRAPH", "0", "1: no CUDA graphs are captured: less memory, slower."),
        ("NIM_DRAFT_MODEL_PATH", "", "Directory of a draft model (safetensors) for speculative decoding; needs AIRLOCK_ALLOW_UNSIGNED."),
        (
            "NIM_TRUST_CUSTOM_CODE",
            "",
            "1: insists on the code that the promoted profile allows; without such a profile it is refused. 0: forbids it.",
        ),
        ("NIM_PASSTHROUGH_ARGS", "", "More arguments for the engine, of those that its adapter lets through; any other is refused, with the list."),
        ("NIM_LOG_LEVEL", "INFO", "TRACE, DEBUG, DEFAULT, INFO, WARNING, ERROR or CRITICAL."),
        (
            "NIM_JSONL_LOGGING NIM_LOGGING_JSONL",
            "0",
            "1: log lines as JSON with level, time, file_path, line_number, message, exc_info, stack_info.",
        ),
        ("AIRLOCK_ENGINE_VLLM", "", "Directory of the environment that holds vLLM (`bin/vllm`)."),
        ("AIRLOCK_ENGINE_TENSORRT_LLM", "", "The same for TensorRT-LLM (`bin/trtllm-serve`)."),
        ("AIRLOCK_ENGINE_SGLANG", "", "The same for SGLang (`bin/python3`)."),
        ("AIRLOCK_GPU_DEADLINE_S", "30", "Longest wait for the NVIDIA driver, in seconds."),
        ("AIRLOCK_START_DEADLINE_S", "1200", "Longest wait for the engine to be ready, in seconds."),
        ("AIRLOCK_TIMEOUT_S", "30", "Longest wait for one answer of the registry, in seconds."),
        ("AIRLOCK_WATCH_S", "900", "How often the registry is asked what the key still has, in seconds."),
        ("AIRLOCK_WORKERS", "4", "Connections that fetch weights at one time."),
        ("AIRLOCK_INSTANCE", "the host's name", "Name of this runtime in its lease; set it where container host names change."),
        ("CUDA_VISIBLE_DEVICES", "all", "GPUs that may be used: indices, GPU-UUIDs, MIG-UUIDs, MIG-GPU-UUID/GI/CI."),
        ("CUDA_DEVICE_ORDER", "FASTEST_FIRST", "What an index of CUDA_VISIBLE_DEVICES counts: FASTEST_FIRST or PCI_BUS_ID."),
        ("NVIDIA_VISIBLE_DEVICES", "all", "GPUs that the container toolkit gives."),
    ),
    *_rows(
        "ignored",
        (
            "NGC_API_ENDPOINT NGC_AUTH_ENDPOINT NGC_API_SCHEME",
            "",
            "The runtime speaks to AIRLOCK_REGISTRY only; these are for unmodified NIM images (operations.md, NGC clients).",
        ),
        ("NIM_REPOSITORY_OVERRIDE", "", "Weights come from AIRLOCK_REGISTRY, verified; the override is for unmodified NIM images."),
        ("HF_TOKEN HF_ENDPOINT HF_HOME HF_HUB_OFFLINE", "", "Nothing here speaks to a Hub, and the engine is started without a network for it."),
        ("AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_REGION AWS_PROFILE AWS_ENDPOINT_URL", "", "No bucket is read; the registry does."),
        ("NIM_SDK_USE_NATIVE_TLS", "", "AIRLOCK_CA_FILE or SSL_CERT_FILE names the authority; nothing else has to be switched on."),
        ("REQUESTS_CA_BUNDLE AWS_CA_BUNDLE", "", "SSL_CERT_FILE or AIRLOCK_CA_FILE is read."),
        ("HTTPS_PROXY HTTP_PROXY NO_PROXY https_proxy http_proxy no_proxy", "", "The registry is asked directly: it is inside this site."),
        ("NIM_GRPC_API_PORT NIM_TRITON_GRPC_PORT NIM_TRITON_METRICS_PORT", "", "gRPC is out of scope (adr/0007); metrics are at `/v1/metrics`."),
        ("NIM_HEALTH_PORT", "", "Health answers on the API's port."),
        ("NIM_DISABLE_LOG_REQUESTS", "1", "Prompts are never logged; 0 changes nothing."),
        ("NIM_TELEMETRY_MODE", "0", "Nothing is ever sent."),
        ("NIM_LOW_MEMORY_MODE", "0", "No engine is built on this node."),
        ("NIM_CUSTOM_MODEL_NAME", "", "No engine is built on this node; NIM_SERVED_MODEL_NAME names the model."),
        ("NIM_PEFT_REFRESH_INTERVAL NIM_PEFT_API_TIMEOUT_SECS", "", "Adapters are read once, at the start."),
        ("NIM_ENGINE_MODEL_PATH NIM_ENGINE_MODEL_DOWNLOAD_ONLY NIM_ENGINE_MODEL_DOWNLOAD_PROVIDER", "", "`airlock runtime download-to-cache`."),
        ("NIM_SDK_DOWNLOAD_MAX_RETRY_COUNT NIM_SDK_DOWNLOAD_BACKOFF_INTERVAL_MS", "", "A transfer goes on where it stopped, with its own back-off."),
        ("NIM_EXPORT_PATH", "", "Nothing is exported: weights lie in NIM_CACHE_PATH, and NIM_MODEL_PATH names a directory of one's own."),
        ("NIM_CACHE_PROBE_TIMEOUT", "", "The cache is measured by bytes, not by a time-out (`airlock runtime preflight`)."),
        ("NIM_UNIFIED_MEMORY_HOST_RESERVE_GIB", "", "NIM_KVCACHE_PERCENT says how much memory the engine takes."),
        ("NIM_USE_SGLANG", "", "The profile says which engine runs it: pin one of SGLang."),
        ("NIM_NGINX_DIR OUTLINES_CACHE_DIR", "", "There is no such part here."),
        ("NIM_DISABLE_RESPONSES_ROUTE", "", "The route stays."),
    ),
    *_rows(
        "refused",
        ("NIM_MANIFEST_ALLOW_UNSAFE", "0", "Say why, in AIRLOCK_ALLOW_UNSIGNED: that is logged and told to the registry."),
        ("NIM_MIDDLEWARE_CONFIG_PATH", "", "It would load code that nobody signed."),
        ("NIM_MULTI_NODE NIM_LEADER_ROLE", "0", "One start serves one node."),
        ("NIM_NODE_RANK", "0", "One start serves one node."),
        ("NIM_SSL_KEY_PATH NIM_SSL_CERTS_PATH NIM_SSL_CA_CERTS_PATH", "", "The API speaks plain HTTP: put a TLS proxy before it, or a service mesh."),
    ),
    Variable(
        ("NIM_SSL_MODE",),
        "refused",
        "DISABLED",
        "The API speaks plain HTTP: put a TLS proxy before it, or a service mesh.",
        ("", "disabled"),
    ),
    Variable(("NIM_NUM_COMPUTE_NODES",), "refused", "1", "One start serves one node.", ("", "1")),
    Variable(
        ("NIM_CORS_ALLOW_ORIGINS", "NIM_CORS_ALLOW_METHODS", "NIM_CORS_ALLOW_HEADERS"),
        "ignored",
        "",
        "Browsers reach the API through a gateway, which answers for it.",
    ),
)
QUIET = frozenset({"NIM_SDK_USE_NATIVE_TLS", "REQUESTS_CA_BUNDLE", "NIM_DISABLE_LOG_REQUESTS", "NIM_TELEMETRY_MODE", "OUTLINES_CACHE_DIR"})


def known() -> dict[str, Variable]:
    """Each name and its row."""
    return {name: row for row in VARIABLES for name in row.names}


def judge(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that is set and has no effect here; raises Invalid (reason variable) for one that is refused."""
    rows, lines = known(), []
    for name in sorted(environ):
        value, row = environ[name].strip(), rows.get(name)
        if row is None:
            if name.startswith("NIM_") and not _LINK.search(name):
                lines.append(f"{name} is not known here and has no effect (docs/nim-variables.md)")
        elif row.state == "refused" and value.lower() not in row.harmless:
            raise Invalid(f"{name} is set, and is not supported", expected=f"{name} unset", do=row.meaning, reason="variable")
        elif row.state == "ignored" and name.startswith(("NIM_", "NGC_")) and name not in QUIET and value:
            lines.append(f"{name} is ignored: {row.meaning}")
    return lines


def table() -> str:
    """The table of docs/nim-variables.md."""
    lines = ["| variable | meaning, or why not | default | here |", "|---|---|---|---|"]
    for row in VARIABLES:
        names = " ".join(f"`{n}`" for n in row.names)
        lines.append(f"| {names} | {row.meaning} | {row.default} | {row.state} |")
    return "\n".join(lines) + "\n"
