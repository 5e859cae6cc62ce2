"""Reading a file out of an image's layers: the merged view against umoci's, links, platforms, and what archives of all writers look like."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from artifact.errors import AirlockError, Invalid, Mismatch, NotFound, Unavailable, Unsupported
from artifact.layers import PROTOCOL_LABEL, Image, find, find_manifest, open_image
from artifact.manifest import INDEX, MANIFEST, digest_of
from artifact.store import Descriptor
from tests.conftest import missing
from tests.contracts.nim_images import IMAGE, PLACE, SHAPE2, Entry, documents, nim_layers, tar

DIR, LINK, HARD = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
LIMIT = 1 << 20


class Memory:
    """A source in memory, which gives a blob in pieces of `step` bytes and breaks off as often as `breaks` says."""

    def __init__(self, step: int = 1000, breaks: int = 0) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.step, self.breaks = step, breaks
        self.read = 0

    def put(self, raw: bytes) -> str:
        self.blobs[digest_of(raw)] = raw
        return digest_of(raw)

    def image(self, layers: list[bytes], ref: str = "1", config: dict[str, Any] | None = None) -> str:
        raw, config_raw = documents(layers, config)
        for data in (config_raw, *layers):
            self.put(data)
        self.manifests[ref] = self.manifests[digest_of(raw)] = raw
        return digest_of(raw)

    def read_manifest(self, repo: str, ref: str) -> tuple[Descriptor, bytes]:
        if ref not in self.manifests:
            raise NotFound(f"no {ref}")
        raw = self.manifests[ref]
        return Descriptor(MANIFEST, digest_of(raw), len(raw)), raw

    def stream(self, repo: str, digest: str, lo: int, hi: int) -> Iterator[bytes]:
        for at in range(lo, hi, self.step):
            if self.breaks and at > lo:
                self.breaks -= 1
                raise Unavailable("the connection broke")
            part = self.blobs[digest][at : min(at + self.step, hi)]
            self.read += len(part)
            yield part


def look(layers: list[bytes], *paths: str, step: int = 1000) -> bytes | None:
    """What the first of the paths is that the layers, from the lowest up, have a file at."""
    source = Memory(step)
    source.image(layers)
    found = find(source, open_image(source, "a", "1"), paths or ("/a/b",), LIMIT)
    return found.raw if found else None


def file(name: str, text: str) -> Entry:
    return Entry(name, text.encode())


A, B, HIDE, OPAQUE = file("a/b", "low"), file("a/b", "high"), file("a/.wh.b", ""), file("a/.wh..wh..opq", "")
MERGED: dict[str, tuple[list[list[Entry]], str | None]] = {
    "one layer": ([[A]], "low"),
    "the topmost wins": ([[A], [B]], "high"),
    "a layer that has nothing of it": ([[A], [file("z", "")]], "low"),
    "hidden": ([[A], [HIDE]], None),
    "hidden and made again": ([[A], [HIDE], [B]], "high"),
    "hidden and made again in one layer": ([[A], [HIDE, B]], "high"),
    "its directory is hidden": ([[A], [file(".wh.a", "")]], None),
    "another file is hidden": ([[A], [file("a/.wh.c", "")]], "low"),
    "a directory of that name elsewhere is hidden": ([[A], [file("c/.wh.a", "")]], "low"),
    "opaque": ([[A], [OPAQUE]], None),
    "opaque beside the file": ([[A], [B, OPAQUE]], "high"),
    "opaque at the root": ([[A], [file(".wh..wh..opq", "")]], None),
    "opaque elsewhere": ([[A], [file("c/.wh..wh..opq", "")]], "low"),
    "opaque below": ([[A, OPAQUE]], "low"),
    "a file in place of the directory": ([[A], [file("a", "")]], None),
    "a directory in place of the file": ([[A], [Entry("a/b", kind=DIR)]], None),
    "a directory, a file, a directory": ([[A], [file("a", "")], [Entry("a", kind=DIR)]], None),
    "a directory in place of a link": ([[Entry("a", kind=LINK, target="c"), file("c/b", "linked")], [Entry("a", kind=DIR)]], None),
    "a link": ([[file("c", "linked"), Entry("a/b", kind=LINK, target="../c")]], "linked"),
    "a link to the root": ([[file("c", "linked"), Entry("a/b", kind=LINK, target="/c")]], "linked"),
    "a link that would leave the image": ([[file("c", "linked"), Entry("a/b", kind=LINK, target="../../../../../c")]], "linked"),
    "a link as its directory": ([[file("c/b", "linked"), Entry("a", kind=LINK, target="c")]], "linked"),
    "a link into another layer": ([[Entry("a/b", kind=LINK, target="../c")], [file("c", "linked")]], "linked"),
    "a link to nothing": ([[Entry("a/b", kind=LINK, target="../c")]], None),
    "a link to what is hidden": ([[file("c", ""), Entry("a/b", kind=LINK, target="../c")], [file(".wh.c", "")]], None),
    "a link over links": ([[file("e/b", "linked"), Entry("d", kind=LINK, target="e"), Entry("a", kind=LINK, target="./d/../e")]], "linked"),
    "a hard link": ([[file("c", "shared"), Entry("a/b", kind=HARD, target="c")]], "shared"),
    "a hard link to what a later layer hides": ([[file("c", "shared"), Entry("a/b", kind=HARD, target="c")], [file(".wh.c", "")]], "shared"),
    "a hard link to what a later layer replaces": ([[file("c", "shared"), Entry("a/b", kind=HARD, target="c")], [file("c", "new")]], "shared"),
    "a hard link to the layer below": ([[file("c", "shared")], [Entry("a/b", kind=HARD, target="./c")]], "shared"),
    "names from the root": ([[file("/a/b", "rooted")]], "rooted"),
    "names with dots and slashes": ([[file("././a//./b", "dotted")]], "dotted"),
    "an empty file": ([[file("a/b", "")]], ""),
    "no layer": ([], None),
    "an empty layer": ([[]], None),
}


@pytest.mark.parametrize("case", MERGED)
@pytest.mark.parametrize("packed", [False, True])
def test_the_merged_view(case: str, packed: bool) -> None:
    layers, wanted = MERGED[case]
    raw = [gzip.compress(tar(*entries)) if packed else tar(*entries) for entries in layers]
    found = look(raw)
    assert (found.decode() if found is not None else None) == wanted


def test_the_first_path_that_is_a_file() -> None:
    layers = [tar(file("a", "1"), file("b", "2")), tar(file("b", "3"), file(".wh.c", ""))]
    assert look(layers, "/c", "/a", "/b") == b"1" and look(layers, "/b", "/a") == b"3" and look(layers, "/c", "/d") is None


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a/b", "d" * 90 + "/" + "e" * 90 + "/b", "t\u00fcr/\u96ea"])
def test_names_of_every_format(form: int, name: str) -> None:
    assert look([tar(file(name, "x"), form=form)], f"/{name}") == b"x"
    long = "/".join(["f" * 200] * 4)
    if form != tarfile.USTAR_FORMAT:
        assert look([tar(file(long, "x"), Entry("l", kind=LINK, target=long), form=form)], "/l") == b"x"


@pytest.mark.slow
def test_the_system_tar_and_its_sparse_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"dense")
    with (tmp_path / "hole").open("wb") as out:
        for at in range(0, 64):
            out.seek(at * 1_000_000)
            out.write(b"x" * 5000)
    for form in ("gnu", "posix", "oldgnu", "ustar"):
        sparse = ["-S"] if form != "ustar" else []
        packed = subprocess.run(["tar", "-C", str(tmp_path), *sparse, f"--format={form}", "-c", "hole", "a"], capture_output=True, check=True).stdout
        assert look([packed], step=70_000) == b"dense", form
        if sparse:
            with pytest.raises(Invalid, match="no regular file"):
                look([packed], "/hole", step=70_000)


def test_gzip_in_many_members_and_with_padding() -> None:
    plain = tar(file("z", "z" * 3000), A, file("a/c", "x"))
    members = b"".join(gzip.compress(plain[i : i + 512]) for i in range(0, len(plain), 512))
    assert look([members], step=37) == b"low" and look([members + b"\0" * 700], step=512) == b"low"


def test_zstd_is_told_to_be_missing() -> None:
    with pytest.raises(Unsupported, match="zstd"):
        look([b"\x28\xb5\x2f\xfd" + b"x" * 100])
    assert look([b"\x28\xb5\x2f\xfd" + b"x" * 100, tar(A)]) == b"low", "what lies below is not asked for"


def test_a_layer_whose_bytes_are_not_its_own() -> None:
    source = Memory()
    source.image([tar(A)])
    digest = next(d for d, raw in source.blobs.items() if b"low" in raw)
    source.blobs[digest] = source.blobs[digest].replace(b"low", b"bad")
    with pytest.raises(Mismatch):
        find(source, open_image(source, "a", "1"), ["/a/b"], LIMIT)


@pytest.mark.slow
def test_a_broken_connection_goes_on_where_it_broke() -> None:
    source = Memory(step=4000, breaks=3)
    source.image([tar(file("z", "z" * 40_000), A)])
    source.breaks = 3
    found = find(source, open_image(source, "a", "1"), ["/a/b"], LIMIT)
    assert found and found.raw == b"low" and source.breaks == 0
    assert source.read < 70_000, "nothing is read twice"


# ---- the image


def test_the_manifest_of_an_image_and_the_places_it_may_lie_in() -> None:
    source = Memory()
    digest = source.image(nim_layers(SHAPE2))
    found = find_manifest(source, "nim", "1")
    assert (found.raw, found.path, found.image) == (SHAPE2, f"/{PLACE}", digest) and found.layer == digest_of(nim_layers(SHAPE2)[1])
    second = tar(Entry("etc/nim/config/model_manifest.yaml", b"second"))
    source.image([second], "2")
    assert find_manifest(source, "nim", "2").raw == b"second"
    source.image([second, *nim_layers(SHAPE2)], "3", {"Env": ["PATH=/", "NIM_MANIFEST_PATH=/etc/nim/config/../config/model_manifest.yaml"]})
    assert find_manifest(source, "nim", "3").raw == b"second", "the image's own variable comes first"
    source.image(nim_layers(SHAPE2), "4", {"Env": ["NIM_MANIFEST_PATH=/not/there"]})
    assert find_manifest(source, "nim", "4").raw == SHAPE2


@pytest.mark.parametrize(
    ("config", "reason"), [({}, "manifest_file"), ({"Labels": {PROTOCOL_LABEL: "native-v1"}}, "native"), ({"Env": 1, "Labels": []}, "manifest_file")]
)
def test_images_without_one(config: dict[str, Any], reason: str) -> None:
    source = Memory()
    source.image([tar(A)], config=config)
    with pytest.raises(NotFound) as error:
        find_manifest(source, "nim", "1")
    assert error.value.reason == reason


def index(source: Memory, ref: str, *children: tuple[str, str], **more: Any) -> str:
    entries = []
    for digest, platform in children:
        entry: dict[str, Any] = {"mediaType": MANIFEST, "digest": digest, "size": len(source.manifests[digest])}
        if platform:
            entry["platform"] = dict(zip(("os", "architecture"), platform.split("/"), strict=True))
        if platform == "unknown/unknown":
            entry["annotations"] = {"vnd.docker.reference.type": "attestation-manifest"}
        entries.append(entry)
    raw = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries, **more}).encode()
    source.manifests[ref] = source.manifests[digest_of(raw)] = raw
    return digest_of(raw)


def test_the_platform_of_an_index() -> None:
    source = Memory()
    arm, amd, proof = (source.image([tar(file("a/b", name))]) for name in ("arm", "amd", "proof"))
    index(source, "both", (proof, "unknown/unknown"), (arm, "linux/arm64"), (amd, "linux/amd64"))
    index(source, "arm", (arm, "linux/arm64"), (proof, "unknown/unknown"))
    index(source, "unnamed", (amd, ""))

    def of(ref: str, platform: str = "") -> str:
        return open_image(source, "nim", ref, platform).digest

    assert (of("both"), of("both", "linux/arm64"), of("arm"), of("unnamed")) == (amd, arm, arm, amd)
    with pytest.raises(NotFound, match="linux/arm64, linux/amd64"):
        of("both", "linux/riscv64")
    index(source, "proofs", (proof, "unknown/unknown"))
    with pytest.raises(NotFound):
        of("proofs")
    nested = amd
    for i in range(6):
        nested = index(source, f"nested{i}", (nested, "linux/amd64"))
    assert of("nested1") == amd
    with pytest.raises(AirlockError, match="nests"):
        of("nested5")


def test_what_is_no_image() -> None:
    source = Memory()
    raw = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": "x/y", "digest": source.put(b"{}"), "size": 2},
            "layers": [],
        }
    )
    source.manifests["1"] = raw.encode()
    with pytest.raises(Invalid, match="no container image"):
        open_image(source, "a", "1")


# ---- against a real tool

NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@st.composite
def layer(draw: st.DrawFn) -> list[Entry]:
    """A layer as builders write it: whiteouts first, then directories before what is in them; no name twice."""
    hidden = draw(st.lists(st.tuples(PATHS, st.booleans()), max_size=2))
    entries: dict[str, Entry] = {}
    for path in draw(st.lists(PATHS, max_size=4)):
        kind = draw(st.sampled_from(["file", "file", "dir", "link"]))
        above = [path.rsplit("/", i)[0] for i in range(1, path.count("/") + 1)]
        if path in entries or any(p in entries and entries[p].kind != DIR for p in above) or any(e.startswith(path + "/") for e in entries):
            continue
        for parent in reversed(above):
            entries.setdefault(parent, Entry(parent, kind=DIR))
        target = draw(st.sampled_from(["a", "b", "c/a"]))
        entries[path] = {
            "file": Entry(path, draw(st.binary(max_size=3))),
            "dir": Entry(path, kind=DIR),
            "link": Entry(path, kind=LINK, target=target),
        }[kind]
    marks = []
    for path, opaque in hidden:
        parent, _, name = path.rpartition("/")
        if any(p in entries and entries[p].kind != DIR for p in [path.rsplit("/", i)[0] for i in range(1, path.count("/") + 1)]):
            continue
        if opaque and path in entries and entries[path].kind == DIR:
            marks.append(Entry(f"{path}/.wh..wh..opq"))
        elif not opaque and path not in entries:
            marks.append(Entry(f"{parent}/.wh.{name}".lstrip("/")))
    order = sorted(entries.values(), key=lambda e: e.name)
    return [*{m.name: m for m in marks}.values(), *order]


def unpacked(layers: list[bytes], folder: Path) -> Path:
    """The root file system that umoci makes of an image."""
    layout = folder / "layout"
    (layout / "blobs" / "sha256").mkdir(parents=True)
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [digest_of(raw) for raw in layers]}}
    config_raw = json.dumps(config).encode()
    doc = {"schemaVersion": 2, "config": {"mediaType": f"{IMAGE}.config.v1+json", "digest": digest_of(config_raw), "size": len(config_raw)}}
    doc["layers"] = [{"mediaType": f"{IMAGE}.layer.v1.tar", "digest": digest_of(raw), "size": len(raw)} for raw in layers]
    raw = json.dumps(doc).encode()
    for data in (config_raw, raw, *layers):
        (layout / "blobs" / "sha256" / digest_of(data)[7:]).write_bytes(data)
    entry = {"mediaType": MANIFEST, "digest": digest_of(raw), "size": len(raw), "annotations": {"org.opencontainers.image.ref.name": "1"}}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    rootless = ["--rootless"] if os.geteuid() else []
    done = subprocess.run(
        ["umoci", "unpack", *rootless, "--image", f"{layout}:1", str(folder / "bundle")], capture_output=True, text=True, check=False
    )
    assume("too many levels of symbolic links" not in done.stderr)  # umoci unpacks no entry below a link that goes round
    assert done.returncode == 0, done.stderr
    return folder / "bundle" / "rootfs"


ALL = [f"/{'/'.join(p)}" for n in (1, 2, 3) for p in itertools.product("abc", repeat=n)]


@pytest.mark.full
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(layers=st.lists(layer(), min_size=1, max_size=4))
def test_the_view_is_that_of_umoci(layers: list[list[Entry]], tmp_path: Path) -> None:
    """Every path of a small world, whether it is a file and with which bytes, as umoci unpacks the same image."""
    if shutil.which("umoci") is None:
        missing("umoci")
    raw = [tar(*entries) for entries in layers]
    folder = tmp_path / os.urandom(6).hex()
    folder.mkdir()
    try:
        root = unpacked(raw, folder)
        source = Memory(step=100_000)
        source.image(raw)
        image = open_image(source, "a", "1")
        for path in ALL:
            found = find_or_refused(source, image, path)
            real = root / path[1:]
            try:
                wanted = real.read_bytes() if real.is_file() else None
            except OSError:
                wanted = None
            assert found == wanted, (path, layers)
    finally:
        shutil.rmtree(folder)


def find_or_refused(source: Memory, image: Image, path: str) -> bytes | None:
    """A path that goes round in links is none for whoever opens it, and is refused here."""
    try:
        found = find(source, image, [path], LIMIT)
    except Invalid as error:
        assert "links" in error.what
        return None
    return found.raw if found else None


@pytest.mark.slow
def test_memory_is_flat_however_large_a_layer_is() -> None:
    """600 MB of content in 20,000 entries, and the file at the end, in a process whose memory is bounded."""
    code = """
    import sys, tarfile
    from tests.unit.test_image_layers import Memory
    from artifact import layers
    from artifact.store import Descriptor
    from artifact.digest import new
    head = lambda n, s: tarfile.TarInfo(n).tobuf() if not s else (lambda i: (setattr(i, 'size', s), i.tobuf())[1])(tarfile.TarInfo(n))
    body = bytes(30720)
    def parts():
        for i in range(20000):
            yield head(f'lib/file{i}', len(body)) + body
        yield head('a/b', 3) + b'low'.ljust(512, b'\\0') + bytes(1024)
    hasher, size = new(), 0
    for part in parts():
        hasher.update(part); size += len(part)
    class Source:
        def read_manifest(self, repo, ref): raise AssertionError
        def stream(self, repo, digest, lo, hi): yield from parts()
    def peak():  # of this program alone: getrusage tells what the process was before exec, too
        return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))
    before = peak()
    image = layers.Image('a', 'sha256:' + '0' * 64, (Descriptor('x', hasher.digest(), size),), {}, {})
    found = layers.find(Source(), image, ['/a/b'], 100)
    assert found.raw == b'low'
    print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 1024, f"{done.stdout} KiB more"
