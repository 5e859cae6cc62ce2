"""The registry's settings: one frozen value, each setting described once, read in one place: argument, environment, file, default.

Here because every command of the registry starts with them. It opens no database, makes nothing and knows no default path of a machine.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifact.errors import Invalid, NotFound

LOG_LEVELS = ("debug", "info", "warning", "error")
PREFIX = "AIRLOCK_"
CONFIG = "AIRLOCK_CONFIG"
FILE = "registry.yaml"
MAX_FILE_BYTES = 1024 * 1024
SIGNED_URL_S = 600  # the longest life of a URL that sends a client to the store
_ORIGIN = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::([0-9]{1,5}))?/?", re.ASCII)
_HOOK = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::([0-9]{1,5}))?(?:[/?][!-~]*)?", re.ASCII)
_KEY_PREFIX = re.compile(r"nvapi-([a-z0-9]{1,20}-)?")
_INSIDE = re.compile(r"/(?:[0-9A-Za-z_~-][0-9A-Za-z._~-]*/)+", re.ASCII)
_HOST = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_REGION = re.compile(r"[A-Za-z0-9-]{1,40}", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{2,62}", re.ASCII)
_SECRET_OPTION = re.compile(r"([?&][^=&]*(?:pass|secret|token|key)[^=&]*=)[^&\s]*", re.IGNORECASE)
Parser = Callable[[str], Any]


@dataclass(frozen=True)
class Spec:
    """How one setting is written: its parser (raises ValueError), what is expected, one sentence, and whether its value may hold a secret."""

    parse: Parser
    expected: str
    about: str
    secret: bool = False


def _setting(default: Any, about: str, parse: Parser, expected: str, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"spec": Spec(parse, expected, about, secret)})


def _word(text: str) -> str:
    if not text.isprintable():
        raise ValueError(text)
    return text


def _text(default: str, about: str, expected: str = "text", *, secret: bool = False) -> Any:
    return _setting(default, about, _word, expected, secret=secret)


def _whole(default: int, low: int, high: int, about: str) -> Any:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 18 or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return _setting(default, about, parse, f"a whole number from {low} to {high}")


def _flag(default: bool, about: str) -> Any:
    def parse(text: str) -> bool:
        if text.lower() not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
            raise ValueError(text)
        return text.lower() in ("1", "true", "yes", "on")

    return _setting(default, about, parse, "on or off")


def _choice(default: str, words: tuple[str, ...], about: str) -> Any:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(text)
        return text.lower()

    return _setting(default, about, parse, ", ".join(words))


def _place(text: str) -> str:
    host, colon, port = _word(text).rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(text)
    return text


def _web(text: str) -> str:
    """A URL without path: realms and links are made by adding to it, and nothing is served below a path."""
    found = _ORIGIN.fullmatch(text)
    if not found or int(found[1] or 0) > 65535:
        raise ValueError(text)
    return text.rstrip("/")


def _hook(text: str) -> str:
    """A URL that a POST goes to; user and password have no place in it, the body is signed."""
    found = _HOOK.fullmatch(text)
    if not found or not 0 < int(found[1] or 80) <= 65535:
        raise ValueError(text)
    return text


def _networks(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in _word(text).split(",") if part.strip())
    for part in parts:
        ipaddress.ip_network(part)
    return parts


def key_prefix(text: str) -> str:
    """A prefix of keys itself: the NGC CLI knows a key by `nvapi-`, so every one begins with it; raises ValueError."""
    if not _KEY_PREFIX.fullmatch(text):
        raise ValueError(text)
    return text


def _domain(text: str) -> str:
    if len(text) > 200 or not _HOST.fullmatch(text.lower()):
        raise ValueError(text)
    return text.lower()


def _region(text: str) -> str:
    if not _REGION.fullmatch(text):
        raise ValueError(text)
    return text


def _bucket(text: str) -> str:
    """The name of a bucket; `models` is that of the other kind (registry/s3_shapes.py)."""
    if not _BUCKET.fullmatch(text) or text == "models":
        raise ValueError(text)
    return text


def _inside(text: str) -> str:
    if not _INSIDE.fullmatch(text):
        raise ValueError(text)
    return text


@dataclass(frozen=True)
class Settings:
    """What `airlock registry serve` and the commands beside it need; units are in the names."""

    data: Path = field(metadata={"spec": Spec(lambda text: Path(_word(text)), "a directory", "The data directory made by `airlock site init`.")})
    host: str = _text("127.0.0.1", "Address that the registry listens on.", "an address of this host")
    port: int = _whole(5000, 0, 65535, "Port that the registry listens on; 0 takes any free one.")
    public_url: str = _setting("", "URL that clients are told, where it is not the one they used.", _web, "http[s]://HOST[:PORT], no path")
    log_level: str = _choice("info", LOG_LEVELS, "The least severe log line that is written.")
    upload_ttl_s: int = _whole(7 * 86400, 60, 365 * 86400, "How long an unfinished upload can be resumed.")
    lease_life_s: int = _whole(86400, 60, 30 * 86400, "Life of a runtime's lease.")
    lease_grace_s: int = _whole(3 * 86400, 0, 30 * 86400, "How long after its end a runtime may still start on a lease.")
    drain_delay_s: int = _whole(0, 0, 3600, "How long after SIGTERM requests are still taken while /readyz says 503.")
    drain_timeout_s: int = _whole(30, 0, 3600, "How long open pulls may go on once no connection is accepted.")
    database: str = _text("", "URL of the database; empty is SQLite in the data directory.", "postgresql://USER@HOST/NAME", secret=True)
    blobs: str = _text("", "URL of the store of bytes; empty is the data directory.", "file: or s3://BUCKET/PREFIX?endpoint=…", secret=True)
    redirect: bool = _flag(True, "Whether pulls from an S3 store are redirected to it.")
    stream_to: tuple[str, ...] = _setting((), "Networks whose pulls are streamed, never redirected.", _networks, "CIDRs with commas between")
    x_accel: str = _setting("", "Internal location of an nginx in front that sends the bytes.", _inside, "/NAME/, as /internal/")
    anonymous: bool = _flag(False, "Whether public repositories can be read without a key.")
    entitlements: str = _choice("optional", ("optional", "required"), "Whether an organisation reads what is not its own only under an entitlement.")
    key_prefix: str = _setting("nvapi-", "What new keys begin with.", key_prefix, "nvapi-, or nvapi-WORD-")
    token_life_s: int = _whole(600, 60, 86400, "Life of a token of the token endpoint.")
    blob_lease_s: int = _whole(86400, 60, 30 * 86400, "How long a blob without a manifest is kept for its uploader.")
    garbage_delay_s: int = _whole(3600, 0, 30 * 86400, "How long the bytes of a removed blob stay; longer than any signed URL lives.")
    gc_every_s: int = _whole(3600, 0, 30 * 86400, "Time between two garbage collections; 0 runs none.")
    webhook: str = _setting("", "Where notices of what ends are sent; empty is nowhere.", _hook, "http[s]://HOST[:PORT]/PATH", secret=True)
    webhook_secret_file: str = _text("", "File of the secret that signs what is sent there.", "a file of 16 bytes or more")
    metrics: str = _setting("", "Listener of /healthz, /readyz and /metrics; empty is none.", _place, "HOST:PORT")
    ngc: str = _setting("", "Listener of the NGC API; empty is none.", _place, "HOST:PORT")
    ngc_url: str = _setting("", "URL that NGC clients are told, where it is not the one they used.", _web, "http[s]://HOST[:PORT], no path")
    s3: str = _setting("", "Listener of the S3 API, which reads only; empty is none.", _place, "HOST:PORT")
    s3_domain: str = _setting("", "Domain below which each bucket is a host of its own.", _domain, "a host name")
    s3_region: str = _setting("us-east-1", "Region that S3 clients sign for.", _region, "letters, digits and -")
    s3_bucket: str = _setting("nim", "Bucket whose keys NIM_REPOSITORY_OVERRIDE makes.", _bucket, "3 to 63 of a-z, 0-9, . _ -, not models")
    tls: str = _choice("off", ("off", "self-signed"), "self-signed makes a key and certificate in the data directory once.")
    tls_cert: str = _text("", "File of the certificate chain, PEM.", "a file")
    tls_key: str = _text("", "File of the certificate's private key, PEM.", "a file")
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)  # setting to where its value came from

    @property
    def database_url(self) -> str:
        """SQLAlchemy's URL: the one that was set, else of the SQLite file in the data directory."""
        return self.database or f"sqlite:///{self.data / 'registry.db'}"

    @property
    def blobs_url(self) -> str:
        """The URL of the store: `file:` for the data directory, `s3://…` for a bucket; its scheme names the module in registry/blobs."""
        return self.blobs or "file:"

    @property
    def secure(self) -> bool:
        """Whether the registry's listener speaks TLS itself."""
        return self.tls != "off" or bool(self.tls_cert)

    @property
    def url(self) -> str:
        """The URL that clients are told."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.public_url or f"{'https' if self.secure else 'http'}://{host}:{self.port}"

    @classmethod
    def load(
        cls,
        data: str | Path | None = None,
        *,
        host: str | None = None,
        port: int | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Settings from arguments, else AIRLOCK_* variables, else the file, else the defaults; raises Invalid, NotFound."""
        env = os.environ if environ is None else environ
        given = {"data": data, "host": host, "port": port}
        texts = {name: (str(value), "argument", f"--{name}") for name, value in given.items() if value is not None and value != ""}
        for name in specs():
            variable = PREFIX + name.upper()
            if name not in texts and env.get(variable):
                texts[name] = (env[variable], f"environment {variable}", variable)
        file = _file(env.get(CONFIG, ""), texts)
        for name, text in _read(file).items() if file else ():
            texts.setdefault(name, (text, f"file {file}", f"{name} in {file}"))
        if "data" not in texts:
            raise Invalid("no data directory was given", expected="--data DIR or AIRLOCK_DATA", do="airlock site init --data DIR --trust-root FILE")
        values = {name: _parsed(name, *found) for name, found in texts.items()}
        values["data"] = values["data"].absolute()
        settings = cls(**values, sources={name: source for name, (_, source, _) in texts.items()})
        settings._check()
        return settings

    def _check(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise Invalid(f"{'tls_cert' if self.tls_cert else 'tls_key'} is set alone", expected="tls_cert and tls_key together, or neither")
        if self.tls != "off" and self.tls_cert:
            raise Invalid(f"tls is {self.tls} and tls_cert is set", expected="one of the two", do="remove AIRLOCK_TLS or AIRLOCK_TLS_CERT")
        bucket = not self.blobs_url.startswith("file:")
        if bucket and self.x_accel:
            raise Invalid("x_accel is set and the bytes lie in a bucket", expected="one of the two: nginx sends files", do="remove AIRLOCK_X_ACCEL")
        if bucket and self.redirect and self.garbage_delay_s < SIGNED_URL_S:
            raise Invalid(
                f"garbage_delay_s is {self.garbage_delay_s} and pulls are sent to the store by URLs that live {SIGNED_URL_S} s",
                expected=f"{SIGNED_URL_S} or more, so that no pull under way loses its bytes",
                do="raise AIRLOCK_GARBAGE_DELAY_S, or set AIRLOCK_REDIRECT=off",
                reason="setting",
            )

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, value as it would be written, source and sentence of every setting; passwords are masked."""
        out = []
        for name, spec in specs().items():
            text = written(getattr(self, name))
            out.append((name, _masked(text) if spec.secret else text, self.sources.get(name, "default"), spec.about))
        return out


def _masked(text: str) -> str:
    """A URL without what may be secret in it: all between the first colon behind its scheme and the last @, and options that sound like it."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        return text if text in ("", "file:") else "***"
    if scheme in ("http", "https"):  # receivers of notices know their senders by the path
        return f"{scheme}://{rest.partition('/')[0]}/***"
    who, at, where = rest.rpartition("@")
    if at and ":" in who:
        rest = f"{who.split(':', 1)[0]}:***@{where}"
    return _SECRET_OPTION.sub(r"\1***", scheme + mark + rest)


def specs() -> dict[str, Spec]:
    """Every setting by name, in the order of the documentation."""
    return {f.name: f.metadata["spec"] for f in dataclasses.fields(Settings) if "spec" in f.metadata}


def table() -> str:
    """The settings as the Markdown table of docs/operations.md."""
    defaults = {f.name: f.default for f in dataclasses.fields(Settings) if f.default is not dataclasses.MISSING}
    lines = ["| setting and file key | environment | default | expected | what it is |", "|---|---|---|---|---|"]
    for name, spec in specs().items():
        default = written(defaults.get(name))
        lines.append(f"| `{name}` | `{PREFIX}{name.upper()}` | {f'`{default}`' if default else ''} | {spec.expected} | {spec.about} |")
    return "\n".join(lines)


def written(value: object) -> str:
    """A setting's value as text that its parser takes."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)


def _parsed(name: str, text: str, _source: str, where: str) -> Any:
    spec = specs()[name]
    try:
        return spec.parse(text)
    except ValueError:
        shown = "not acceptable" if spec.secret else repr(text[:40])
        raise Invalid(f"{where} is {shown}", expected=spec.expected, do="airlock registry config shows every setting", reason="setting") from None


def _file(named: str, texts: Mapping[str, tuple[str, str, str]]) -> Path | None:
    """The settings file: the one that AIRLOCK_CONFIG names, or registry.yaml of the data directory where it exists."""
    if named:
        return Path(named)
    beside = Path(texts["data"][0]) / FILE if "data" in texts else None
    return beside if beside and os.path.lexists(beside) else None


def _bytes(file: Path) -> bytes:
    """The file's bytes; raises NotFound, and Invalid at once for what is no file, whose reader could wait for ever."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise Invalid(f"the settings file {file} is no file", expected="a YAML file", do=f"name a file in {CONFIG}", reason="setting")
        with file.open("rb") as source:
            raw = source.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        text = f"the settings file {file} cannot be read: {getattr(error, 'strerror', error)}"
        raise NotFound(text, expected=f"a YAML file ({CONFIG})") from error
    if len(raw) > MAX_FILE_BYTES:
        raise Invalid(f"{file} is too large", expected=f"at most {MAX_FILE_BYTES} bytes", reason="setting")
    return raw


def _parse(file: Path, raw: bytes) -> object:
    """The YAML document, in which no name stands twice: of two values one would be silently without effect; raises Invalid."""
    import yaml  # only where there is a file

    try:
        loader = yaml.SafeLoader(raw.decode("utf-8"))
        try:
            node = loader.get_single_node()
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                    what = f"{file} has {key.value[:60]!r} twice, again in line {key.start_mark.line + 1}"
                    raise Invalid(what, expected="each name once", do="remove one of the two lines", reason="setting")
                seen.add(str(key.value))
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise Invalid(f"{file} is no YAML{at}", expected="lines of `name: value`", reason="setting") from None


def _read(file: Path) -> dict[str, str]:
    """The file's settings as text; raises NotFound, and Invalid for what is no mapping of known names to plain values."""
    doc = _parse(file, _bytes(file))
    if doc is None:
        return {}
    if not isinstance(doc, dict):
        raise Invalid(f"{file} holds no settings", expected="lines of `name: value`", reason="setting")
    known = specs()
    out = {}
    for key, value in doc.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            wanted = f"did you mean {near[0]}?" if near else "a name of `airlock registry config`"
            raise Invalid(f"{file} has the unknown setting {str(key)[:60]!r}", expected=wanted, reason="setting")
        text = _plain(value)
        if text is None:
            raise Invalid(f"{key} in {file} is {type(value).__name__}", expected=known[key].expected, reason="setting")
        if text:
            out[key] = text
    return out


def _plain(value: object) -> str | None:
    if value is None:
        return ""
    if isinstance(value, list):
        return ",".join(value) if all(isinstance(v, str) for v in value) else None
    try:
        return written(value) if isinstance(value, str | int | bool) else None
    except ValueError:  # a whole number of thousands of digits
        return None
