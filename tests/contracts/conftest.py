"""One registry process for the door tests of a module, and the client and names of the conformance tests."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.contracts.doors import Door, new_site, serving
from tests.contracts.oci_client import Client
from tests.contracts.stores import s3_url
from tests.services import postgres


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("site") / "data"
    keys = new_site(data)
    with serving(data, keys) as found:
        yield found


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Door]]:
    """Gives the run's registry over SQLite and `files`, or over `postgres-s3` with the bytes streamed, so that all heads are ours."""
    with ExitStack() as stack:

        @functools.cache
        def start(backend: str) -> Door:
            folder, env = tmp_path_factory.mktemp("conformance"), {}
            if backend == "postgres-s3":
                env = {"AIRLOCK_DATABASE": postgres.shared().database(), "AIRLOCK_BLOBS": s3_url(folder), "AIRLOCK_REDIRECT": "off"}
                stack.callback(postgres.shared().drop, env["AIRLOCK_DATABASE"])
            return stack.enter_context(serving(folder / "data", new_site(folder / "data", **env), **env))

        yield start


@pytest.fixture(scope="module", params=["files-basic", "files-bearer", "files-token", pytest.param("postgres-s3-token", marks=pytest.mark.full)])
def setting(request: pytest.FixtureRequest) -> str:
    """The backend of a conformance test and, behind the last dash, how its client presents the key."""
    return str(request.param)


@pytest.fixture(scope="module")
def server(setting: str, servers: Callable[[str], Door]) -> Door:
    return servers(setting.rpartition("-")[0])


@pytest.fixture(scope="module")
def client(setting: str, server: Door) -> Client:
    return Client(server.port, server.keys["acme"], setting.rpartition("-")[2])


_numbers = itertools.count(1)


@pytest.fixture
def repo() -> str:
    """A repository that no other test uses."""
    return f"acme/conformance/r{next(_numbers)}"
