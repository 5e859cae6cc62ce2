"""Hostile images: layers, configs, indexes and model manifests that lie are refused, within bounds of time and memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifact import archive, nim
from artifact.errors import AirlockError, Invalid, TooLarge
from artifact.layers import find, open_image
from tests.contracts.nim_images import SHAPE0, SHAPE1, SHAPE2, Entry, tar
from tests.unit.test_image_layers import DIR, HARD, LIMIT, LINK, Memory, look

GOOD = Entry("a/b", b"good")
END = bytes(1024)


def header(name: bytes, size: int = 0, kind: bytes = b"0", **more: Any) -> bytes:
    """One header block with a right checksum, whatever it says."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[0:100] = name[:100].ljust(100, b"\0")
    block[124:136] = more.get("raw_size") or b"%011o\0" % size
    block[156:157] = kind
    if "devices" in more:
        block[329:345] = more["devices"]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*pairs: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """A PAX header block with records."""
    raw = b""
    for key, value in pairs:
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        raw += b"%d %s=%s\n" % (length, key, value)
    return header(b"pax", len(raw), kind) + padded(raw)


BAD: dict[str, Callable[[], bytes]] = {
    "a name that leaves": lambda: tar(Entry("../a/b", b"x"), GOOD),
    "a name that leaves and comes back": lambda: tar(Entry("a/../a/b", b"x")),
    "an absolute name that leaves": lambda: tar(Entry("/../../etc/passwd", b"x"), GOOD),
    "a name with NUL by PAX": lambda: pax((b"path", b"a/b\0c")) + header(b"x") + END,
    "a name that leaves by PAX": lambda: pax((b"path", b"../a/b")) + header(b"x") + END,
    "a name that leaves by GNU": lambda: header(b"L", 7, b"L") + padded(b"../a/b\0") + header(b"x") + END,
    "a character device": lambda: tar(Entry("a/b", kind=tarfile.CHRTYPE)),
    "a block device": lambda: tar(Entry("a/b", kind=tarfile.BLKTYPE)),
    "a pipe": lambda: tar(Entry("a/b", kind=tarfile.FIFOTYPE)),
    "a kind that none knows": lambda: header(b"a/b", 4, b"Z") + padded(b"good") + END,
    "the file twice": lambda: tar(GOOD, Entry("a/b", b"evil")),
    "a file and a link": lambda: tar(GOOD, Entry("a/b", kind=LINK, target="c")),
    "a file and a directory": lambda: tar(GOOD, Entry("a/b", kind=DIR)),
    "a link and things below it": lambda: tar(Entry("a", kind=LINK, target="c"), GOOD),
    "a link to itself": lambda: tar(Entry("a/b", kind=LINK, target="b")),
    "links in a ring": lambda: tar(Entry("a/b", kind=LINK, target="/c"), Entry("c", kind=LINK, target="a/b")),
    "a directory that is its own": lambda: tar(Entry("a", kind=LINK, target="a/a")),
    "a hard link to itself": lambda: tar(Entry("a/b", kind=HARD, target="a/b")),
    "a hard link that leaves": lambda: tar(Entry("a/b", kind=HARD, target="../../etc/passwd")),
    "a wrong checksum": lambda: tar(GOOD)[:148] + b"0000000\0" + tar(GOOD)[156:],
    "noise": lambda: b"\x01noise" * 1000,
    "a size that is no number": lambda: header(b"z", raw_size=b"9z9z9z9z9z9\0") + tar(GOOD),
    "a negative size": lambda: header(b"z", raw_size=b"\xff" * 12) + tar(GOOD),
    "a size without end": lambda: header(b"z", raw_size=b"\x80" + b"\x7f" * 11) + tar(GOOD),
    "a PAX size that is no number": lambda: pax((b"size", b"-4")) + header(b"z", 4) + padded(b"good") + tar(GOOD),
    "a PAX size without end": lambda: pax((b"size", b"9" * 19)) + header(b"z", 4) + padded(b"good") + tar(GOOD),
    "a PAX record without a length": lambda: header(b"p", 5, b"x") + padded(b"x=y\n\n") + tar(GOOD),
    "a PAX record that is longer than its header": lambda: header(b"p", 9, b"x") + padded(b"99 x=yz\n\n") + tar(GOOD),
    "a PAX record of no length": lambda: header(b"p", 8, b"x") + padded(b"0 x=yzz\n") + tar(GOOD),
    "a PAX header for all": lambda: pax((b"path", b"a/b"), kind=b"g") + header(b"x") + END,
    "a header of headers": lambda: (header(b"L", 4, b"L") + padded(b"a/b\0")) * 40 + header(b"x") + END,
    "a name without its entry": lambda: header(b"L", 4, b"L") + padded(b"a/b\0") + END,
    "a sparse file": lambda: pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.name", b"a/b")) + header(b"x", 4) + padded(b"good") + END,
    "a sparse map without end": lambda: sparse_without_end(),
    "truncated in the content": lambda: tar(Entry("z", b"z" * 5000), GOOD)[:2000],
    "truncated in the last content": lambda: tar(GOOD)[:515],
    "truncated in a header": lambda: tar(GOOD)[:300],
    "things behind the first zeros": lambda: tar(GOOD)[:-9216] + bytes(512) + b"x" * 512,
    "a gzip that ends in the middle": lambda: gzip.compress(tar(GOOD))[:-12],
    "a gzip with a wrong sum": lambda: gzip.compress(tar(GOOD))[:-8] + bytes(8),
    "a gzip with noise behind it": lambda: gzip.compress(tar(GOOD)) + b"noise",
    "a gzip of a gzip": lambda: gzip.compress(gzip.compress(tar(GOOD))),
}


