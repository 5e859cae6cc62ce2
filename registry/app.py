"""Wiring only: which door answers which path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match

from registry import openapi
from registry.exchange import Exchange, Pools, Receive, Scope, Send
from registry.front import Front
from registry.metrics import Metrics
from registry.protocols.admin import AdminDoor
from registry.protocols.huggingface import HubDoor
from registry.protocols.ngc import NgcDoor
from registry.protocols.oci import OciDoor
from registry.protocols.s3 import S3Door
from registry.protocols.token import PATHS, TokenDoor
from registry.settings import Settings
from registry.telemetry import Tracing
from registry.wiring import Site

Place = tuple[str, int]


class Doors(BaseRoute):
    """Every path of the doors, by its first segment or its listener; the doors read the rest themselves, as names hold slashes."""

    def __init__(self, site: Site, settings: Settings, listeners: Mapping[str, Place]) -> None:
        self.guard, self.pools, self.public_url, self.x_accel = (
            site.guard,
            Pools(io=8 if settings.blobs_url == "file:" else 32),
            settings.public_url,
            settings.x_accel,
        )
        self.oci, self.admin, self.token = OciDoor(), AdminDoor(site.check), TokenDoor()
        self.hub = HubDoor()
        own: dict[str, tuple[Callable[[Exchange], Awaitable[None]], str]] = {
            "ngc": (NgcDoor(site.home.instance), settings.ngc_url),
            "s3": (S3Door(site.home.instance, settings.s3_domain, settings.s3_region, settings.s3_bucket), ""),
        }
        self.apart = [(name, at, *own[name]) for name, at in listeners.items()]

    def matches(self, scope: Scope) -> tuple[Match, Any]:
        """Takes every HTTP request."""
        return (Match.FULL if scope["type"] == "http" else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands the request to its door."""
        for name, at, door, url in self.apart:
            if _came_by(scope, at):
                scope["airlock"]["door"] = name
                await door(Exchange(self.guard, self.pools, scope, receive, send, url, self.x_accel))
                return
        first = scope["path"].split("/", 2)[1:2]
        x = Exchange(self.guard, self.pools, scope, receive, send, self.public_url, self.x_accel)
        if scope["path"] in PATHS:
            await self.token(x)
            return
        main = self.oci if first == ["v2"] else self.admin if first in (["airlock"], ["healthz"]) else self.hub
        await main(x)


def _came_by(scope: Scope, place: Place) -> bool:
    """Whether a request's own end of the connection is that listener's; one on every address is known by its port."""
    host, port = scope.get("server") or ("", None)
    return port == place[1] and place[0] in (host, "0.0.0.0", "::")  # noqa: S104 (compared with, not listened on)


def create_app(
    site: Site, settings: Settings, metrics: Metrics | None = None, tracing: Tracing | None = None, listeners: Mapping[str, Place] | None = None
) -> Front:
    """The ASGI application over an open site; `listeners` are the addresses and ports of those that are a door's alone, `ngc` and `s3`."""
    app = FastAPI(openapi_url="/airlock/v1/openapi.json", docs_url=None, redoc_url=None)
    setattr(app, "openapi", openapi.document)  # noqa: B010 - the doors read their paths themselves, so the framework sees none of them
    app.router.routes.append(Doors(site, settings, listeners or {}))
    return Front(app, metrics, tracing)
