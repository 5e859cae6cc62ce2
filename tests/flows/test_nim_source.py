"""Items `nim://`: the image, and exactly the model versions and files that the chosen profiles of the manifest in its layers name."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from artifact.layers import PLACES
from artifact.nim import parse
from mirror.home import MirrorHome
from mirror.nim import select
from tests.flows.test_fake_hub import TOKEN, hub, make_repo
from tests.flows.test_fake_ngc import PERSONAL, Ngc, contents, make_image, make_model, ngc
from tests.flows.test_ngc_source import model_of, sync
from tests.flows.test_sync import make_home, plan_file

IDS = {name: (name + "0" * 64)[:64] for name in ("aa", "bb", "cc", "dd")}
MODEL = "nim/meta/llama3-8b-instruct"
NAME = f"ngc/{MODEL}"
COMMIT = "ab" * 20


def manifest(**changes: str) -> bytes:
    """A model manifest of the shape with a list of profiles: two of one version, one with an engine of another, one of the Hub."""

    def uri(file: str, version: str = "hf") -> dict[str, str]:
        raw = changes.get(file, "") or blake3(contents()[file]).hexdigest()
        return {"uri": f"ngc://{MODEL}:{version}?file={file}", "checksum": raw}

    tags = {"llm_engine": "vllm", "precision": "bf16", "pp": "1", "feat_lora": "false"}
    profiles = [
        {"id": IDS["aa"], "tags": tags | {"tp": "1"}, "workspace": {"files": {f: uri(f) for f in ("config.json", "model.safetensors")}}},
        {"id": IDS["bb"], "tags": tags | {"tp": "2"}, "workspace": {"files": {f: uri(f) for f in ("config.json", "README.md")}}},
        {
            "id": IDS["cc"],
            "tags": tags | {"tp": "1", "llm_engine": "tensorrt_llm", "gpu": "H100", "profile": "latency"},
            "workspace": {"files": {"LICENSE": uri("README.md"), "trtllm_engine/rank0.engine": uri("model.safetensors", "engine-1")}},
        },
        {
            "id": IDS["dd"],
            "tags": tags | {"tp": "4"},
            "workspace": {"files": {f: {"uri": f"hf://Acme/Tiny-Llama:main?file={f}"} for f in ("config.json", "sub/note with space.txt")}},
        },
    ]
    return json.dumps({"schema_version": "2.0", "profile_selection_criteria": "default", "profiles": profiles}).encode()


def layer(files: dict[str, bytes]) -> bytes:
    """A gzipped tar of files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, raw in files.items():
            info = tarfile.TarInfo(path.lstrip("/"))
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return gzip.compress(out.getvalue(), mtime=0)


def cloud_with(root: Path, raw: bytes, image: str = "nim/meta/llama3-8b-instruct", **facts: Any) -> None:
    """The image with this manifest, and the versions that it names."""
    make_model(root, MODEL, "hf", **facts)
    make_model(root, MODEL, "engine-1", **facts)
    make_model(root, MODEL, "unused", **facts)
    make_image(root, image, [layer({"usr/bin/app": b"x" * 200_000}), layer({PLACES[0]: raw}), layer({"etc/other": b"y"})], "1.0.3")
    told = json.loads((root / "cloud.json").read_text())
    for key in told["keys"].values():
        key["shared"] = ["nim"]
    (root / "cloud.json").write_text(json.dumps(told))


def item(cloud: Ngc, *profiles: str, image: str = "nim/meta/llama3-8b-instruct", **more: Any) -> dict[str, Any]:
    source = {"source": f"nim://{cloud.nvcr.removeprefix('http://')}/{image}:1.0.3", "as": f"nvcr.io/{image}", "plain_http": True}
    return source | {"profiles": list(profiles), "endpoint": cloud.api, "auth_endpoint": cloud.authn, "key_env": "NGC_KEY"} | more


def names(home: Path) -> set[tuple[str, str]]:
    return {(n.name, n.ref) for n in MirrorHome.open(home).names() if len(n.ref) < 40}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["all"], "aa bb cc dd"),
        ([IDS["bb"]], "bb"),
        (["vllm-bf16-tp1"], "aa"),
        (["llm_engine=vllm"], "aa bb dd"),
        (["llm_engine=vllm, tp=2", "gpu=H100"], "bb cc"),
        (["tp=1"], "aa cc"),
    ],
)
def test_selectors(words: list[str], found: str) -> None:
    assert [p.id for p in select(parse(manifest()), words)] == [IDS[name] for name in found.split()]