def sparse_without_end() -> bytes:
    block = bytearray(header(b"a/b", 4, b"S"))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + (bytes(504) + b"\x01" + bytes(7)) * 4000


@pytest.mark.parametrize("case", BAD)
def test_a_layer_that_lies_is_refused(case: str) -> None:
    with pytest.raises((Invalid, TooLarge)) as error:
        assert look([BAD[case]()], step=4096) is not None, "it meant nothing"
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


NEIGHBOURS = {
    "a device elsewhere": tar(Entry("dev/null", kind=tarfile.CHRTYPE), GOOD),
    "a link elsewhere that leaves": tar(Entry("z", kind=LINK, target="../../../../etc/passwd"), GOOD),
    "an archive that ends with its content": tar(GOOD)[:516],
    "an archive that ends in a padding": tar(GOOD)[:700],
    "an archive that ends between two entries": tar(GOOD)[:1024],
    "directories twice": tar(Entry("a", kind=DIR), Entry("a", kind=DIR), GOOD),
    "another file twice": tar(Entry("z", b"1"), Entry("z", b"2"), GOOD),
    "a symbolic link that states a size": header(b"z", 4096, b"2") + tar(GOOD),
    "PAX facts that are none of a name": pax((b"SCHILY.xattr.user.x", b"\xff\0\n"), (b"mtime", b"nan")) + tar(GOOD),
}


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_what_is_odd_but_harmless_is_read(case: str) -> None:
    assert look([NEIGHBOURS[case]]) == b"good"


STEERING = "a/\x1b[2J\udcff"


@pytest.mark.parametrize(
    "entries", [[Entry(STEERING, kind=tarfile.FIFOTYPE)], [Entry(STEERING, b"x"), Entry(STEERING, b"y")], [Entry(STEERING, b"x" * (LIMIT + 1))]]
)
def test_no_refusal_steers_a_terminal(entries: list[Entry]) -> None:
    """A link leads to a name of any bytes; what is told of it can be printed."""
    with pytest.raises(AirlockError) as caught:
        look([tar(Entry("a/b", kind=LINK, target=f"/{STEERING}"), *entries)], "/a/b")
    assert str(caught.value).isprintable() and "x1b" in str(caught.value)


@pytest.mark.parametrize("limit", ["MAX_EXTENSION", "MAX_NAME"])
def test_a_header_is_not_taken_into_memory_at_its_word(limit: str) -> None:
    kind = b"x" if limit == "MAX_EXTENSION" else b"L"
    size = int(getattr(archive, limit)) + 1
    with pytest.raises(TooLarge, match=f"header of {size} bytes"):
        look([header(b"p", size, kind) + b"x" * 4096])


def test_a_file_beyond_the_limit_is_not_taken() -> None:
    with pytest.raises(TooLarge, match="/a/b has"):
        look([tar(Entry("a/b", b"x" * (LIMIT + 1)))], step=65536)
    assert look([tar(Entry("a/b", b"x" * LIMIT))], step=65536) == b"x" * LIMIT


def test_more_entries_than_a_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import artifact.layers as module

    monkeypatch.setattr(module, "MAX_ENTRIES", 100)
    with pytest.raises(TooLarge, match="100 entries"):
        look([header(b"z") * 200 + END])


def test_more_gzip_members_than_a_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_ENTRIES", 100)
    with pytest.raises(TooLarge, match="members"):
        look([gzip.compress(b"") * 200])


