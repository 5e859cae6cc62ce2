"""One registry process for the door tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contracts.doors import Door, new_site, serving


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("site") / "data"
    keys = new_site(data)
    with serving(data, keys) as found:
        yield found
