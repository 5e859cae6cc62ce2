"""The clients that the demo runs inside the closed side: one HTTP probe, one TCP connection, the unmodified openai SDK; prints one JSON object."""

from __future__ import annotations

import json
import socket
import sys

from demo.stage import probe_url


def connect(host: str, port: str) -> int:
    """0 when a TCP connection can be made; else prints why not."""
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        print(json.dumps({"connected": False, "why": str(error)}))
        return 1
    print(json.dumps({"connected": True}))
    return 0


def chat(url: str, model: str, question: str) -> int:
    """One chat, whole and as a stream, and the list of models, through the openai SDK."""
    from openai import OpenAI

    api = OpenAI(base_url=url + "/v1", api_key="none", timeout=120, max_retries=0)
    names = [m.id for m in api.models.list()]
    name = model or names[0]
    whole = api.chat.completions.create(model=name, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=64)
    stream = api.chat.completions.create(model=name, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=64, stream=True)
    pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
    answer = {"models": names, "answer": whole.choices[0].message.content, "streamed": "".join(pieces), "events": len(pieces)}
    print(json.dumps(answer))
    return 0


def embed(url: str, model: str, *texts: str) -> int:
    """Embeddings of some texts through the openai SDK."""
    from openai import OpenAI

    api = OpenAI(base_url=url + "/v1", api_key="none", timeout=120, max_retries=0)
    name = model or next(iter(api.models.list())).id
    rows = api.embeddings.create(model=name, input=list(texts), encoding_format="float")
    print(json.dumps({"model": name, "embeddings": [row.embedding for row in rows.data]}))
    return 0


def main(argv: list[str]) -> int:
    """probe URL | connect HOST PORT | chat URL MODEL QUESTION | embed URL MODEL TEXT…"""
    word, *rest = argv
    if word == "probe":
        return 0 if probe_url(rest[0]) else 1
    if word == "connect":
        return connect(rest[0], rest[1])
    if word == "chat":
        return chat(rest[0], rest[1], rest[2])
    return embed(rest[0], rest[1], *rest[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
