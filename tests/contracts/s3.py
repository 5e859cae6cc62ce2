"""A registry with the NGC and S3 listeners, the models of tests/contracts/ngc.py, and S3 clients of its keys."""

from __future__ import annotations

import datetime
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from tests.contracts.doors import Answer, Door
from tests.contracts.ngc import NgcDoor, fill, new_ngc_site, ngc_serving

DOMAIN = "s3.airlock.test"
BUCKET = "nim-bucket"
ENV = {"AIRLOCK_S3": "127.0.0.1:0", "AIRLOCK_S3_DOMAIN": DOMAIN, "AIRLOCK_S3_BUCKET": BUCKET}


@dataclass
class S3Door:
    """The three listeners of one registry; `ask` goes to that of the S3 API, unsigned."""

    main: Door
    ngc: NgcDoor
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pair(self, who: str) -> tuple[str, str]:
        """Access key id and secret of a key, as its holder asks for them."""
        done = self.main.ask("POST", "/airlock/v1/keys/s3", b"{}", who, Content_Type="application/json")
        assert done.status == 200, done.body
        return done.json()["key_id"], done.json()["secret"]

    def client(self, who: str | tuple[str, str] | None = "root", style: str = "path", region: str = "us-east-1", **config: Any) -> Any:
        """boto3 as a user configures it; below the domain for virtual-host style (see `named`)."""
        access, secret = self.pair(who) if isinstance(who, str) else who or ("", "")
        place = self.url if style == "path" else f"http://{DOMAIN}:{self.port}"
        made = Config(signature_version="s3v4", s3={"addressing_style": style}, retries={"max_attempts": 1}, **config)
        keys = {"aws_access_key_id": access, "aws_secret_access_key": secret}
        return boto3.session.Session().client("s3", endpoint_url=place, region_name=region, config=made, **keys)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return replace(self.main, port=self.port).ask(method, path, body, None, **headers)

    def lines(self) -> list[dict[str, Any]]:
        """The access lines of the S3 listener so far."""
        time.sleep(0.1)  # a line is written once its answer is out
        found = [json.loads(line) for line in self.main.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if line.get("log") == "airlock.access" and line.get("door") == "s3"]


@contextmanager
def s3_serving(data: Path, keys: dict[str, str], **env: str) -> Iterator[S3Door]:
    """Starts the registry with both listeners on free ports."""
    with ngc_serving(data, keys, **ENV, **env) as ngc:
        assert ngc.main.process.stdout is not None
        line = ngc.main.process.stdout.readline()
        assert line.startswith("S3 API on http"), line
        yield S3Door(ngc.main, ngc, int(line.rsplit(":", 1)[1]))


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Door]:
    """One with the models of tests/contracts/ngc.py, for all tests of a module."""
    data = tmp_path_factory.mktemp("s3") / "data"
    with s3_serving(data, new_ngc_site(data)) as found:
        fill(found.ngc, data)
        yield found


def named(patch: pytest.MonkeyPatch) -> None:
    """The site's name server: every host below the domain is this one."""
    real = socket.getaddrinfo

    def find(host: Any, *args: Any, **more: Any) -> Any:
        here = isinstance(host, str) and (host == DOMAIN or host.endswith(f".{DOMAIN}"))
        return real("127.0.0.1" if here else host, *args, **more)

    patch.setattr(socket, "getaddrinfo", find)


def key_of(name: str, ref: str, path: str) -> str:
    """The key that NIM_REPOSITORY_OVERRIDE makes of `ngc://name:ref?file=path`."""
    return quote(f"{name}:{ref}?file={path}", safe="")


KEY = key_of("nim/meta/llama", "fp16", "config.json")
OBJECT = f"/{BUCKET}/{quote(KEY)}"


def refused(call: Any, **given: Any) -> tuple[int, str, str]:
    """Status, code and message of a call that must fail."""
    with pytest.raises(ClientError) as caught:
        call(**given)
    error = caught.value.response
    return error["ResponseMetadata"]["HTTPStatusCode"], error["Error"]["Code"], error["Error"].get("Message", "")


def signed(
    door: S3Door,
    path: str = OBJECT,
    *,
    method: str = "GET",
    pair: tuple[str, str] | None = None,
    region: str = "us-east-1",
    at: float = 0.0,
    url: int = 0,
    **headers: str,
) -> tuple[str, dict[str, str]]:
    """Path and headers of a request that botocore's own signer signed, at another time where it is said; a URL of `url` seconds where it is set."""
    access, secret = pair or door.pair("low")
    request = AWSRequest(method, f"{door.url}{path}", headers={k.replace("_", "-"): v for k, v in headers.items()})
    when = datetime.datetime.fromtimestamp(time.time() + at, datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    kind = S3SigV4QueryAuth(Credentials(access, secret), "s3", region, url) if url else S3SigV4Auth(Credentials(access, secret), "s3", region)
    request.context["timestamp"] = when
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.auth.get_current_datetime", lambda *a, **k: datetime.datetime.strptime(when, "%Y%m%dT%H%M%SZ"))
        kind.add_auth(request)
    return request.url.removeprefix(door.url), dict(request.headers.items())
