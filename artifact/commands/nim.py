"""`airlock nim profiles`: what the model manifest inside a mirrored NIM image offers, and what of each profile this registry has."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from artifact.errors import Invalid
from artifact.layers import Found
from artifact.manifest import Reference
from artifact.nim import NimManifest
from artifact.presence import Models, Presence, image_name, read_profiles
from artifact.remote import RemoteRegistry

EXAMPLE = "airlock nim profiles nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4 --registry https://registry.site"


def add_site(parser: argparse.ArgumentParser) -> None:
    """The options by which every command of NIM images reaches its registry."""
    parser.add_argument("--registry", default=os.environ.get("AIRLOCK_REGISTRY", ""), metavar="URL", help="this site's registry (AIRLOCK_REGISTRY)")
    parser.add_argument("--ca-file", default=os.environ.get("AIRLOCK_CA_FILE"), metavar="FILE", help="CA of its certificate (AIRLOCK_CA_FILE)")
    parser.add_argument("--platform", default="", metavar="OS/ARCH", help="which image of an index (linux/amd64 where it has one)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def open_site(args: argparse.Namespace) -> tuple[RemoteRegistry, Reference, Found, NimManifest]:
    """The registry, the image by its name here, and its model manifest; the key is AIRLOCK_KEY. Raises what reading an image raises."""
    if not args.registry:
        raise Invalid("no registry is named", expected="--registry URL or AIRLOCK_REGISTRY", reason="url")
    remote = RemoteRegistry(args.registry, os.environ.get("AIRLOCK_KEY", ""), ca_file=args.ca_file)
    image = image_name(args.image, remote.base_url.split("://", 1)[1])
    found, manifest = read_profiles(remote, image, args.platform)
    return remote, image, found, manifest


def size_text(value: int) -> str:
    """Bytes as a person reads them."""
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _row(presence: Presence) -> dict[str, object]:
    profile = presence.profile
    row: dict[str, object] = {"id": profile.id, "description": profile.description, "tags": profile.tags, "files": len(profile.files)}
    row |= {"here": not presence.missing, "bytes": presence.size}
    return row | {"missing": [{"uri": uri, "reason": why} for uri, why in presence.missing]}


def _here(presence: Presence) -> str:
    if not presence.profile.files:
        return "needs no files"
    if not presence.missing:
        return "whole"
    return f"{len(presence.missing)} of {len(presence.profile.files)} files missing" if presence.held else "nothing"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(argv: list[str]) -> int:
    """Prints the profiles in the manifest's order; raises NotFound for an image without a model manifest."""
    parser = argparse.ArgumentParser(
        prog="airlock nim profiles",
        description="Read the model manifest out of a mirrored NIM image and tell what of each profile is in this registry.",
        epilog=f"example: {EXAMPLE}; the key comes from AIRLOCK_KEY; exit 3: no such image, or one without a model manifest",
    )
    parser.add_argument("image", metavar="IMAGE", help="NAME:TAG or NAME@DIGEST, as this registry has it")
    add_site(parser)
    parser.add_argument("--manifest", action="store_true", help="print the manifest itself, byte for byte, and nothing else")
    args = parser.parse_args(argv)
    remote, image, found, manifest = open_site(args)
    if args.manifest:
        sys.stdout.buffer.write(found.raw)
        return 0
    models = Models(remote)
    shown = [models.of(profile) for profile in manifest.profiles]
    if args.json:
        facts = {"image": str(image), "digest": found.image, "manifest": found.path, "layer": found.layer, "shape": manifest.shape}
        print(json.dumps(facts | {"profiles": [_row(p) for p in shown]}))
        return 0
    rows = [("ID", "DESCRIPTION", "FILES", "SIZE", "IN THIS REGISTRY")]
    rows += [(p.profile.id, p.profile.description, str(len(p.profile.files)), size_text(p.size), _here(p)) for p in shown]
    print(f"{image}: {found.path}, layer {found.layer}\n{_table(rows)}")
    return 0
