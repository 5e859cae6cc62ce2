"""Streamed chat requests against a server that speaks OpenAI's API, so many at once, timed; it judges nothing."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from artifact.errors import Invalid, Unavailable
from artifact.transport import clean
from runtime.slo import Sample

WORDS = (
    "the",
    "registry",
    "keeps",
    "every",
    "model",
    "behind",
    "its",
    "gate",
    "and",
    "a",
    "node",
    "reads",
    "what",
    "it",
    "may",
    "while",
    "time",
    "runs",
)
MEMORY = re.compile(r'^airlock_gpu_memory_bytes\{[^}\n]*uuid="([\w.:/-]{1,80})",of="(\w{1,20})"\} (\d{1,18})$', re.MULTILINE)
PAGE = 16 << 20
MOST = 1 << 31  # tokens of one answer
NO_JSON = (ValueError, RecursionError)  # what reading JSON of somebody else raises
NO_CHUNK = (*NO_JSON, LookupError, TypeError, AttributeError, OverflowError, HttpProcessingError)


@dataclass(frozen=True)
class Target:
    """Where to ask and for what: base URL, model, tokens of an answer, words of a prompt, fields for the body, key, seconds for one request."""

    base: str
    model: str = ""
    max_tokens: int = 128
    prompt_words: int = 64
    more: Mapping[str, object] = field(default_factory=dict)
    key: str = field(default="", repr=False)
    timeout_s: float = 300.0


def open_session(target: Target) -> aiohttp.ClientSession:
    """The connections of a run, as many as are wanted; one that reads no proxy from the environment."""
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    timeout = aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=10)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=headers)


async def page(session: aiohttp.ClientSession, target: Target, path: str) -> bytes:
    """What a GET answers with 200, empty for another status; raises Unavailable where nobody answers."""
    try:
        async with session.get(target.base + path, allow_redirects=False) as answer:
            return await answer.content.read(PAGE) if answer.status == 200 else b""
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise Unavailable(f"{target.base} does not answer: {error}", do="start the runtime, or say --url", reason="connection") from error


async def model_of(session: aiohttp.ClientSession, target: Target) -> str:
    """The first model that the server names; raises Unavailable, Invalid."""
    try:
        found = json.loads(await page(session, target, "/v1/models"))["data"][0]["id"]
        if not isinstance(found, str) or not found.isprintable():
            raise TypeError
        return found
    except (*NO_JSON, LookupError, TypeError) as error:
        raise Invalid(f"{target.base} names no model", expected="an OpenAI API whose engine is ready", do="wait for /v1/health/ready") from error


async def memory(session: aiohttp.ClientSession, target: Target) -> dict[str, dict[str, int]]:
    """Bytes by GPU and kind (idle, used, peak, total), as the server's metrics tell; empty where they do not."""
    found: dict[str, dict[str, int]] = {}
    for uuid, kind, number in MEMORY.findall((await page(session, target, "/metrics")).decode("utf-8", "replace")):
        found.setdefault(uuid, {})[kind] = int(number)
    return found


def body(target: Target, number: int) -> dict[str, object]:
    """The request of that number: every prompt begins in another way, so that no cache of prefixes answers for the engine."""
    drawn = random.Random(number)  # noqa: S311 - words, no secrets
    prompt = f"{number} " + " ".join(drawn.choice(WORDS) for _ in range(target.prompt_words))
    asked: dict[str, object] = {"model": target.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": target.max_tokens}
    return {**asked, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0, **target.more}


async def one(session: aiohttp.ClientSession, target: Target, number: int) -> Sample:
    """One request, timed; whatever fails is an error of the sample."""
    began, times, counted = time.perf_counter(), list[float](), 0
    try:
        async with session.post(target.base + "/v1/chat/completions", json=body(target, number), allow_redirects=False) as answer:
            if answer.status != 200:
                return Sample(error=f"{answer.status}: {clean((await answer.content.read(2000)).decode('utf-8', 'replace'))}")
            async for line in answer.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                frame = json.loads(line[6:])
                if frame.get("error"):
                    return Sample(error=clean(frame["error"]))
                if frame.get("usage"):
                    counted = int(frame["usage"]["completion_tokens"])
                    if not 0 <= counted < MOST:
                        raise ValueError
                if frame.get("choices"):
                    delta = frame["choices"][0].get("delta") or {}
                    if any(delta.get(word) for word in ("content", "reasoning_content", "reasoning", "tool_calls")):
                        times.append(time.perf_counter())
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return Sample(error=clean(f"{type(error).__name__}: {error}"))
    except NO_CHUNK:
        return Sample(error="the answer is no stream of a chat's chunks")
    if not times:
        return Sample(error="the answer held no token")
    gaps = tuple(b - a for a, b in pairwise(times))
    return Sample(times[0] - began, gaps, time.perf_counter() - began, counted or len(times))


async def run(session: aiohttp.ClientSession, target: Target, streams: int, each: int, start: int) -> tuple[list[Sample], float]:
    """So many streams at once, each with so many requests one after the other; all samples and the seconds that it took."""
    began = time.perf_counter()

    async def stream(number: int) -> list[Sample]:
        return [await one(session, target, start + number * each + i) for i in range(each)]

    found = await asyncio.gather(*(stream(n) for n in range(streams)))
    return [sample for samples in found for sample in samples], time.perf_counter() - began
