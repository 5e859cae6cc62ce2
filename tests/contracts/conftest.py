"""One registry process for the door tests of a module, and the client and names of the conformance tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.contracts.doors import Door, new_site, serving
from tests.contracts.oci_client import Client


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("site") / "data"
    keys = new_site(data)
    with serving(data, keys) as found:
        yield found


@pytest.fixture(scope="module", params=["basic", "bearer", "token"])
def client(request: pytest.FixtureRequest, door: Door) -> Client:
    """A conformance client of the organisation's key, in each form in which a client may present it."""
    return Client(door.port, door.keys["acme"], request.param)


_numbers = itertools.count(1)


@pytest.fixture
def repo() -> str:
    """A repository that no other test uses."""
    return f"acme/conformance/r{next(_numbers)}"