@pytest.mark.slow
def test_a_decompression_bomb_stops_early_and_takes_no_memory() -> None:
    """1.2 GB of zeros in 6 MB, inside a process that may have 400 MB."""
    code = """
    import resource, zlib
    resource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2)
    from tests.hostile.test_image_input import header
    from tests.unit.test_image_layers import look
    from artifact.errors import TooLarge
    pack = zlib.compressobj(1, wbits=31)
    raw, zeros = pack.compress(header(b"z", 3 << 30)), bytes(1 << 20)
    for _ in range(1250):
        raw += pack.compress(zeros)
    raw += pack.flush()
    assert len(raw) < 8 << 20
    try:
        look([raw], step=65536)
    except TooLarge as error:
        print(error)
    """
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "unpacks to more than" in done.stdout, done.stderr
    assert time.monotonic() - begun < 60


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_byte_changed_in_a_layer_gives_an_answer_or_a_refusal(data: st.DataObject) -> None:
    """The digest is that of the changed bytes, as of an image that was made so: never another kind of error."""
    raw = bytearray(
        tar(Entry("a", kind=DIR), Entry("c", b"c" * 700), Entry("a/b", kind=HARD, target="c"), GOOD if data.draw(st.booleans()) else A_LINK)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    changed = bytes(raw[:cut]) if data.draw(st.booleans()) else bytes(raw)
    try:
        look([gzip.compress(changed, 1) if data.draw(st.booleans()) else changed])
    except AirlockError as error:
        assert str(error).isprintable()


A_LINK = Entry("a/d", kind=LINK, target="b")


# ---- configs and indexes


@pytest.mark.parametrize("config", [b"[]", b"{", b'{"config":' + b"[" * 2000, b'{"a":1,"a":2}', b"\xff\xfe"])
def test_a_config_that_is_none(config: bytes) -> None:
    source = Memory()
    digest = source.image([])
    doc = json.loads(source.manifests[digest])
    doc["config"] |= {"digest": source.put(config), "size": len(config)}
    source.manifests["2"] = json.dumps(doc).encode()
    with pytest.raises(Invalid):
        open_image(source, "a", "2")


def test_a_config_that_states_more_than_it_may() -> None:
    source = Memory()
    doc = json.loads(source.manifests[source.image([])])
    doc["config"]["size"] = 1 << 40
    source.manifests["2"] = json.dumps(doc).encode()
    with pytest.raises(TooLarge):
        open_image(source, "a", "2")


@pytest.mark.parametrize("platform", [[], "linux/amd64", {"os": [1]}, {"os": {"x": 1}, "architecture": None}])
def test_a_platform_that_is_none(platform: Any) -> None:
    source = Memory()
    digest = source.image([tar(GOOD)])
    kind = "application/vnd.oci.image.index.v1+json"
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 9, "platform": platform}
    source.manifests["2"] = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [entry]}).encode()
    found = find(source, open_image(source, "a", "2"), ["/a/b"], LIMIT)
    assert found and found.raw == b"good"


# ---- model manifests

