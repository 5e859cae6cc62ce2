"""NIM images for the tests: a tar writer of their own, pushed to a running registry, and the three shapes of model manifests."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.contracts.doors import MANIFEST, Door, sha

IMAGE = "application/vnd.oci.image"
PLACE = "opt/nim/etc/default/model_manifest.yaml"
SHAPE0 = b"""model_profile: MolMIM
manifest:
  - id: MolMIM
    model: MolMIM
    nim_name: nvidia/molmim
    release: '1.0.0'
    tags: {backend: pytorch}
    workspace:
      components:
      - {dst: 'models/', src: {repo_id: 'nim/nvidia/molmim:1.3'}}
  - 0a1b:
      tags: {backend: onnx, precision: fp16, batch: 8, fast: true}
"""
SHAPE1 = b"""03fdb4d11f01be10c31b00e7c0540e2835e89a0079b483ad2dd3c25c8cc29b61:
  model: meta/llama3-70b-instruct
  release: '1.0.0'
  tags: {feat_lora_max_rank: '32', gpu: L40S, gpu_device: '26b5:10de', llm_engine: tensorrt_llm,
    pp: '1', precision: fp16, profile: throughput, tp: '8'}
  container_url: nvcr.io/nim/meta/llama3-70b-instruct:1.0.0
  workspace: !workspace
    components:
    - dst: trtllm_engine
      src:
        repo_id: nim/meta/llama3-70b-instruct
        files: [ !name 'LICENSE.txt', !name 'config.json' ]
    - dst: ''
      src: {repo_id: 'ngc://nim/meta/llama3-70b-instruct:hf', files: [ !name 'config.json' ]}
72972bc1f4dc3f79aff74aa6a9a26d24d27d6f9c74c455dc904b2a2a20f156d2:
  tags: {backend: tensorrt, key: NVIDIA-A10G_10.0.1_12, precision: fp16, product_name_regex: "^NVIDIA-A10(?!0).*"}
"""
SHAPE2 = b"""schema_version: 2.0.0
profile_selection_criteria: default
profiles:
- id: ee0d01aa
  tags: {gpu: A100, gpu_device: '20b2:10de', llm_engine: tensorrt_llm, number_of_gpus: '1', pp: '1', precision: bf16, profile: throughput, tp: '1'}
  workspace:
    files:
      LICENSE: {uri: "ngc://nim/qwen/qwen-2.5-7b-instruct:hf-bb46c15-jet?file=LICENSE"}
      trtllm_engine/rank0.engine:
        uri: ngc://nim/qwen/qwen-2.5-7b-instruct:a100x1-throughput-precision.bf16-udrspesh5q?file=rank0.engine
        checksum: 00000000000000000000000000000000000000000000000000000000000000ff
- id: 1d7b60aa
  tags: {feat_lora: 'false', llm_engine: tensorrt_llm, pp: '1', precision: bf16, tp: '8', trtllm_buildable: 'true'}
  workspace: {files: {config.json: {uri: "ngc://nim/meta/llama-3.3-70b-instruct:hf-5825c91?file=config.json"}}}
- id: c84b2a0a
  tags: {feat_lora: 'false', llm_engine: vllm, pp: '1', precision: bf16, tp: '4'}
"""


@dataclass(frozen=True)
class Entry:
    """One entry of a layer: a file with bytes, or another kind with what it points to."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    target: str = ""


def tar(*entries: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A plain tar of entries, names as they are given."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.linkname, info.mode = entry.kind, entry.target, 0o755 if entry.kind == tarfile.DIRTYPE else 0o644
            info.size = len(entry.data)
            archive.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def nim_layers(manifest: bytes) -> list[bytes]:
    """Three layers as an image has them: something below, the manifest, something above."""
    below = tar(Entry("opt", kind=tarfile.DIRTYPE), Entry("opt/nim/LICENSE", b"words"))
    above = tar(Entry("tmp/late", b"x" * 5000))
    return [gzip.compress(below, mtime=0), gzip.compress(tar(Entry(PLACE, manifest)), mtime=0), above]


def documents(layers: Iterable[bytes], config: Mapping[str, Any] | None = None) -> tuple[bytes, bytes]:
    """Image manifest and config of layers, from the lowest up."""
    config_raw = json.dumps({"architecture": "amd64", "os": "linux", "config": config or {}, "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    kinds = [("tar+gzip" if layer.startswith(b"\x1f\x8b") else "tar", layer) for layer in layers]
    doc = {"schemaVersion": 2, "mediaType": MANIFEST}
    doc["config"] = {"mediaType": f"{IMAGE}.config.v1+json", "digest": sha(config_raw), "size": len(config_raw)}  # type: ignore[assignment]
    doc["layers"] = [{"mediaType": f"{IMAGE}.layer.v1.{k}", "digest": sha(data), "size": len(data)} for k, data in kinds]  # type: ignore[assignment]
    return json.dumps(doc).encode(), config_raw


def push_image(door: Door, name: str, tag: str, layers: list[bytes], who: str = "root", config: Mapping[str, Any] | None = None) -> str:
    """Pushes an image and returns its digest."""
    raw, config_raw = documents(layers, config)
    for data in (config_raw, *layers):
        door.blob(name, data, who)
    done = door.ask("PUT", f"/v2/{name}/manifests/{tag}", raw, who, Content_Type=MANIFEST)
    assert done.status == 201, done.body
    return sha(raw)
