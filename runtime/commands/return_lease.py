"""`airlock runtime return-lease`: the lease of a model that no longer runs here goes back."""

from __future__ import annotations

import argparse
import json
import sys
import time

from artifact.errors import AirlockError, NotFound, Unavailable
from artifact.grant import date
from runtime import console, start
from runtime.settings import Settings

TEXT = "give back the lease of a model that no longer runs here"


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("return-lease", TEXT)
    return console.run(parser, argv, return_lease)


def return_lease(settings: Settings, args: argparse.Namespace) -> int:
    """`return-lease`: the registry counts its GPUs as free, and no start here uses it again; with the registry away the latter alone."""
    from runtime import entitlement, leases

    entitlement.require_key(settings)
    folder = settings.cache / "leases"
    found = [k for k in leases.kept(folder, settings.model, settings.ref, settings.instance) if not k.told]
    if not found:
        raise NotFound(
            f"{folder} holds no lease of {settings.name_ref} on {settings.instance} that is not returned",
            expected="a lease that a start on this node got",
            do="check --model with its version, NIM_CACHE_PATH and AIRLOCK_INSTANCE",
            reason="lease_absent",
        )
    remote, trouble = start.remote(settings), None
    for kept in found:
        at = kept.returned_at or time.time()
        if not leases.mark(kept, returned_at=at, revoked_at=kept.revoked_at):
            what = f"{kept.path} cannot be marked as returned: a later start would use it"
            raise Unavailable(what, expected="a cache that we may write", do=f"remove the file, or make {folder} writable", reason="cache")
        told = "the registry counts its GPUs as free"
        try:
            remote.api("POST", "/airlock/v1/leases/return", {"jti": kept.jti})
        except NotFound:
            told = "the registry does not know it"
        except AirlockError as error:
            trouble, told = error, f"the registry counts its GPUs until {leases.until(kept)}"
        if trouble is None:
            leases.mark(kept, returned_at=at, revoked_at=kept.revoked_at, told=True)
        item = {"jti": kept.jti, "model": kept.name_ref, "returned_at": date(at), "registry": told}
        sys.stdout.write(json.dumps(item) + "\n" if args.json else f"lease {kept.jti} of {kept.name_ref} is returned here; {told}\n")
        if trouble is not None:
            trouble.do = f"{trouble.do}; then say this again, so that the registry knows too"
            raise trouble
    return 0
