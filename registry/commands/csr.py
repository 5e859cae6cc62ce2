"""`airlock registry csr`: a certificate request for the site's own authority, so that no client needs a file of ours."""

from __future__ import annotations

import argparse
import json
import sys

from registry import tls
from registry.settings import Settings


def main(argv: list[str]) -> int:
    """Prints the request, PEM; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="airlock registry csr",
        description="Prints a certificate request for the names of AIRLOCK_PUBLIC_URL and --host; its key is made once in DIR/tls/key.pem, "
        "shared with the self-signed pair, and kept by every later request and renewal: for a new key remove that file first.",
        epilog="example: airlock registry csr --data /srv/airlock --host registry.example > airlock.csr",
    )
    parser.add_argument("--data", help="data directory (AIRLOCK_DATA)")
    parser.add_argument("--host", help="name or address that clients use (AIRLOCK_HOST)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    settings = Settings.load(given.data, host=given.host)
    pem = tls.request(settings).decode()
    at = tls.files(settings)
    if given.json:
        print(json.dumps({"csr": pem, "key": str(at.key), "names": tls.names(settings)}))
        return 0
    print(pem, end="")
    print(f"names: {', '.join(tls.names(settings))}; key: {at.key} (stays here)", file=sys.stderr)
    print(f"then serve with AIRLOCK_TLS_CERT=CHAIN.pem AIRLOCK_TLS_KEY={at.key}", file=sys.stderr)
    return 0