@pytest.mark.server
def test_only_the_files_of_the_chosen_profiles_are_brought(tmp_path: Path) -> None:
    cloud_with(tmp_path / "ngc", manifest())
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        plan = plan_file(tmp_path, item(cloud, "vllm-bf16-tp1"))
        planned = sync(home, plan, dry="yes")
        assert planned["items"][0]["status"] == "planned" and not names(home)
        (done,) = sync(home, plan)["items"]
        assert names(home) == {("nvcr.io/nim/meta/llama3-8b-instruct", "1.0.3"), (NAME, "hf")}
        assert model_of(home, NAME, "hf") == {f: contents()[f] for f in ("config.json", "model.safetensors")}
        size = sum(len(contents()[f]) for f in ("config.json", "model.safetensors"))
        assert (
            done["chosen"]
            == planned["items"][0]["chosen"]
            == [
                {"profile": IDS["aa"], "description": "vllm-bf16-tp1", "files": 2, "bytes": size},
                {"model": f"{NAME}:hf", "files": 2, "bytes": size},
            ]
        )
        assert done["size"] == planned["items"][0]["size"] > size
        assert sync(home, plan)["items"][0]["status"] == "unchanged"
        # each layer crossed the wire once, though it was read for the manifest and copied with the image
        blobs = [e["path"] for e in cloud.requests("files") if e["path"].removeprefix("/").isalnum() and len(e["path"]) == 65]
        assert len(blobs) == len(set(blobs)) == 4


@pytest.mark.server
def test_a_profile_may_span_versions_and_items_share_them(tmp_path: Path) -> None:
    cloud_with(tmp_path / "ngc", manifest())
    make_image(tmp_path / "ngc", "nim/meta/other", [layer({PLACES[1]: manifest()})], "1.0.3")
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        plan = plan_file(tmp_path, item(cloud, "gpu=H100", "tp=2"), item(cloud, "vllm-bf16-tp1", image="nim/meta/other"))
        report = sync(home, plan)
        assert report["failed"] == 0
        assert set(model_of(home, NAME, "hf")) == {"README.md", "config.json", "model.safetensors"}  # what both items need, under one digest
        assert set(model_of(home, NAME, "engine-1")) == {"model.safetensors"}
        digests = {n["digest"] for i in report["items"] for n in i["names"] if (n["name"], n["ref"]) == (NAME, "hf")}
        assert len(digests) == 1
        assert [i["status"] for i in sync(home, plan)["items"]] == ["unchanged"] * 2


@pytest.mark.server
def test_an_image_that_is_refused_changes_nothing_for_another(tmp_path: Path) -> None:
    cloud_with(tmp_path / "ngc", manifest())
    files = {"none.bin": {"uri": f"ngc://{MODEL}:hf?file=none.bin"}, "x": {"uri": f"ngc://{MODEL}?file=x"}}
    make_image(tmp_path / "ngc", "nim/meta/bad", [layer({PLACES[0]: json.dumps({"bad": {"workspace": {"files": files}}}).encode()})], "1.0.3")
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        bad, good = sync(home, plan_file(tmp_path, item(cloud, "bad", image="nim/meta/bad"), item(cloud, IDS["aa"])), code=6)["items"]
    assert "names no version" in bad["error"]["what"] and good["status"] == "synced", good


@pytest.mark.server
def test_an_image_takes_nothing_from_what_is_mirrored_already(tmp_path: Path) -> None:
    cloud_with(tmp_path / "ngc", manifest())
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        sync(home, plan_file(tmp_path, item(cloud, "tp=2")))
        assert set(model_of(home, NAME, "hf")) == {"README.md", "config.json"}
        sync(home, plan_file(tmp_path, item(cloud, IDS["aa"])))
        assert set(model_of(home, NAME, "hf")) == {"README.md", "config.json", "model.safetensors"}
        own = {"source": f"ngc://{MODEL}:hf", "endpoint": cloud.api, "key_env": "NGC_KEY"}
        digest = sync(home, plan_file(tmp_path, own))["items"][0]["names"][0]["digest"]
        report = sync(home, plan_file(tmp_path, item(cloud, IDS["aa"])))
        assert digest in {n["digest"] for n in report["items"][0]["names"]} and model_of(home, NAME, "hf") == contents()


