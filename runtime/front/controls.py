"""A request as it came, checked and put into the engine's words; pure. Nothing is dropped in silence: what an engine does not do is refused by name.

What is checked is what is sent: the body is written anew from the values that were looked at, so no second reading by the engine can differ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from runtime.front.errors import Json, Refused
from runtime.front.vocabulary import (
    EMBEDDINGS,
    FIELDS,
    GUIDED,
    INCLUDED,
    LABELS,
    NESTED,
    NEUTRAL,
    OLDER,
    PARTS,
    PATHS,
    RANKING,
    RESPONSES,
    STREAMED,
    TEMPLATE_KEYS,
)

# Signs of a body that bound what parsing it costs, for the event loop and so every other stream waits for it: a million numbers take 0.2 s, keys ten
# times as much, objects the most memory. All are far above what the longest prompt or the largest batch holds.
SIGNS = ((b",[{", 1_000_000, "values"), (b":", 300_000, "keys"), (b"{", 200_000, "objects"))
MAX_TEXTS = 2048  # prompts or inputs of one request, times its `n`: OpenAI's bound for embeddings
MAX_CHOICES = 128  # `n`: one request must not take the whole engine; OpenAI's bound
MAX_STRUCTURE = 1 << 18  # characters of a schema, a grammar or an expression that the engine compiles
MAX_PASSAGES = 512  # as NIM's reranker
DIGITS = bytes(0x30 if chr(byte).isdigit() else 0x20 for byte in range(128)) + b" " * 128
DATA_URL = re.compile(r"data:(image|video|audio)/[A-Za-z0-9.+-]{1,64};base64,", re.IGNORECASE)
Models = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Asked:
    """A checked request: the name that the caller used, the engine's path and body, whether it streams, and what the answer needs (`store`, …)."""

    model: str
    path: str
    body: Json
    streamed: bool = False
    store: bool = False
    background: bool = False
    previous: str = ""


