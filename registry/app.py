"""Wiring only: which door answers which path."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match

from registry import openapi
from registry.exchange import Exchange, Pools, Receive, Scope, Send
from registry.front import Front
from registry.metrics import Metrics
from registry.protocols.admin import AdminDoor
from registry.protocols.huggingface import HubDoor
from registry.protocols.oci import OciDoor
from registry.protocols.token import PATHS, TokenDoor
from registry.settings import Settings
from registry.telemetry import Tracing
from registry.wiring import Site


class Doors(BaseRoute):
    """Every path of the three doors, by its first segment; the doors read the rest themselves, as names hold slashes."""

    def __init__(self, site: Site, settings: Settings) -> None:
        self.guard, self.pools, self.public_url, self.x_accel = (
            site.guard,
            Pools(io=8 if settings.blobs_url == "file:" else 32),
            settings.public_url,
            settings.x_accel,
        )
        self.oci, self.admin, self.token = OciDoor(), AdminDoor(site.check), TokenDoor()
        self.hub = HubDoor()

    def matches(self, scope: Scope) -> tuple[Match, Any]:
        """Takes every HTTP request."""
        return (Match.FULL if scope["type"] == "http" else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands the request to its door."""
        first = scope["path"].split("/", 2)[1:2]
        x = Exchange(self.guard, self.pools, scope, receive, send, self.public_url, self.x_accel)
        if scope["path"] in PATHS:
            await self.token(x)
            return
        door = self.oci if first == ["v2"] else self.admin if first in (["airlock"], ["healthz"]) else self.hub
        await door(x)


def create_app(site: Site, settings: Settings, metrics: Metrics | None = None, tracing: Tracing | None = None) -> Front:
    """The ASGI application over an open site."""
    app = FastAPI(openapi_url="/airlock/v1/openapi.json", docs_url=None, redoc_url=None)
    setattr(app, "openapi", openapi.document)  # noqa: B010 - the doors read their paths themselves, so the framework sees none of them
    app.router.routes.append(Doors(site, settings))
    return Front(app, metrics, tracing)
