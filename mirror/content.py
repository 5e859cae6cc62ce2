"""What the JSON files of a model say about paths: refused at ingest where an engine would follow them out of its directory (CVE-2026-9856 and kin).

It judges names only; whether a model is good is not its question. Files are read from the store, after their bytes are verified.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from artifact.disk import Disk
from artifact.errors import Invalid
from artifact.manifest import check_path
from artifact.store import File

MAX_JSON = 64 * 1024 * 1024


def check_model(files: Iterable[File], disk: Disk) -> None:
    """Refuses shard names and chat template names that are no plain paths; raises Invalid naming the file."""
    for file in files:
        name = file.path.rsplit("/", 1)[-1]
        if name.endswith(".index.json"):
            shards = _json(file, disk).get("weight_map")
            for shard in set(map(str, shards.values())) if isinstance(shards, dict) else ():
                _plain(shard, file, "weight_map")
        elif name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
            for template in _template_names(_json(file, disk).get("chat_template")):
                if "/" in template:
                    raise Invalid(f"chat_template of {file.path} is named {template[:80]!r}", expected="a name without '/'", reason="path")
                _plain(template, file, "chat_template")


def _template_names(value: object) -> list[str]:
    if isinstance(value, dict):
        return [str(key) for key in value]
    if isinstance(value, list):
        return [str(entry.get("name", "default")) for entry in value if isinstance(entry, dict)]
    return []


def _plain(name: str, file: File, field: str) -> None:
    try:
        check_path(name)
    except Invalid as error:
        raise Invalid(
            f"{field} of {file.path} names {name[:80]!r}", expected="paths inside the model", do="do not mirror this model", reason="path"
        ) from error


def _json(file: File, disk: Disk) -> dict[str, object]:
    raw = disk.read(file.digest, MAX_JSON)
    try:
        # Not parse_json: real models repeat keys and hold NaN, and what counts here is what an engine's lenient parser would see.
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{file.path} is not JSON", expected="a JSON object", reason="content") from error
    return value if isinstance(value, dict) else {}