def _constant(text: str) -> object:
    raise Refused(400, f"the body holds {text}, which is no JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused(400, f"the number {text[:40]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 63:
        raise Refused(400, f"the number {text[:40]} is too large")
    return int(text)


def _once(pairs: list[tuple[str, object]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Refused(400, "a key stands twice in the body")
    return found


def parse_body(raw: bytes) -> Json:
    """The JSON object of a request; raises Refused for anything else, for NaN, numbers beyond 64 bit, keys that stand twice and lone surrogates."""
    for signs, most, what in SIGNS:
        if sum(raw.count(sign) for sign in signs) > most:
            raise Refused(413, f"the body holds more than {most} {what}")
    whole = _whole if b"0" * 19 in raw.translate(DIGITS) else None
    try:
        body = json.loads(raw, parse_constant=_constant, parse_float=_number, parse_int=whole, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise Refused(400, "the body is not valid JSON") from e
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    return body


def written(body: Json) -> bytes:
    """The body for the engine; raises Refused where a text is no Unicode (a lone surrogate) or the nesting is too deep to write."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as e:
        raise Refused(400, "a text of the body is no Unicode: it holds half of a surrogate pair") from e
    except RecursionError as e:
        raise Refused(400, "the body is nested too deeply") from e


def prepare(route: str, body: Json, models: Models, engine: str = "vllm", images: int = 16) -> Asked:
    """The checked request in the engine's words; raises Refused (400 naming the field, 404 for another model, 501 where the engine lacks the route).

    `models` says for each name what the engine's body says instead (Launch.models); the first is meant where none is given.
    """
    asked = body.get("model")
    if asked is None:
        asked = next(iter(models))
    name = _named(asked, route, models)
    if not isinstance(asked, str) or name not in models:
        shown = str(asked)[:200]
        raise Refused(404, f"The model `{shown}` does not exist. Valid names: {', '.join(models)}.", "NotFoundError", "model")
    known = FIELDS[engine].get(route)
    if known is None:
        raise Refused(501, f"The engine {engine} does not support {route}.")
    body = {k: v for k, v in body.items() if v is not None}
    _extension(body, known)
    if route in STREAMED:
        _guided(body, engine, route)
    if route == EMBEDDINGS:
        _embedding(body, engine)
    for word in [w for w in body if w not in known]:
        if word not in LABELS and body[word] not in NEUTRAL.get(word, ()):
            raise _unsupported(word, engine, route)
        del body[word]
    _nested(body, engine, route)
    _bounds(body)
    if route != RESPONSES:
        _texts(body)
    _messages(body, route, images)
    stored = {"store": False, "background": False, "previous": ""}
    if route == RESPONSES:
        stored = _stateful(body)
    elif route == RANKING:
        body = _ranking(body, engine)
    streamed = body.get("stream", False)
    if not isinstance(streamed, bool):
        raise Refused(400, "stream is neither true nor false", param="stream")
    return Asked(asked, PATHS.get(engine, {}).get(route, route), {**body, **models[name]}, streamed, **stored)  # type: ignore[arg-type]


def _named(asked: object, route: str, models: Models) -> str:
    """The served name that a request means: NIM's embedding models have an alias for each input_type, for clients that cannot send one."""
    name = asked if isinstance(asked, str) else ""
    if route != EMBEDDINGS or name in models:
        return name
    return name.removesuffix("-query") if name.endswith("-query") else name.removesuffix("-passage")


def _unsupported(word: str, engine: str, route: str) -> Refused:
    more = {
        "functions": "; use tools",
        "function_call": "; use tool_choice",
        "agent_hints": "; no router stands before this engine",
        "guided_decoding_backend": "; the engine chooses it",
    }.get(word, "")
    return Refused(400, f"{word[:80]!r} is not supported by {engine} on {route}{more}", "BadRequestError", word[:80])


def _nested(body: Json, engine: str, route: str) -> None:
    """The words inside of fields, as the fields themselves: known, asking for nothing, or refused by name."""
    for word in NESTED.keys() & body.keys():
        given = body[word]
        if not isinstance(given, dict):
            raise Refused(400, f"{word} is not an object", param=word)
        for key in (k for k, v in given.items() if k not in NESTED[word] and v is not None):
            if given[key] not in NEUTRAL.get(f"{word}.{key}", ()):
                raise _unsupported(f"{word}.{key}", engine, route)
        body[word] = {k: v for k, v in given.items() if k in NESTED[word]}
    included = body.get("include", [])
    if not isinstance(included, list) or any(entry not in INCLUDED for entry in included):
        raise Refused(400, f"include takes {', '.join(INCLUDED)} alone", param="include")
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") != "function":
        raise Refused(400, f"a tool_choice of type {str(choice.get('type'))[:40]!r} is not supported; name a function", param="tool_choice")


def _extension(body: Json, known: Collection[str]) -> None:
    """`nvext` and the older spellings, beside the fields that they stand for; one that the engine lacks stays as the caller wrote it."""
    extension = body.pop("nvext", None)
    if extension is not None and not isinstance(extension, dict):
        raise Refused(400, "nvext is not an object", param="nvext")
    for word, value in (extension or {}).items():
        if value is None:
            continue
        if word in body and body[word] != value:
            raise Refused(400, f"{word[:80]!r} stands in nvext and beside it with another value", param=f"nvext.{word[:80]}")
        body[word] = value
    for old, new in OLDER.items():
        if old in body and new in known:
            value = body.pop(old)
            if body.setdefault(new, value) != value:
                raise Refused(400, f"{old} and {new} say different things", param=old)


def _guided(body: Json, engine: str, route: str) -> None:
    """guided_json and its kin in the engine's words."""
    found = {new: body.pop(old) for old, new in GUIDED.items() if old in body}
    if not found:
        return
    where = "structured_outputs" if engine == "vllm" else "response_format"
    if where in body or "response_format" in body or ("text" in body and route == RESPONSES):
        raise Refused(400, "the form of the answer is asked for twice: guided_… and " + where, param=where)
    if engine == "vllm":
        body["structured_outputs"] = found
        return
    if len(found) != 1:
        raise Refused(400, "one guided_… field at a time is supported by this engine", param="guided_json")
    (kind, value), *_ = found.items()
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise Refused(400, "guided_choice is no list of texts", param="guided_choice")
        kind, value = "regex", "(" + "|".join(re.escape(v) for v in value) + ")"
    word = {"regex": "regex", "grammar": "ebnf"}.get(kind)
    if kind == "json":
        schema = _schema(value) if isinstance(value, str) else value
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "guided", "schema": schema}}
    elif kind == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif word is None:
        raise _unsupported("guided_" + kind, engine, route)
    elif engine == "sglang":
        body[word] = value
    else:
        body["response_format"] = {"type": word, word: value}


def _schema(text: str) -> Json:
    try:
        return parse_body(text.encode("utf-8", "replace"))
    except Refused as e:
        raise Refused(400, f"guided_json is no schema: {str(e).replace('the body', 'it')}", param="guided_json") from e


def _truncation(body: Json, engine: str) -> None:
    """NIM's `truncate`: NONE refuses what is too long, END and START cut it there."""
    truncate = body.pop("truncate", "NONE")
    if truncate == "NONE":
        return
    if truncate not in ("END", "START") or engine != "vllm":
        raise Refused(
            400,
            f"truncate {str(truncate)[:20]!r} is not supported by {engine}; use {'NONE, END or START' if engine == 'vllm' else 'NONE'}",
            param="truncate",
        )
    if twice := {"truncate_prompt_tokens", "truncation_side"} & body.keys():
        raise Refused(400, f"truncate and {min(twice)} both say where to cut", param="truncate")
    body["truncate_prompt_tokens"] = -1
    body["truncation_side"] = "right" if truncate == "END" else "left"


def _embedding(body: Json, engine: str) -> None:
    kind = body.pop("input_type", "passage")
    if kind not in ("query", "passage"):
        raise Refused(400, f"input_type {str(kind)[:20]!r} is neither query nor passage", param="input_type")
    _truncation(body, engine)
    texts = body.get("input")
    if texts in ("", [], None) or (isinstance(texts, list) and "" in texts):
        raise Refused(400, "input holds nothing to embed", param="input")


def _ranking(body: Json, engine: str) -> Json:
    """NIM's ranking request as the engines' rerank request."""
    query, passages = body.get("query"), body.get("passages")
    if not isinstance(query, dict) or not isinstance(query.get("text"), str):
        raise Refused(400, 'query is not {"text": "…"}', param="query")
    if unknown := [k for k in query if k != "text"]:
        raise Refused(400, f"{unknown[0][:80]!r} of query is not supported: this model ranks texts", param="query")
    if not isinstance(passages, list) or not 0 < len(passages) <= MAX_PASSAGES:
        raise Refused(400, f"passages is not a list of 1 to {MAX_PASSAGES} entries", param="passages")
    texts = []
    for i, passage in enumerate(passages):
        if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
            raise Refused(400, f'passage {i} is not {{"text": "…"}}', param="passages")
        if set(passage) != {"text"}:
            word = next(k for k in passage if k != "text")
            raise Refused(400, f"{word[:80]!r} of passage {i} is not supported: this model ranks texts", param="passages")
        texts.append(passage["text"])
    made: Json = {"query": query["text"], "documents": texts, "truncate": body.get("truncate", "NONE")}
    _truncation(made, engine)
    if engine == "vllm":
        made["use_activation"] = False  # NIM tells logits, not what a sigmoid makes of them
    return made


def _bounds(body: Json) -> None:
    for word in ("n", "best_of"):
        n = body.get(word, 1)
        if not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
            raise Refused(400, f"{word} is not a whole number from 1 to {MAX_CHOICES}", param=word)
    for word in ("structured_outputs", "response_format", "text", "regex", "ebnf"):
        if word in body and len(json.dumps(body[word])) > MAX_STRUCTURE:
            raise Refused(400, f"{word} is longer than {MAX_STRUCTURE} characters", param=word)
    given = body.get("chat_template_kwargs")
    if given is not None:
        if not isinstance(given, dict) or not all(isinstance(v, str | int | float | bool) for v in given.values()):
            raise Refused(400, "chat_template_kwargs is no object of simple values", param="chat_template_kwargs")
        if bad := TEMPLATE_KEYS & set(given):
            raise Refused(400, f"{min(bad)!r} in chat_template_kwargs is not a caller's to set", param="chat_template_kwargs")


def _texts(body: Json) -> None:
    """Texts and tokens, as many as one request may hold; a list of numbers is one. vLLM takes conversations there too, and fetches what they name."""
    choices = max(n for n in (body.get("n", 1), body.get("best_of", 1), 1) if isinstance(n, int))
    for word in ("prompt", "input"):
        given = body.get(word)
        entries = given if isinstance(given, list) else [given] if given is not None else []
        if not all(isinstance(e, str | int) or (isinstance(e, list) and all(isinstance(n, int) for n in e)) for e in entries):
            raise Refused(400, f"{word} is neither a text nor tokens, nor a list of them", param=word)
        count = len(entries) if entries and not isinstance(entries[0], int) else 1
        if count * choices > MAX_TEXTS:
            raise Refused(400, f"{word} holds {count} texts, n is {choices}; together at most {MAX_TEXTS} are taken", param=word)


def _messages(body: Json, route: str, images: int) -> None:
    """Content parts: known types with known keys only, what is seen or heard as data: URLs only, so that the engine fetches nothing."""
    seen, where = 0, "input" if route == RESPONSES else "messages"
    turns = body.get(where)
    if turns is None or (isinstance(turns, str) and route == RESPONSES):
        return
    if not isinstance(turns, list):
        raise Refused(400, f"{where} is not a list", param=where)
    for turn in turns:
        if not isinstance(turn, dict):
            raise Refused(400, f"an entry of {where} is not an object", param=where)
        if _kind(turn) in PARTS:
            seen += _part(turn, where)
        for key in ("content", "output"):
            content = turn.get(key)
            if isinstance(content, list):
                seen += sum(_part(part, where) for part in content)
            elif content is not None and not isinstance(content, str):
                raise Refused(400, f"the {key} of a message is neither text nor a list of parts", param=where)
    if seen > images:
        raise Refused(400, f"the request holds {seen} images, videos or sounds; at most {images} are taken", param=where)


def _kind(part: object) -> str:
    found = part.get("type") if isinstance(part, dict) else None
    return found if isinstance(found, str) else ""


def _part(part: object, where: str) -> int:
    """1 where the part is something seen or heard, else 0."""
    if isinstance(part, str):
        return 0
    kind = _kind(part)
    if not isinstance(part, dict) or kind not in PARTS:
        raise Refused(400, f"a content part of type {kind[:40]!r} is not supported", param=where)
    keys, link = PARTS[kind]
    if unknown := [k for k in part if k != "type" and k not in keys]:
        raise Refused(400, f"{unknown[0][:80]!r} in a content part of type {kind} is not supported", param=where)
    if not link:
        return int(kind == "input_audio")
    value = part.get(link)
    if isinstance(value, dict):
        if unknown := [k for k in value if k not in ("url", "detail")]:
            raise Refused(400, f"{unknown[0][:80]!r} in {link} is not supported", param=where)
        value = value.get("url")
    if not isinstance(value, str) or not DATA_URL.match(value):
        raise Refused(400, f"{link} is no data: URL (data:image/png;base64,…): nothing is fetched for a caller here", param=where)
    return 1


def _stateful(body: Json) -> dict[str, object]:
    """What of a responses request is the front's to keep; the engine stores nothing."""
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = str(tool.get("type"))[:40] if isinstance(tool, dict) else "unknown"
            raise Refused(400, f"a tool of type {kind!r} is not supported; functions are", param="tools")
    found = {word: body.pop(word, default) for word, default in (("store", True), ("background", False), ("previous_response_id", ""))}
    for word in ("store", "background"):
        if not isinstance(found[word], bool):
            raise Refused(400, f"{word} is neither true nor false", param=word)
    if not isinstance(found["previous_response_id"], str):
        raise Refused(400, "previous_response_id is no text", param="previous_response_id")
    if found["background"] and body.get("stream"):
        raise Refused(400, "background with stream is not supported; poll GET /v1/responses/{id}", param="background")
    if found["background"] and not found["store"]:
        raise Refused(400, "background needs store", param="store")
    body["store"] = False
    return {"store": found["store"], "background": found["background"], "previous": found["previous_response_id"]}


def renamed(data: bytes, engine_name: str, asked: str) -> bytes:
    """A JSON text with the engine's model name replaced by the one asked for; inside JSON strings the quotes are escaped and never match."""
    old, new = json.dumps(engine_name).encode(), json.dumps(asked).encode()
    for gap in (b"", b" "):
        data = data.replace(b'"model":' + gap + old, b'"model":' + gap + new)
    return data


def ranked(data: bytes) -> bytes:
    """NIM's rankings of an engine's rerank answer, best first; raises Refused (502) where it is none."""
    try:
        found = json.loads(data)
        entries = found["results"] if isinstance(found, dict) else found
        rankings = [{"index": int(e["index"]), "logit": float(e["relevance_score"] if "relevance_score" in e else e["score"])} for e in entries]
        usage = found.get("usage") if isinstance(found, dict) else None
    except (ValueError, KeyError, TypeError) as e:
        raise Refused(502, "the engine's answer is no ranking", "BadGateway") from e
    rankings.sort(key=lambda r: -r["logit"])
    return json.dumps({"rankings": rankings, "usage": usage}).encode()
