"""Model cards: YAML from outside read safely, the facts layer of a revision (docs/format.md section 3) made from its README, and what of its files
the Hub's clients do not take; no I/O.

Must not be imported by the runtime, which has no YAML.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

import yaml

from artifact.errors import Invalid
from artifact.manifest import canonical_json
from artifact.store import File

README = "README.md"
MAX_CARD = 64 * 1024  # of a README, how much of its beginning is looked at
HUB_LARGEST = 50_000_000_000  # huggingface_hub refuses to download a larger file over plain HTTP (its constants.py: MAX_HTTP_DOWNLOAD_SIZE)


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases, duplicate keys or implicit dates: what a person reads is what is meant."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not accepted", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {str(key)[:60]!r} is repeated or is not a word", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str, what: str) -> object:
    """One YAML document from untrusted text by the safe loader; raises Invalid naming the line."""
    try:
        # _Loader is a SafeLoader: it constructs nothing but plain values.
        return yaml.load(text, Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise Invalid(
            f"{what} is not accepted as YAML: {' '.join(str(error).split())[:300]}", expected="plain YAML without aliases", reason="plan"
        ) from error


def facts_of(source: str, readme: bytes) -> bytes:
    """The facts layer: source, and licence, card and tags as the beginning of the README of this very commit states them."""
    card = card_of(readme)
    facts: dict[str, object] = {"schema": 1, "source": source}
    if card:
        facts["card"] = card
    if isinstance(card.get("license"), str):
        facts["license"] = card["license"]
    tags = card.get("tags")
    if isinstance(tags, list):
        facts["tags"] = [t for t in tags if isinstance(t, str)]
    return canonical_json(facts)


def hub_warnings(files: Iterable[File]) -> list[str]:
    """What to tell of each file that hub clients will refuse to download, with the way out."""
    return [
        f"{file.path} has {file.size} bytes, and huggingface_hub, transformers and vLLM by repo id refuse files above 50 GB: save the model in "
        "smaller shards, or let airlock runtime or an OCI client pull it"
        for file in files
        if file.size > HUB_LARGEST
    ]


def head_of(readme: bytes) -> str | None:
    """The YAML head of a model card, None where there is none."""
    text = readme[:MAX_CARD].decode("utf-8", "replace").replace("\r\n", "\n")
    if not text.startswith("---\n") or "\n---" not in text[3:]:
        return None
    return text[4 : text.index("\n---", 3) + 1]


def card_of(readme: bytes) -> dict[str, object]:
    """The YAML head of a model card as plain JSON values; a head that cannot be read is an absent one."""
    head = head_of(readme)
    if head is None:
        return {}
    try:
        plain = _plain_value(load_yaml(head, "the model card"))
    except (Invalid, RecursionError, ValueError):  # ValueError: a number of more digits than are written out
        return {}
    return plain if isinstance(plain, dict) else {}


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def _plain_value(value: object) -> object:
    if isinstance(value, dict):
        return {_text(str(k)): _plain_value(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain_value(v) for v in value]
    if isinstance(value, str):
        return _text(value)
    whole = isinstance(value, int) and value.bit_length() < 64  # a bool among them
    if value is None or whole or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
