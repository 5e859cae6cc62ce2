"""Every supported variable of the runtime with texts that nobody means: it is taken, or refused naming the variable; nothing else happens."""

from __future__ import annotations

import pytest

from artifact.errors import Invalid
from runtime.settings import from_environment
from runtime.variables import judge, known

ODD = ("", " ", "\t\n", "0", "-1", "1e400", "nan", "9" * 5000, "٣", "a\x00b", "a\nb", "\udcff", "../../etc", "=", ",", "é" * 300, "{}", "'", "--help")
NAMES = sorted(name for name, row in known().items() if row.state == "supported")


@pytest.mark.parametrize("name", NAMES)
def test_any_text_is_a_value_or_refused_by_name(name: str) -> None:
    for text in ODD:
        environ = {"AIRLOCK_MODEL": "acme/tiny:1", "AIRLOCK_REGISTRY": "http://registry:5000"} | {name: text}
        try:
            judge(environ)
            from_environment(environ, "")
        except Invalid as error:
            assert name in error.what or error.what.startswith(("the model", "no model")) or "repository name" in error.what, (text, str(error))
            assert error.expected and len(str(error)) < 2000
