"""Wiring only: which door answers which path."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match

from registry.exchange import Exchange, Front, Pools, Receive, Scope, Send
from registry.protocols.admin import AdminDoor
from registry.protocols.huggingface import HubDoor
from registry.protocols.oci import OciDoor
from registry.settings import Settings
from registry.wiring import Site


class Doors(BaseRoute):
    """Every path of the three doors, by its first segment; the doors read the rest themselves, as names hold slashes."""

    def __init__(self, site: Site, settings: Settings) -> None:
        self.guard, self.pools = site.guard, Pools()
        self.oci, self.admin = OciDoor(), AdminDoor(site.check)
        self.hub = HubDoor(lambda x: (settings.public_url or f"http://{x.headers.get('host', '')}").rstrip("/"))

    def matches(self, scope: Scope) -> tuple[Match, Any]:
        """Takes every HTTP request."""
        return (Match.FULL if scope["type"] == "http" else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands the request to its door."""
        first = scope["path"].split("/", 2)[1:2]
        door = self.oci if first == ["v2"] else self.admin if first in (["airlock"], ["healthz"]) else self.hub
        await door(Exchange(self.guard, self.pools, scope, receive, send))


def create_app(site: Site, settings: Settings) -> FastAPI:
    """The ASGI application over an open site."""
    app = FastAPI(title="Airlock registry", openapi_url=None, docs_url=None, redoc_url=None)
    app.router.routes.append(Doors(site, settings))
    app.add_middleware(Front)
    return app
