"""The places, ports, names and words of one run, shared by the acts of the story; holds keys in memory only."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from demo.stage import BIN, ROOT, Stage, free_port

AIRLOCK = str(BIN / "airlock")
ENGINE = ROOT / "build" / "engines" / "vllm"
MINILM_DIR = ROOT / "build" / "minilm"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_NAME = "hf/sentence-transformers/all-minilm-l6-v2"
LLAMA = "acme/tiny"
GPU_ONLY = "acme/gpu-only"
TEXTS = ("The bundle crossed the gap on a disk.", "A cat sleeps in the sun.")


@dataclass
class World:
    """One run: `connected/`, `medium/` and `closed/` under the stage's folder."""

    stage: Stage
    question: str = "What is the word of the day?"
    nonce: str = field(default_factory=lambda: secrets.token_hex(3))
    registry_port: int = field(default_factory=free_port)
    docker_port: int = field(default_factory=free_port)
    hub_port: int = field(default_factory=free_port)
    closed_port: int = field(default_factory=free_port)
    api_port: int = field(default_factory=free_port)
    push_key: str = ""
    key: str = ""
    minilm_ref: str = "main"
    minilm_name: str = MINILM_NAME
    air_gap: bool = False
    instance: str = ""

    @property
    def answer(self) -> str:
        """The sentence that the trained model must say; it cannot be known before this run."""
        return f"The word of the day is {self.nonce}."

    @property
    def connected(self) -> Path:
        """The connected side's folder."""
        return self.stage.folder / "connected"

    @property
    def issuer(self) -> Path:
        """The private key of the connected side's issuer of entitlements."""
        return self.connected / "issuer.pem"

    @property
    def medium(self) -> Path:
        """The folder that is carried across."""
        return self.stage.folder / "medium"

    @property
    def closed(self) -> Path:
        """The closed side's folder."""
        return self.stage.folder / "closed"

    @property
    def cache(self) -> Path:
        """The runtime's cache volume, owned by uid 1000."""
        return self.closed / "cache"

    @property
    def registry(self) -> str:
        """The connected side's Airlock registry."""
        return f"http://127.0.0.1:{self.registry_port}"

    @property
    def site(self) -> str:
        """The closed side's Airlock registry."""
        return f"http://127.0.0.1:{self.closed_port}"

    @property
    def api(self) -> str:
        """The runtime's API."""
        return f"http://127.0.0.1:{self.api_port}"