@pytest.mark.server
def test_models_of_the_hub_with_a_key_of_their_own(tmp_path: Path) -> None:
    cloud_with(tmp_path / "ngc", manifest())
    folder = make_repo(tmp_path / "repos", "Acme/Tiny-Llama", private=True)
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud, hub(tmp_path / "repos", tmp_path / "hublog") as running:
        wanted = item(cloud, "tp=4", hub_endpoint=running.endpoint, hub_key_env="HF_TOKEN")
        assert sync(home, plan_file(tmp_path, wanted), HF_TOKEN=TOKEN)["failed"] == 0
        assert not [e for e in running.requests() if PERSONAL in json.dumps(e)]
    assert model_of(home, "hf/acme/tiny-llama", "main") == {f: (folder / f).read_bytes() for f in ("config.json", "sub/note with space.txt")}


@pytest.mark.server
def test_what_is_refused_before_a_model_is_fetched(tmp_path: Path) -> None:
    cloud_with(tmp_path / "ngc", manifest())
    pinned = {"pinned": {"workspace": {"files": {"config.json": {"uri": f"hf://acme/tiny:{COMMIT}?file=config.json"}}}}}
    make_image(tmp_path / "ngc", "nim/meta/pinned", [layer({PLACES[0]: json.dumps(pinned).encode()})], "1.0.3")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        own = {"source": f"ngc://{MODEL}:hf", "endpoint": cloud.api, "key_env": "NGC_KEY"}
        for number, (items, code, words) in enumerate(
            [
                ([item(cloud, "vllm-fp8-tp1")], 3, "vllm-bf16-tp2"),
                ([item(cloud, "llm_engine=sglang")], 3, "llm_engine=tensorrt_llm"),
                ([item(cloud, "tp=1"), own], 6, "which is an item of its own"),
                (
                    [item(cloud, "pinned", image="nim/meta/pinned"), {"source": f"hf://acme/tiny@{COMMIT}", "endpoint": cloud.api}],
                    6,
                    "which is an item of its own",
                ),
            ]
        ):
            home = make_home(tmp_path / f"mirror-{number}")
            error = sync(home, plan_file(tmp_path, *items), code=code)["items"][0]["error"]
            assert words in json.dumps(error), error
            assert not [n for n, _ in names(home) if n.startswith("nvcr.io")]


@pytest.mark.server
@pytest.mark.parametrize("lacks", ["sha256", "none"])
def test_the_image_is_believed_about_its_files_and_nobody_else(tmp_path: Path, lacks: str) -> None:
    """The manifest's checksum of a file holds against what NGC serves, whether or not NGC tells a digest."""
    cloud_with(tmp_path / "ngc", manifest(**{"model.safetensors": "ab" * 32}), no_sha256=lacks == "sha256")
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        for _ in range(2):  # what is in staging by its own digest is not believed the second time either
            error = sync(home, plan_file(tmp_path, item(cloud, IDS["aa"])), code=7)["items"][0]["error"]
            assert "BLAKE3" in error["what"] and not names(home)


@pytest.mark.server
def test_no_version_named_and_no_manifest(tmp_path: Path) -> None:
    shape1 = {IDS["aa"]: {"model": "meta/llama", "tags": {"llm_engine": "vllm", "tp": "1", "precision": "bf16"}, "workspace": {"components": [
        {"dst": "", "src": {"repo_id": MODEL, "files": ["config.json"]}}]}}}  # fmt: skip
    cloud_with(tmp_path / "ngc", json.dumps(shape1).encode())
    make_image(tmp_path / "ngc", "nim/meta/bare", [layer({"etc/other": b"y"})], "1.0.3")
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        first, second = sync(home, plan_file(tmp_path, item(cloud, "all"), item(cloud, "all", image="nim/meta/bare")), code=6)["items"]
    assert "names no version" in first["error"]["what"] and second["error"]["reason"] == "manifest_file" and not names(home)
