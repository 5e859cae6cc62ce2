"""Words and forms of the OpenAPI document: schemas of the fields, parameters, operations with the refusals that each may answer; pure.

Here so that registry/openapi.py holds the paths alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$"}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[a-z0-9]+([._/-][a-z0-9]+)*$"}
WORD: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[^\\x00-\\x1f\\ud800-\\udfff]+$"}
PRINTABLE = "^[^\\x00-\\x1f\\x7f\\ud800-\\udfff]*$"
ORG: Schema = {"type": "string", "minLength": 1, "maxLength": 100, "pattern": "^[a-z0-9]+([_-][a-z0-9]+)*$"}
PERSON: Schema = {"type": "string", "minLength": 1, "maxLength": 100, "pattern": PRINTABLE}
TEXTS: Schema = {"type": "array", "items": TEXT}
OBJECT: Schema = {"type": "object"}
REFUSALS = {
    "400": "The input breaks a grammar or a limit",
    "401": "No key, or one that proves nothing, is expired or revoked",
    "403": "The key may not do this; the reason says what would allow it",
    "404": "It does not exist for this key",
    "409": "Somebody else holds or changed it, or a rule forbids it now",
    "413": "The body is too large",
    "429": "Too many failed logins from this network, or changes by this key; see Retry-After",
    "503": "The database or the store does not answer now; retry",
}


def object_of(_required: str = "", **properties: Schema) -> Schema:
    """An object schema; the fields named in `_required` (with spaces between) must be there, all of them for `*`."""
    names = list(properties) if _required == "*" else _required.split()
    return {"type": "object", "properties": properties, **({"required": names} if names else {})}


def only(_required: str = "", **properties: Schema) -> Schema:
    """An object schema that takes no other fields."""
    return {**object_of(_required, **properties), "additionalProperties": False}


def list_of(**properties: Schema) -> Schema:
    """The schema of a list of objects that have all these fields."""
    return {"type": "array", "items": object_of("*", **properties)}


def query(name: str, schema: Schema, required: bool = False) -> dict[str, Any]:
    """A parameter of the query."""
    return {"name": name, "in": "query", "required": required, "schema": schema}


def path(name: str, schema: Schema) -> dict[str, Any]:
    """A parameter in the path; a name may hold slashes."""
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": "Slashes may be sent as they are."}


def operation(tag: str, summary: str, answer: Schema, *, params: tuple[dict[str, Any], ...] = (), body: Schema | None = None) -> dict[str, Any]:
    """An operation that answers 200 with `answer`, or one of the refusals."""
    out: dict[str, Any] = {"tags": [tag], "summary": summary, "responses": {"200": {"description": "Done", "content": json_body(answer)}}}
    out["responses"] |= {status: {"$ref": f"#/components/responses/{status}"} for status in REFUSALS}
    if params:
        out["parameters"] = list(params)
    if body is not None:
        out["requestBody"] = {"required": True, "content": json_body(body)}
    return out


def json_body(schema: Schema) -> dict[str, Any]:
    """The content of a JSON body."""
    return {"application/json": {"schema": schema}}
