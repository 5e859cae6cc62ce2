"""Profile manifests: which engine, precision and parallelism a model may be run with; parsing and building, pure (docs/format.md section 4)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from artifact.errors import Invalid
from artifact.manifest import PROFILES_TYPE, canonical_json, check_digest, check_name, digest_of, parse_json

SCHEMA = 1
ENGINES = ("tensorrt_llm", "vllm", "sglang")
AUTHORED = ("tags", "options", "id", "image", "memory", "quantization", "expected")
OPTIONS = (
    *("task", "max_model_len", "dtype", "max_num_seqs", "max_num_batched_tokens", "quantization", "kv_cache_dtype"),
    *("tool_call_parser", "reasoning_parser", "draft_model", "draft_tokens", "trust_remote_code"),
)
TASKS = ("generate", "embed")
MAX_EXCLUDED = 4096
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_ENGINE_WORDS = {"trtllm": "tensorrt_llm", "trt_llm": "tensorrt_llm", "tensorrtllm": "tensorrt_llm", "tensorrt": "tensorrt_llm"}


@dataclass(frozen=True)
class Pin:
    """A cross-repository reference: name@digest."""

    name: str
    digest: str


@dataclass(frozen=True)
class Memory:
    """What of a model decides its need of GPU memory: bytes of all tensors, and the shape of its KV cache (docs/format.md section 4).

    `layers` keep the keys and values of the whole context, `sliding_layers` those of `window` tokens; `latent` values per token and layer stand in
    for both with multi-head latent attention; `context` is the model's longest, in tokens. 0: not known.
    """

    weights_bytes: int = 0
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    kv_bytes: int = 2
    latent: int = 0
    sliding_layers: int = 0
    window: int = 0
    context: int = 0


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint says it is quantised: method, bits of a weight, group size (0: none told), and the modules that are left as they were."""

    method: str
    bits: int = 0
    group_size: int = 0
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What somebody measured or promises: first token within so many ms for 95 of 100 requests, tokens a second of all streams."""

    ttft_p95_ms: int = 0
    tok_s: int = 0
    concurrency: int = 0
    hardware: str = ""
    source: str = ""


@dataclass(frozen=True)
class Profile:
    """One way to run a model: opaque id, NIM tags (all strings), the model's digest, options of the engine, bytes of its weights."""

    id: str
    tags: dict[str, str]
    model: Pin
    image: Pin | None = None
    options: dict[str, str] = field(default_factory=dict)
    weights_bytes: int = 0
    memory: Memory | None = None
    quantization: Quantization | None = None
    expected: Expected | None = None

    @property
    def description(self) -> str:
        """The tag values joined as NIM prints them: `vllm-bf16-tp1`, `tensorrt_llm-h100-fp8-tp2-throughput`."""
        t = self.tags
        middle = t["gpu"].lower() if "gpu" in t else ("trtllm_buildable" if t.get("trtllm_buildable") == "true" else t.get("device", ""))
        pp = f"pp{t['pp']}" if t.get("pp", "1") != "1" else ""
        lora = "lora" if t.get("feat_lora") == "true" else ""
        parts = (t.get("llm_engine", ""), middle, t.get("precision", ""), f"tp{t.get('tp', '1')}", pp, t.get("profile", ""), lora)
        return "-".join(p for p in parts if p)

    @property
    def short(self) -> str:
        """The description with the engine's short name, as people write it: `trtllm-h100-fp8-tp2-throughput`."""
        return re.sub(r"\Atensorrt_llm-", "trtllm-", self.description)

    def answers_to(self, name: str) -> bool:
        """Whether a name means this profile: its description in either spelling, with or without `pp1`, or as later NIMs print it, all tags told."""
        mine, t = self.description, self.tags
        long = "-".join(p for p in (mine, t.get("gpu_device", ""), t.get("nim_workspace_hash_v1", ""), t.get("number_of_gpus", "")) if p)
        return spelling(name) in (spelling(mine), spelling(long))


def spelling(name: str) -> str:
    """A profile's name in the one spelling that names are compared in: lower case, `tensorrt_llm` first, no `pp1`."""
    engine, dash, rest = name.strip().lower().partition("-")
    if engine == "tensorrt" and rest.startswith("llm-"):
        rest = rest[4:]
    return _ENGINE_WORDS.get(engine, engine) + dash + re.sub(r"(\A|-)(tp\d+)-pp1(?=-|\Z)", r"\1\2", rest)


@dataclass(frozen=True)
class ProfileSet:
    """A profile manifest: the model's canonical name and its profiles in the author's order."""

    model: str
    profiles: tuple[Profile, ...]


