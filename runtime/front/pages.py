"""The management routes of a NIM: health, models, metadata, manifest, version, licence; they ask the engine nothing but its context length."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from runtime.front.errors import Json, Refused
from runtime.front.pipe import Pipe
from runtime.front.settings import ServeSettings

OPENAPI = "3.1.0"


class Pages:
    """What is served, told; `available` says whether requests are taken now, `warning` what ends soon."""

    def __init__(
        self,
        settings: ServeSettings,
        pipe: Pipe,
        models: Callable[[], Mapping[str, Mapping[str, object]]],
        available: Callable[[], bool],
        warning: Callable[[], str],
    ) -> None:
        self._settings, self._pipe, self._models, self._available, self._warning = settings, pipe, models, available, warning
        self._began = int(time.time())
        self._length: int | None = None
        self._version = importlib.metadata.version("airlock")

    def routes(self) -> Mapping[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]:
        """Path and handler of each."""
        return {
            "/v1/health/live": self._live,
            "/v1/health/ready": self._ready,
            "/v1/models": self._list,
            "/v1/metadata": self._metadata,
            "/v1/manifest": self._manifest,
            "/v1/version": self._release,
            "/v1/license": self._license,
        }

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "health.response", "message": "Service is live.", "status": "live"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self._available():
            body = {"object": "health.response", "message": "Service is ready.", "status": "ready"}
            warning = self._warning()
            return web.json_response(body | ({"warning": warning} if warning else {}))
        return web.json_response({"object": "health.response", "message": "Service is not ready.", "status": "not_ready"}, status=503)

    async def _list(self, request: web.Request) -> web.Response:
        if not self._available():
            raise Refused(503, "the engine is not ready; poll /v1/health/ready", "ServiceUnavailable", headers={"Retry-After": "5"})
        if self._length is None:
            await self._learn_length()
        names = self._settings.model_names
        first = names[0]
        data: list[Json] = [
            {
                "id": name,
                "object": "model",
                "created": self._began,
                "owned_by": "airlock",
                "root": first,  # as a NIM has it: of several entries readers take the one whose root is its id
                "parent": None if name in names else first,  # an adapter's is the model that it is for
                "max_model_len": self._length or None,
                "permission": [],
            }
            for name in self._models()
        ]
        return web.json_response({"object": "list", "data": data})

    async def _learn_length(self) -> None:
        try:
            body = json.loads(await self._pipe.read("/v1/models"))
        except (ValueError, RecursionError):
            return
        entries = body.get("data") if isinstance(body, dict) else None
        entry = entries[0] if isinstance(entries, list) and entries else None
        length = entry.get("max_model_len") if isinstance(entry, dict) else None
        self._length = length if isinstance(length, int) else 0

    async def _metadata(self, request: web.Request) -> web.Response:
        s = self._settings
        own = {"profile_digest": s.profile_digest, "model_digest": s.model_digest, "simulated": s.simulated, "selected": s.why}
        return web.json_response(
            {
                "version": self._version,
                "assetInfo": [f"{s.model_names[0]}@{s.model_digest}"] if s.model_digest else [],
                "licenseInfo": self._licence_body(),
                "modelInfo": [{"shortName": f"{s.model_names[0]}:{s.model_ref}", "modelUrl": ""}],
                "repository_override": "",
                "selectedModelProfileId": s.profile_id,
                "profile_id": s.profile_id,
                "airlock": own | ({"expected": dict(s.expected)} if s.expected else {}),
            }
        )

    async def _manifest(self, request: web.Request) -> web.Response:
        return web.json_response({"manifest_file": self._settings.manifest, "repository_override": ""})

    async def _release(self, request: web.Request) -> web.Response:
        return web.json_response({"release": self._version, "api": self._version, "openapi_spec": OPENAPI})

    def _licence_body(self) -> Json:
        name, text = self._settings.license
        if not name:
            return {}
        # SHA-1 because the field is one: it names a text and protects nothing.
        sha = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        path = f"/opt/nim/{name}"
        return {"name": name, "path": path, "sha": sha, "size": len(text), "type": "file", "url": "", "content": text.decode("utf-8", "replace")}

    async def _license(self, request: web.Request) -> web.Response:
        body = self._licence_body()
        if not body:
            raise Refused(404, "the model comes without a licence text")
        return web.json_response(body)
