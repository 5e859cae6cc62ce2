"""Settings: four sources in one order, words for what is wrong, no password shown, and a documentation that cannot drift."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifact.errors import AirlockError, Invalid, NotFound
from registry.commands import config
from registry.settings import PREFIX, SIGNED_URL_S, Settings, specs, table, written
from tests.conftest import ROOT


def test_argument_then_environment_then_file_then_default(tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text("port: 1\nhost: 10.0.0.1\nlog_level: debug\nupload_ttl_s: 61\n")
    found = Settings.load(tmp_path, port=3, environ={"AIRLOCK_CONFIG": str(file), "AIRLOCK_PORT": "2", "AIRLOCK_HOST": "10.0.0.2"})
    assert (found.port, found.host, found.log_level, found.upload_ttl_s, found.lease_life_s) == (3, "10.0.0.2", "debug", 61, 86400)
    sources = {name: source for name, _, source, _ in found.rows()}
    assert sources["port"] == "argument"
    assert sources["host"] == "environment AIRLOCK_HOST"
    assert sources["log_level"] == f"file {file}"
    assert sources["lease_life_s"] == "default"


def test_a_file_beside_the_data_is_read_and_may_not_be_needed(tmp_path: Path) -> None:
    assert Settings.load(tmp_path, environ={}).port == 5000
    (tmp_path / "registry.yaml").write_text("port: 7\nredirect: no\nstream_to: [10.0.0.0/8, 192.168.0.0/16]\npublic_url:\n")
    found = Settings.load(tmp_path, environ={})
    assert (found.port, found.redirect, found.stream_to, found.public_url) == (7, False, ("10.0.0.0/8", "192.168.0.0/16"), "")


def test_the_data_directory_may_be_named_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"data: {tmp_path}\n")
    assert Settings.load(environ={"AIRLOCK_CONFIG": str(tmp_path / "a.yaml")}).data == tmp_path
    with pytest.raises(Invalid, match="no data directory"):
        Settings.load(environ={})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 5", "did you mean port"),
        ("- a", "holds no settings"),
        ("port: {a: 1}", "port in .* is dict"),
        ("port: 1.5", "port in .* is float"),
        ("port: -1", "port in .* is '-1'"),
        ("a: [", "is no YAML, line"),
        ("port: !!python/object/apply:os.system [id]", "is no YAML"),
        ("port: '٣'", "whole number from 0 to 65535"),
        ("log_level: loud", "debug, info, warning, error"),
        ("port: 1\nhost: 10.0.0.1\nport: 2", "'port' twice, again in line 3"),
        ("port: 1\n'port': 1", "'port' twice"),
        ("public_url: http://x:99999999", "no path"),
        ("stream_to: [10.0.0.0/33]", "CIDRs"),
    ],
)
def test_a_wrong_file_is_refused_with_words(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "registry.yaml").write_text(text)
    with pytest.raises(Invalid) as caught:
        Settings.load(tmp_path, environ={})
    assert re.search(words, str(caught.value))


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    for absent in (str(tmp_path / "no.yaml"), f"{tmp_path}/a\0b"):
        with pytest.raises(NotFound, match="cannot be read"):
            Settings.load(tmp_path, environ={"AIRLOCK_CONFIG": absent})


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """A reader of a FIFO would wait for a writer, for ever."""
    os.mkfifo(tmp_path / "fifo")
    for named in (tmp_path / "fifo", tmp_path, Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(Invalid) as caught:
            Settings.load(tmp_path, environ={"AIRLOCK_CONFIG": str(named)})
        assert str(named) in caught.value.what and caught.value.expected and caught.value.do
    os.mkfifo(tmp_path / "registry.yaml")
    with pytest.raises(Invalid, match="is no file"):
        Settings.load(tmp_path, environ={})


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in specs() if n != "data"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_is_a_value_or_refused_naming_the_variable(tmp_path: Path, name: str, text: str) -> None:
    """A setting that was taken can be written out and read again to the same value."""
    variable = PREFIX + name.upper()
    try:
        found = Settings.load(tmp_path, environ={variable: text})
    except Invalid as error:
        assert variable in str(error) or name in str(error)
        assert not specs()[name].secret or len(text) < 3 or text not in str(error) or text in variable
        return
    again = written(getattr(found, name))
    assert not again or getattr(Settings.load(tmp_path, environ={variable: again}), name) == getattr(found, name)


def test_no_password_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRLOCK_DATABASE", "postgresql://airlock:p%40ss:w@rd@db/airlock?password=planted&sslmode=require")
    monkeypatch.setenv("AIRLOCK_BLOBS", "s3://bucket/p?endpoint=http://root:planted@10.0.0.9:80")
    for argv in (["--data", str(tmp_path)], ["--data", str(tmp_path), "--json"]):
        assert config.main(argv) == 0
        out = capsys.readouterr().out
        assert "p%40ss" not in out and "w@rd" not in out and "planted" not in out
        assert "postgresql://airlock:***@db/airlock?password=***&sslmode=require" in out
    shown = json.loads(out)
    assert set(shown) == set(specs())
    assert shown["database"]["source"] == "environment AIRLOCK_DATABASE"


def test_two_ways_to_tls_are_refused(tmp_path: Path) -> None:
    for env in ({"AIRLOCK_TLS_CERT": "a"}, {"AIRLOCK_TLS_KEY": "a"}, {"AIRLOCK_TLS": "self-signed", "AIRLOCK_TLS_CERT": "a", "AIRLOCK_TLS_KEY": "b"}):
        with pytest.raises(AirlockError):
            Settings.load(tmp_path, environ=env)
    assert Settings.load(tmp_path, environ={"AIRLOCK_TLS": "self-signed"}).url == "https://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("variable", "good", "bad"),
    [
        (
            "AIRLOCK_PUBLIC_URL",
            ("http://h", "https://reg.example:5000", "https://[::1]:8443/", "http://10.0.0.1"),
            (
                "http://h/path",
                "http://h?q=1",
                "http://h/?",
                "http://h#f",
                "http://u@h",
                "h:5000",
                "ftp://h",
                "http://h:99999",
                "http://x:99999999",
                'http://x"y',
                "http://x/path;a b",
                "http://h:",
                "http:// h",
                "//h",
            ),
        ),
        (
            "AIRLOCK_STREAM_TO",
            ("10.0.0.0/8", "10.0.0.0/8, fd00::/8", "192.0.2.7"),
            ("10.0.0.0/33", "10.0.0.1/8", "x", "10.0.0.0/8 fd00::/8", "10.0.0.0/8,y"),
        ),
        ("AIRLOCK_X_ACCEL", ("/internal/", "/a/b-c/"), ("blobs", "/blobs", "blobs/", "/", "//", "/a//", "/../", "/a b/", "/a?/", "http://h/")),
    ],
)
def test_an_origin_and_a_location_have_no_other_form(tmp_path: Path, variable: str, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    """A path behind the origin would be told to clients as part of the token endpoint; a location without both slashes names no file of nginx."""
    for text in good:
        Settings.load(tmp_path, environ={variable: text})
    for text in bad:
        with pytest.raises(Invalid) as caught:
            Settings.load(tmp_path, environ={variable: text})
        assert variable in str(caught.value) and caught.value.expected, text
    assert Settings.load(tmp_path, environ={"AIRLOCK_PUBLIC_URL": "https://h/"}).url == "https://h"


def test_bytes_outlive_every_url_that_was_given_out(tmp_path: Path) -> None:
    s3 = {"AIRLOCK_BLOBS": "s3://bucket/p?credentials=c"}
    for short in ("0", "599"):
        with pytest.raises(Invalid) as caught:
            Settings.load(tmp_path, environ={**s3, "AIRLOCK_GARBAGE_DELAY_S": short})
        assert "AIRLOCK_GARBAGE_DELAY_S" in str(caught.value) and "AIRLOCK_REDIRECT=off" in str(caught.value)
        assert Settings.load(tmp_path, environ={**s3, "AIRLOCK_GARBAGE_DELAY_S": short, "AIRLOCK_REDIRECT": "off"}).garbage_delay_s == int(short)
        assert Settings.load(tmp_path, environ={"AIRLOCK_GARBAGE_DELAY_S": short}).garbage_delay_s == int(short)
    assert Settings.load(tmp_path, environ={**s3, "AIRLOCK_GARBAGE_DELAY_S": str(SIGNED_URL_S)}).redirect
    with pytest.raises(Invalid, match="x_accel is set and the bytes lie in a bucket"):
        Settings.load(tmp_path, environ={**s3, "AIRLOCK_X_ACCEL": "/internal/"})


def test_the_documented_settings_are_the_settings() -> None:
    assert table() in (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:pa/hunter2@h/db",
        "postgresql://u:p@hunter2@h/db",
        "postgresql://u:hunter2?x@h/db",
        "postgresql://u@h/db?sslpassword=hunter2",
        "postgresql://u@h/db?PASSWORD=hunter2&sslmode=require",
        "u:hunter2@h/db",
        "s3://b/x?secret=hunter2&credentials=/c",
        "s3://b/x?aws_secret_access_key=hunter2",
        "s3://b/x?endpoint=http://k:hun/hunter2@x&credentials=/c",
    ],
)
def test_no_spelling_of_a_password_is_printed(tmp_path: Path, url: str) -> None:
    rows = dict((name, value) for name, value, *_ in dataclasses.replace(Settings(tmp_path), database=url, blobs=url).rows())
    assert "hunter2" not in rows["database"] + rows["blobs"]


def test_a_file_with_an_absurd_number(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("port: 0x" + "F" * 5000)
    with pytest.raises(Invalid, match="port"):
        Settings.load(tmp_path, environ={})