def build(model: str, digest: str, wanted: list[dict[str, object]], weights_bytes: int) -> bytes:
    """The profile document for a model's digest from an author's list of {tags, options?, id?, image?}; raises Invalid."""
    out: list[dict[str, object]] = []
    for i, item in enumerate(wanted):
        if not isinstance(item, Mapping):
            raise Invalid(f"profile {i} is not a mapping", expected="keys " + ", ".join(AUTHORED))
        _known(item, AUTHORED, f"profile {i}")
        tags = _texts(item.get("tags"), f"tags of profile {i}")
        if tags.get("llm_engine") not in ENGINES:
            raise Invalid(f"profile {i} names engine {tags.get('llm_engine')!r}", expected="llm_engine: " + ", ".join(ENGINES))
        body: dict[str, object] = {"tags": tags, "model": {"name": check_name(model), "digest": check_digest(digest)}, "weights_bytes": weights_bytes}
        options = _options(item.get("options"), i)
        _known(options, OPTIONS, f"options of profile {i}")
        if options.get("task", "generate") not in TASKS:
            raise Invalid(f"option task of profile {i} is {options['task'][:40]!r}", expected=" or ".join(TASKS))
        if options:
            body["options"] = options
        body |= _needs(item, i)
        if item.get("image") is not None:
            pin = _pin(item["image"], f"image of profile {i}")
            body["image"] = {"name": pin.name, "digest": pin.digest}
        given = _texts({"id": item["id"]}, f"id of profile {i}")["id"] if item.get("id") else ""
        out.append({"id": given or digest_of(canonical_json(body))[7:], **body})
    raw = canonical_json({"schema": SCHEMA, "model": model, "profiles": out})
    parse(raw)
    return raw


def _needs(item: Mapping[str, object], i: int) -> dict[str, object]:
    """The author's blocks memory, quantization and expected, checked: a misspelt word in them is refused too."""
    out: dict[str, object] = {}
    for word, kind, read_block in (("memory", Memory, _memory), ("quantization", Quantization, _quantization), ("expected", Expected, _expected)):
        given = item.get(word)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise Invalid(f"{word} of profile {i} is not a mapping", expected="keys " + ", ".join(f.name for f in fields(kind)))
        _known(given, tuple(f.name for f in fields(kind)), f"{word} of profile {i}")
        out[word] = block(read_block(given, i))
    return out


def block(value: Memory | Quantization | Expected | None) -> dict[str, object]:
    """The block of a document for a value: what is known of it, nothing where there is none."""
    pairs = ((f.name, getattr(value, f.name)) for f in fields(value)) if value else ()
    return {k: list(v) if isinstance(v, tuple) else v for k, v in pairs if v}


def read(raw: bytes) -> ProfileSet:
    """The profiles of a file: a profile document, or an author's list in JSON, whose model is nobody's yet; raises Invalid, TooLarge."""
    doc = parse_json(raw, "the file of profiles")
    if "schema" in doc:
        return parse(raw)
    items, weights = doc.get("profiles"), doc.get("weights_bytes", 0)
    if not isinstance(items, list) or not items or not all(isinstance(i, dict) for i in items):
        raise Invalid("the file holds no list of profiles", expected='{"profiles": [{"tags": {"llm_engine": "vllm", …}}, …]}')
    if type(weights) is not int or weights < 0:
        raise Invalid("weights_bytes of the file is not a size", expected="whole bytes")
    return parse(build("local/model", "sha256:" + "0" * 64, items, weights))


def _known(entry: Iterable[object], known: tuple[str, ...], where: str) -> None:
    """A misspelt word in an author's file is refused: passed over, it would run the model in another way than was meant."""
    unknown = sorted(str(k)[:40] for k in entry if k not in known)
    if unknown:
        raise Invalid(f"{where} has unknown keys: {', '.join(unknown)[:200]}", expected="known keys: " + ", ".join(known))


def parse(raw: bytes) -> ProfileSet:
    """A profile document from untrusted bytes; raises Invalid, TooLarge."""
    doc = parse_json(raw, "the profile document")
    if doc.get("schema") != SCHEMA:
        raise Invalid(f"profile document of schema {doc.get('schema')!r}", expected=str(SCHEMA), do="update Airlock")
    model, items = doc.get("model"), doc.get("profiles")
    if not isinstance(model, str) or not isinstance(items, list) or not items:
        raise Invalid("the profile document names no model or no profile", expected="model and a list of profiles")
    profiles = tuple(_profile(item, i) for i, item in enumerate(items))
    if len({p.id for p in profiles}) != len(profiles):
        raise Invalid("two profiles have one id", expected="unique ids")
    return ProfileSet(check_name(model), profiles)


def _profile(item: object, i: int) -> Profile:
    if not isinstance(item, Mapping) or not isinstance(item.get("id"), str) or not _ID.match(item["id"]):
        raise Invalid(f"profile {i} has no id that is accepted", expected="an object with id (1 to 128 of letters, digits, . _ -), tags and model")
    weights = item.get("weights_bytes", 0)
    if type(weights) is not int or not 0 <= weights < 1 << 53:
        raise Invalid(f"weights_bytes of profile {i} is not a size", expected="whole bytes below 2^53")
    image = _pin(item["image"], f"image of profile {i}") if item.get("image") is not None else None
    return Profile(
        item["id"],
        _texts(item.get("tags"), f"tags of profile {i}"),
        _pin(item.get("model"), f"model of profile {i}"),
        image,
        _options(item.get("options"), i),
        weights,
        _memory(item["memory"], i) if item.get("memory") is not None else None,
        _quantization(item["quantization"], i) if item.get("quantization") is not None else None,
        _expected(item["expected"], i) if item.get("expected") is not None else None,
    )


