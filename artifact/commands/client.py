"""`airlock client config`: what containerd, podman, docker, hf, ngc and others need to pull from this registry under the names they use."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from pathlib import Path

from artifact.clients import NAMES, TOOLS, File, Site, setup
from artifact.errors import Conflict, Invalid

EXAMPLE = "AIRLOCK_KEY=nvapi-… airlock client config containerd podman --registry https://registry.site --ca ca.crt --to node/"
MAX_CA = 4 * 1024 * 1024  # the largest public bundles have a quarter of that


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airlock client config",
        description="Print or write the configuration of clients, so that manifests that say nvcr.io/nim/… run unchanged.",
        epilog=f"example: {EXAMPLE}\nThe key comes from AIRLOCK_KEY; without it a placeholder stands there, or the login command is told.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tool", nargs="+", choices=TOOLS, metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument("--registry", default=os.environ.get("AIRLOCK_REGISTRY", ""), metavar="URL", help="this site's registry (AIRLOCK_REGISTRY)")
    parser.add_argument("--ngc", default="", metavar="URL", help="its NGC listener, for ngc")
    ca_file = os.environ.get("AIRLOCK_CA_FILE", "")
    parser.add_argument("--ca", default=ca_file, metavar="FILE", help="PEM of the authority that signed its certificate (AIRLOCK_CA_FILE)")
    parser.add_argument("--name", action="append", default=[], metavar="HOST", help=f"a name whose images are kept here ({', '.join(NAMES)})")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write files below DIR (etc/… and home/…) instead of printing them")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


def _authority(given: str) -> str:
    """The text of a file of certificates; raises Invalid."""
    with Path(given).open("rb") as file:
        raw = file.read(MAX_CA + 1)
    if len(raw) > MAX_CA or b"-----BEGIN CERTIFICATE-----" not in raw or not raw.isascii() or b"PRIVATE KEY" in raw:
        raise Invalid(f"{given} is no file of certificates", expected="PEM, without a private key", reason="ca")
    return raw.decode("ascii")


def _appear(temporary: Path, path: Path) -> None:
    """Gives a whole file its name, by a link since that, unlike a rename, replaces nothing; raises FileExistsError."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as that of a stick
        if os.path.lexists(path):
            raise FileExistsError from None
        temporary.replace(path)


def _write(folder: Path, file: File) -> None:
    """Writes a file whole or not at all; one that is there with other content is never replaced; raises Conflict."""
    path = folder / file.path
    mode = 0o600 if file.secret else 0o755 if file.text.startswith("#!") else 0o644
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.writing")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "w", encoding="utf-8") as out:
            out.write(file.text)
        temporary.chmod(mode)
        _appear(temporary, path)
    except FileExistsError:
        if path.is_symlink() or path.read_bytes() != file.text.encode():
            raise Conflict(f"{path} is there already", expected="a free place", do="merge the two by hand, or name another --to") from None
        path.chmod(mode)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str]) -> int:
    """Prints or writes the files of every tool that is named; raises Invalid, Conflict."""
    given = _parser().parse_args(argv)
    if not given.registry:
        raise Invalid("no registry is named", expected="--registry URL or AIRLOCK_REGISTRY", reason="url")
    site = Site(
        given.registry,
        given.ngc,
        ca=_authority(given.ca) if given.ca else "",
        ca_file=str(Path(given.ca).absolute()) if given.ca else "",
        key=os.environ.get("AIRLOCK_KEY", ""),
        names=tuple(given.name) or NAMES,
    )
    setups = {tool: setup(tool, site) for tool in given.tool}
    files = {file.path: file for made in setups.values() for file in made.files}
    notes = [(tool, note) for tool, made in setups.items() for note in made.notes]
    if given.to:
        for file in files.values():
            _write(given.to, file)
    if given.json:
        shown = [{"path": f.path, "secret": f.secret, **({} if given.to else {"text": f.text})} for f in files.values()]
        print(json.dumps({"files": shown, "notes": [{"tool": tool, "note": note} for tool, note in notes]}))
        return 0
    for file in files.values():
        place = f"/{file.path}" if file.path.startswith("etc/") else f"~/{file.path.removeprefix('home/')}"
        sys.stdout.write(f"{given.to / file.path} -> {place}\n" if given.to else f"# ---- {place}{' (0600)' if file.secret else ''}\n{file.text}\n")
    for tool, note in notes:
        sys.stdout.write(f"# {tool}: {note}\n")
    return 0
