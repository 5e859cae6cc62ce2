"""The registry's settings: one frozen value, read from the environment in one place; it opens nothing and knows no default path of a machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from artifact.errors import Invalid

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Settings:
    """What `airlock registry serve` and the commands beside it need; units are in the names."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 5000
    public_url: str = ""
    log_level: str = "info"
    upload_ttl_s: int = 7 * 86400
    lease_life_s: int = 86400
    lease_grace_s: int = 3 * 86400
    drain_timeout_s: int = 30
    database: str = ""
    blobs: str = ""
    redirect: bool = True
    stream_to: tuple[str, ...] = ()
    x_accel: str = ""
    anonymous: bool = False
    token_life_s: int = 600
    blob_lease_s: int = 86400
    garbage_delay_s: int = 3600
    gc_every_s: int = 3600

    @property
    def database_url(self) -> str:
        """SQLAlchemy's URL: the one that was set, else of the SQLite file in the data directory."""
        return self.database or f"sqlite:///{self.data / 'registry.db'}"

    @property
    def blobs_url(self) -> str:
        """The URL of the store: `file:` for the data directory, `s3://…` for a bucket; its scheme names the module in registry/blobs."""
        return self.blobs or "file:"

    @property
    def url(self) -> str:
        """The URL that clients are told."""
        return self.public_url or f"http://{self.host}:{self.port}"

    @classmethod
    def load(
        cls,
        data: str | Path | None = None,
        *,
        host: str | None = None,
        port: int | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Settings from arguments first, then AIRLOCK_* variables; raises Invalid for a missing data directory or a wrong value."""
        env = os.environ if environ is None else environ
        chosen = str(data) if data else env.get("AIRLOCK_DATA", "")
        if not chosen:
            raise Invalid("no data directory was given", expected="--data DIR or AIRLOCK_DATA", do="airlock site init --data DIR --trust-root FILE")
        level = env.get("AIRLOCK_LOG_LEVEL", "info").lower()
        if level not in LOG_LEVELS:
            raise Invalid(f"AIRLOCK_LOG_LEVEL is {level[:40]!r}", expected=", ".join(LOG_LEVELS))
        return cls(
            data=Path(chosen).absolute(),
            host=host or env.get("AIRLOCK_HOST", "127.0.0.1"),
            port=port if port is not None else _whole(env, "AIRLOCK_PORT", 5000, 0, 65535),
            public_url=env.get("AIRLOCK_PUBLIC_URL", "").rstrip("/"),
            log_level=level,
            upload_ttl_s=_whole(env, "AIRLOCK_UPLOAD_TTL_S", 7 * 86400, 60, 365 * 86400),
            lease_life_s=_whole(env, "AIRLOCK_LEASE_LIFE_S", 86400, 60, 30 * 86400),
            lease_grace_s=_whole(env, "AIRLOCK_LEASE_GRACE_S", 3 * 86400, 0, 30 * 86400),
            drain_timeout_s=_whole(env, "AIRLOCK_DRAIN_TIMEOUT_S", 30, 0, 3600),
            database=env.get("AIRLOCK_DATABASE", ""),
            blobs=env.get("AIRLOCK_BLOBS", ""),
            redirect=_flag(env, "AIRLOCK_REDIRECT", True),
            stream_to=tuple(part.strip() for part in env.get("AIRLOCK_STREAM_TO", "").split(",") if part.strip()),
            x_accel=env.get("AIRLOCK_X_ACCEL", ""),
            anonymous=_flag(env, "AIRLOCK_ANONYMOUS", False),
            token_life_s=_whole(env, "AIRLOCK_TOKEN_LIFE_S", 600, 60, 86400),
            blob_lease_s=_whole(env, "AIRLOCK_BLOB_LEASE_S", 86400, 60, 30 * 86400),
            garbage_delay_s=_whole(env, "AIRLOCK_GARBAGE_DELAY_S", 3600, 0, 30 * 86400),
            gc_every_s=_whole(env, "AIRLOCK_GC_EVERY_S", 3600, 0, 30 * 86400),
        )


def _flag(env: Mapping[str, str], name: str, default: bool) -> bool:
    text = env.get(name, "").lower()
    if text not in ("", "0", "1", "false", "true", "no", "yes", "off", "on"):
        raise Invalid(f"{name} is {text[:40]!r}", expected="on or off")
    return default if not text else text in ("1", "true", "yes", "on")


def _whole(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise Invalid(f"{name} is {text[:40]!r}", expected=f"a whole number from {low} to {high}")
    return int(text)
