"""The model manifest of a NIM image in each of its three shapes, out of the layers of an image in a running registry: the bytes as they are.

By the command that a site has for it (`airlock nim profiles --manifest`), from an image that was pushed, and from one that was mirrored and came over
the gap. What the merged view of layers is, tests/unit/test_image_layers.py says.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact.nim import parse
from tests.contracts.doors import INDEX, MANIFEST, Door, sha
from tests.contracts.ngc import FILES, NgcDoor, door, ngc_serving
from tests.contracts.nim_images import PLACE, SHAPE0, SHAPE1, SHAPE2, Entry, push_image, tar
from tests.flows.test_ngc_flow import imported
from tests.flows.test_ngc_source import sync
from tests.flows.test_sync import make_home, plan_file

__all__ = ["door"]  # a fixture
pytestmark = pytest.mark.server
AIRLOCK = str(Path(sys.executable).parent / "airlock")
# What a parser and a printer would not give back: a mark before the text, blanks at the ends of lines, other line ends, no last one.
SHAPES = [b"\xef\xbb\xbf# shipped as it is: \xc3\xbc \r\n" + raw.replace(b"\n", b"  \r\n") + b"# end" for raw in (SHAPE0, SHAPE1, SHAPE2)]
SECOND = "etc/nim/config/model_manifest.yaml"
FOLDER = PLACE.rpartition("/")[0]
HIDE, OPAQUE = Entry(f"{FOLDER}/.wh.model_manifest.yaml"), Entry(f"{FOLDER}/.wh..wh..opq")


def packed(*entries: Entry) -> bytes:
    return gzip.compress(tar(*entries), mtime=0)


# The layers of an image, from the lowest up, with the manifest that counts and others that do not.
ARRANGED: dict[str, Callable[[bytes, bytes], list[bytes]]] = {
    "in one layer": lambda raw, other: [packed(Entry(PLACE, raw))],
    "the topmost wins": lambda raw, other: [packed(Entry(PLACE, other)), tar(Entry("tmp/x", b"x")), packed(Entry(PLACE, raw)), packed(Entry("z"))],
    "hidden, and made again": lambda raw, other: [packed(Entry(PLACE, other)), packed(HIDE), tar(Entry(PLACE, raw))],
    "an opaque folder with another one": lambda raw, other: [packed(Entry(PLACE, other)), packed(OPAQUE, Entry(PLACE, raw))],
    "the first place hidden, the second counts": lambda raw, other: [packed(Entry(PLACE, other), Entry(SECOND, raw)), packed(HIDE)],
    "behind a link": lambda raw, other: [packed(Entry("data/m.yaml", raw)), packed(Entry(PLACE, kind=tarfile.SYMTYPE, target="/data/m.yaml"))],
}


def told(door: Door, image: str, *words: str) -> bytes:
    """What the command prints of an image."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("AIRLOCK_")} | {"AIRLOCK_KEY": door.keys["root"]}
    argv = [AIRLOCK, "nim", "profiles", image, "--registry", door.url, *words]
    done = subprocess.run(argv, env=env, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("shape", [0, 1, 2])
def test_a_manifest_comes_out_of_the_layers_as_it_went_in(door: NgcDoor, shape: int, arranged: str) -> None:
    name, raw = f"nvcr.io/nim/shape{shape}/a{list(ARRANGED).index(arranged)}", SHAPES[shape]
    layers = ARRANGED[arranged](raw, SHAPES[(shape + 1) % 3])
    push_image(door.main, name, "1", layers)
    assert told(door.main, f"{name}:1", "--manifest") == raw


@pytest.mark.parametrize("shape", [0, 1, 2])
def test_what_is_told_of_a_manifest_is_what_its_bytes_say(door: NgcDoor, shape: int) -> None:
    layers = ARRANGED["the topmost wins"](SHAPES[shape], SHAPES[(shape + 1) % 3])
    digest = push_image(door.main, f"nvcr.io/nim/shape{shape}/facts", "1", layers)
    facts = json.loads(told(door.main, f"nvcr.io/nim/shape{shape}/facts@{digest}", "--json"))
    assert (facts["shape"], facts["digest"], facts["layer"], facts["manifest"]) == (shape, digest, sha(layers[2]), f"/{PLACE}")
    assert [p["id"] for p in facts["profiles"]] == [p.id for p in parse(SHAPES[shape]).profiles] != []


@pytest.mark.parametrize("shape", [0, 1, 2])
def test_the_manifest_of_one_platform_of_an_index(door: NgcDoor, shape: int) -> None:
    name, entries = f"nvcr.io/nim/shape{shape}/both", []
    for at, architecture in ((shape + 1, "arm64"), (shape, "amd64")):
        digest = push_image(door.main, name, architecture, [packed(Entry(PLACE, SHAPES[at % 3]))])
        size = len(door.main.ask("GET", f"/v2/{name}/manifests/{digest}", None, "root").body)
        entries.append({"mediaType": MANIFEST, "digest": digest, "size": size, "platform": {"os": "linux", "architecture": architecture}})
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
    assert door.main.ask("PUT", f"/v2/{name}/manifests/1", index, "root", Content_Type=INDEX).status == 201
    assert told(door.main, f"{name}:1", "--manifest") == SHAPES[shape]
    assert told(door.main, f"{name}:1", "--manifest", "--platform", "linux/arm64") == SHAPES[(shape + 1) % 3]


# What three images ask for, each in the shape of its time, of one version that the upstream has.
WANTED = [
    b"model_profile: Tiny\r\nmanifest:\r\n- id: tiny # by name\r\n  workspace:\r\n    components:\r\n"
    b"    - {dst: 'models/', src: {repo_id: 'nim/meta/llama:fp16'}}\r\n",
    b"tiny:\n  tags: {backend: triton}\n  workspace: !workspace\n    components:\n"
    b"    - {dst: '', src: {repo_id: nim/meta/llama:fp16, files: [!name config.json, !name 'empty.txt']}}",
    b"schema_version: 2.0.0\nprofiles:\n- id: tiny\n  workspace:\n    files:\n"
    b'      a/config.json: {uri: "ngc://nim/meta/llama:fp16?file=config.json"}\n\n\n',
]
BROUGHT: list[dict[str, bytes]] = [
    {f"models/{path}": raw for path, raw in FILES.items()},
    {path: FILES[path] for path in ("config.json", "empty.txt")},
    {"a/config.json": FILES["config.json"]},
]


def test_manifests_of_all_shapes_come_over_the_gap_as_they_are(door: NgcDoor, tmp_path: Path) -> None:
    """The registry is the upstream: images by its main listener, models by that of the NGC API; what each manifest names is brought with it."""
    home, digests, items = make_home(tmp_path / "mirror"), [], list[dict[str, Any]]()
    for shape, raw in enumerate(WANTED):
        name = f"nvcr.io/nim/gap/shape{shape}"
        layers = [packed(Entry(PLACE, SHAPES[shape])), packed(HIDE), packed(Entry(PLACE, raw), Entry("z", b"z"))]
        digests.append(push_image(door.main, name, "1", layers))
        source = {"source": f"nim://127.0.0.1:{door.main.port}/{name}:1", "as": name, "plain_http": True, "profiles": ["tiny"]}
        items.append(source | {"endpoint": door.url, "auth_endpoint": door.url, "key_env": "NGC_KEY"})
    report = sync(home, plan_file(tmp_path, *items), door.main.keys["root"])
    assert [item["status"] for item in report["items"]] == ["synced"] * 3
    pack = [AIRLOCK, "bundle", "pack", "--to", str(tmp_path / "medium"), "--home", str(home)]
    assert subprocess.run(pack, capture_output=True, timeout=120, check=False).returncode == 0
    data, keys = imported(tmp_path, home)
    with ngc_serving(data, keys) as here:
        for shape, raw in enumerate(WANTED):
            image = f"nvcr.io/nim/gap/shape{shape}"
            assert told(here.main, f"{image}:1", "--manifest") == raw
            facts = json.loads(told(here.main, f"{image}:1", "--json"))
            assert (facts["shape"], facts["digest"]) == (shape, digests[shape]), "the image is the one that was pushed"
            assert [(p["id"], p["here"]) for p in facts["profiles"]] == [("tiny", True)]
            folder = tmp_path / f"shape{shape}"
            env = {k: v for k, v in os.environ.items() if not k.startswith("AIRLOCK_")} | {"AIRLOCK_KEY": keys["root"]}
            argv = [AIRLOCK, "nim", "export", str(folder), f"{image}:1", "tiny", "--form", "directory", "--registry", here.main.url]
            done = subprocess.run(argv, env=env, capture_output=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            assert found == BROUGHT[shape]