def _memory(value: object, i: int) -> Memory:
    names = [f.name for f in fields(Memory)]
    if not isinstance(value, Mapping):
        raise Invalid(f"memory of profile {i} is not an object", expected="keys " + ", ".join(names))
    found = {k: value[k] for k in names if k in value}
    for name, number in found.items():
        # Bounded, because products of these are compared and printed: no real model comes near either.
        if type(number) is not int or not 0 <= number < (1 << 53 if name == "weights_bytes" else 1 << 31):
            raise Invalid(f"{name} in memory of profile {i} is {str(number)[:40]!r}", expected="a whole number, not negative")
    return Memory(**found)


def _quantization(value: object, i: int) -> Quantization:
    what = f"quantization of profile {i}"
    if not isinstance(value, Mapping) or not isinstance(value.get("method"), str) or not value["method"] or not _printable(value["method"], 64):
        raise Invalid(f"{what} names no method", expected="an object with method, such as awq, gptq, fp8, compressed-tensors or modelopt")
    bits, group, excluded = value.get("bits", 0), value.get("group_size", 0), value.get("excluded", [])
    if type(bits) is not int or not 0 <= bits <= 64 or type(group) is not int or not 0 <= group < 1 << 31:
        raise Invalid(f"bits or group_size in {what} are no such numbers", expected="whole numbers, not negative")
    if not isinstance(excluded, list) or len(excluded) > MAX_EXCLUDED or not all(isinstance(e, str) and _printable(e, 512) for e in excluded):
        raise Invalid(f"excluded in {what} is no list of module names", expected=f"at most {MAX_EXCLUDED} names of at most 512 printable characters")
    return Quantization(value["method"], bits, group, tuple(excluded))


def _printable(text: str, most: int) -> bool:
    return len(text) <= most and text.isprintable()


def _expected(value: object, i: int) -> Expected:
    what = f"expected of profile {i}"
    if not isinstance(value, Mapping):
        raise Invalid(f"{what} is not an object", expected="keys " + ", ".join(f.name for f in fields(Expected)))
    numbers = {k: value.get(k, 0) for k in ("ttft_p95_ms", "tok_s", "concurrency")}
    words = {k: value.get(k, "") for k in ("hardware", "source")}
    if not all(type(n) is int and 0 <= n < 1 << 31 for n in numbers.values()):
        raise Invalid(f"ttft_p95_ms, tok_s or concurrency in {what} are no such numbers", expected="whole numbers, not negative")
    if not all(isinstance(w, str) and len(w) <= 200 and w.isprintable() for w in words.values()):
        raise Invalid(f"hardware or source in {what} is no line of text", expected="at most 200 printable characters")
    if not (numbers["ttft_p95_ms"] or numbers["tok_s"]) or not words["source"]:
        raise Invalid(f"{what} names no figure, or nobody who says so", expected="ttft_p95_ms or tok_s, and source")
    return Expected(**numbers, **words)


def _options(value: object, i: int) -> dict[str, str]:
    """Options end up near a command line: none may look like one of its switches."""
    options = _texts(value or {}, f"options of profile {i}")
    for name, text in options.items():
        if text.startswith("-"):
            raise Invalid(f"option {name[:40]!r} of profile {i} is {text[:40]!r}", expected="a value that does not begin with -")
    length = options.get("max_model_len", "1")
    if not length.isascii() or not length.isdigit():
        raise Invalid(f"option max_model_len of profile {i} is {length[:40]!r}", expected="a whole number of tokens")
    return options


def _texts(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and k.isprintable() and _is_text(v) for k, v in value.items()):
        raise Invalid(f"the {what} are not text", expected="a mapping of words to words or whole numbers")
    return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in value.items()}


def _is_text(value: object) -> bool:
    # Tags and options are printed in logs and tables: nothing that steers a terminal or forges a line.
    return (isinstance(value, str) and value.isprintable()) or (isinstance(value, int) and abs(value) < 1 << 63)


def _pin(value: object, what: str) -> Pin:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not isinstance(value.get("digest"), str):
        raise Invalid(f"the {what} is not name and digest", expected="an object with name and digest")
    return Pin(check_name(value["name"]), check_digest(value["digest"]))


def references(raw: bytes, media_type: str) -> tuple[Pin, ...]:
    """Cross-repository edges of a document layer (D5): the models and images that its profiles name; empty for other types."""
    if media_type != PROFILES_TYPE:
        return ()
    found: dict[Pin, None] = {}
    for profile in parse(raw).profiles:
        found[profile.model] = None
        if profile.image:
            found[profile.image] = None
    return tuple(found)