LAUGHS = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))
LIES: dict[str, bytes] = {
    "nothing": b"",
    "a word": b"hello",
    "a list": b"- a\n- b\n",
    "an object of no profile": b"{}",
    "two documents": SHAPE2 + b"---\nx: 1\n",
    "not UTF-8": b"a: \xff\xfe\n",
    "a control character": b"a: \x01\n",
    "not YAML": b"a: [1, 2\nb: }",
    "JSON that is none": b'{"a": ',
    "JSON with a key twice": b'{"a": {}, "a": {}}',
    "a key twice": b"a: {}\na: {}\n",
    "a tag twice": b"p: {tags: {tp: '1', tp: '2'}}\n",
    "a key that is no word": b"? [a, b]\n: {}\n",
    "a merge": b"a: &a {tags: {}}\nb: {<<: *a}\n",
    "an anchor around its alias": b"a: &a {tags: {x: *a}}\n",
    "an alias of nothing": b"a: *nobody\n",
    "a thousand laughs": LAUGHS,
    "a python object": b"a: !!python/object/apply:os.system ['touch /tmp/pwned']\n",
    "a python name": b"a: !!python/name:os.system\n",
    "bytes": b"a: {tags: {x: !!binary aGVsbG8=}}\n",
    "deep lists": b"a: " + b"[" * 200 + b"]" * 200,
    "deep JSON": b'{"a":' * 100 + b"1" + b"}" * 100,
    "a profile that is a word": b"aa: hello\n",
    "tags that are a list": b"aa: {tags: [a]}\n",
    "a tag that is an object": b"aa: {tags: {tp: {}}}\n",
    "an id with a slash": b"'../x': {tags: {}}\n",
    "an id with a blank": b"'a b': {tags: {}}\n",
    "an id of dots": b"..: {tags: {}}\n",
    "an id twice": b"schema_version: '2.0'\nprofiles:\n- {id: a}\n- {id: a}\n",
    "profiles that are an object": b"schema_version: '2.0'\nprofiles: {a: {}}\n",
    "an entry without an id": b"schema_version: '2.0'\nprofiles:\n- {tags: {}, workspace: {}}\n",
    "no profiles at all": b"schema_version: '2.0'\n",
    "an empty list of the oldest shape": b"model_profile: X\nmanifest: []\n",
    "a workspace that is a list": b"aa: {workspace: [1]}\n",
    "files that are a list": b"aa: {workspace: {files: [1]}}\n",
    "a file without a uri": b"aa: {workspace: {files: {x: {}}}}\n",
    "a file that is a word": b"aa: {workspace: {files: {x: hello}}}\n",
    "a component that is a word": b"aa: {workspace: {components: [x]}}\n",
    "names that are a word": b"aa: {workspace: {components: [{src: {repo_id: a/b:1, files: x}}]}}\n",
    "a path that leaves": b"aa: {workspace: {files: {'../x': {uri: 'ngc://a/b:1?file=x'}}}}\n",
    "an absolute path": b"aa: {workspace: {files: {/etc/passwd: {uri: 'ngc://a/b:1?file=x'}}}}\n",
    "a path with a backslash": b"aa: {workspace: {files: {'a\\b': {uri: 'ngc://a/b:1?file=x'}}}}\n",
    "a path into .git": b"aa: {workspace: {files: {.git/config: {uri: 'ngc://a/b:1?file=x'}}}}\n",
    "a place that leaves": b"aa: {workspace: {components: [{dst: '../..', src: {repo_id: a/b:1, files: [x]}}]}}\n",
    "a name that leaves": b"aa: {workspace: {components: [{dst: '', src: {repo_id: a/b:1, files: ['../x']}}]}}\n",
    "a model with a file": b"aa: {workspace: {components: [{dst: '', src: {repo_id: 'a/b:1?file=y', files: ['x']}}]}}\n",
    "a uri of another scheme": b"aa: {workspace: {files: {x: {uri: 'file:///etc/passwd'}}}}\n",
    "a uri that leaves": b"aa: {workspace: {files: {x: {uri: 'ngc://a/b:1?file=../../x'}}}}\n",
    "a checksum that is a word": b"aa: {workspace: {files: {x: {uri: 'ngc://a/b:1?file=x', checksum: hello}}}}\n",
    "a checksum that is a list": b"aa: {workspace: {files: {x: {uri: 'ngc://a/b:1?file=x', checksum: [1]}}}}\n",
    "a tag that steers a terminal": b'aa: {tags: {profile_name: "\\e[2J"}}\n',
    "a tag that forges a line": b'aa: {tags: {profile_name: "a\\nsynced"}}\n',
    "a tag's name that steers a terminal": b'aa: {tags: {"\\e[2J": x}}\n',
    "an id that turns what follows around": b'"\\u202Eaa": {tags: {}}\n',
    "a path that steers a terminal": b'aa: {workspace: {files: {"\\x9bm": {uri: "ngc://a/b:1?file=x"}}}}\n',
    "a uri that steers a terminal": b'aa: {workspace: {files: {x: {uri: "ngc://a/b:1?file=\\x9bm"}}}}\n',
    "a surrogate": b'{"aa": {"tags": {"x": "\\ud800"}}}',
    "JSON of empty objects": b'{"a": {"tags": {"x": [' + b"{}," * 5_000_000 + b"{}]}}}",
    "a number without end": b'{"aa": {"tags": {"x": ' + b"9" * 5000 + b"}}}",
}


@pytest.mark.parametrize("case", LIES)
def test_a_model_manifest_that_lies_is_refused(case: str) -> None:
    begun = time.monotonic()
    with pytest.raises((Invalid, TooLarge)) as error:
        nim.parse(LIES[case])
    assert time.monotonic() - begun < 5 and len(str(error.value)) < 900 and str(error.value).isprintable()


def test_a_model_manifest_that_is_too_large() -> None:
    with pytest.raises(TooLarge):
        nim.parse(b"#" * (nim.MAX_BYTES + 1))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_change_of_a_manifest_gives_a_manifest_or_a_refusal(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([SHAPE0, SHAPE1, SHAPE2])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"*x", b"&x", b"!", b"!!", b"[", b"{", b"\n", b"../"])
        )
    try:
        for profile in nim.parse(bytes(raw)).profiles:
            assert all(part not in ("", ".", "..") for f in profile.files if f.path for part in f.path.split("/"))
    except AirlockError as error:
        assert str(error).isprintable()


@pytest.mark.slow
def test_the_largest_manifest_is_read_in_seconds() -> None:
    """4000 profiles of 5 files, in about 4 MB."""
    files = "".join(f"      f{i}.bin: {{uri: 'ngc://nim/meta/model:v{i}?file=f{i}.bin', checksum: {'0' * 64}}}\n" for i in range(5))
    raw = "schema_version: '2.0'\nprofiles:\n" + "".join(f"- id: p{i}\n  tags: {{tp: '1'}}\n  workspace:\n    files:\n{files}" for i in range(4000))
    begun = time.monotonic()
    assert len(nim.parse(raw.encode()).profiles) == 4000
    assert time.monotonic() - begun < 20
