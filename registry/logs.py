"""Log lines of the registry process: one JSON object a line on stderr, and no secret in any, whoever wrote it.

Here because every line of every library passes this one formatter. It decides nothing about what is logged, only how it is written.
"""

from __future__ import annotations

import json
import logging
import re
import sys

ACCESS = "airlock.access"
QUIET = (
    "uvicorn.error",
    "uvicorn.access",
    "alembic",
    "asyncio",
    "botocore",
    "boto3",
    "s3transfer",
    "urllib3",
    "opentelemetry",
    "sqlalchemy",
    "psycopg",
)
_SECRET = re.compile(
    r"nvapi-[A-Za-z0-9_-]{8,}|(?:alt|atk|upl)1\.[A-Za-z0-9_.-]{8,}|hf_[A-Za-z0-9]{16,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"
    r"|(?<=X-Amz-Signature=)[^&\s\"'\\]+|(?<=X-Amz-Credential=)[^&\s\"'\\]+|(?<=X-Amz-Security-Token=)[^&\s\"'\\]+|(?<=Signature=)[0-9A-Za-z%+/=]{16,}"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}|(?<=[Bb]asic )[A-Za-z0-9+/=_-]{8,}"
)
_OPTION = re.compile(
    r"([?&;][^=&;?\s\"\\]{0,100}(?:pass|secret|token|key|signature|credential)[^=&;?\s\"\\]{0,100}=)[^&\s\"\\]+", re.IGNORECASE
)  # a value of a URL's query whose name sounds like it
_URL = re.compile(r"(?<=://)[^\s\"'?]+")
_AT = re.compile(r"@(?!sha(?:256|512):)")  # a name at a digest is no user at a host


def _without_user(found: re.Match[str]) -> str:
    """A URL without the user and the password before its last @, which may hold slashes and more of that sign."""
    text = found.group()
    ends = [at.start() for at in _AT.finditer(text)]
    return "[secret]" + text[ends[-1] :] if ends and ":" in text[: ends[-1]] else text


def redacted(text: str) -> str:
    """The text without keys, tokens, passwords in URLs, and values of their queries that are named like a secret."""
    return _URL.sub(_without_user, _OPTION.sub(r"\1[secret]", _SECRET.sub("[secret]", text)))


class JsonLines(logging.Formatter):
    """One JSON object a line; `facts` of a record become fields of their own; an access record is one object already."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON, with the traceback of an unexpected failure."""
        out: dict[str, object] = {"at": round(record.created, 3), "level": record.levelname.lower(), "log": record.name}
        text = record.getMessage()
        if record.name == ACCESS:
            return redacted(json.dumps(out)[:-1] + ", " + text[1:])
        out["message"] = text
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            out |= facts
        if record.exc_info:
            out["trace"] = self.formatException(record.exc_info)
        return redacted(json.dumps(out, default=str))


def log_to_stderr(level: str) -> None:
    """Sends every log line of the process to stderr as JSON; what libraries say about requests is never written, at no level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
