"""What a NIM is started with: by every way and in every format, without a secret, and in the operator's own field names."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import yaml

from artifact.errors import Invalid
from artifact.manifest import parse_reference
from artifact.nim import parse
from artifact.nim_env import FORMATS, SECRETS, WAYS, Start, docker_line, env_file, environment, nim_cache, nim_service, resource_name

HUB = b"h: {tags: {llm_engine: vllm, tp: '2', pp: '2'}, workspace: {files: {x: {uri: 'hf://acme/M:main?file=x'}, y: {uri: 'hf://acme/M:main?file=y'}}}}\n"
START = Start(
    parse_reference("nvcr.io/nim/meta/llama-3.1-8b:1.8.4"),
    parse(HUB).profiles[0],
    30 << 30,
    registry="https://registry.site:5000",
    ngc="https://ngc.site:8443/ngc/",
    s3="https://s3.site:9000",
    ca="/etc/pki/site.pem",
)
# The fields of apps.nvidia.com/v1alpha1 that are written here, with the type of each and whether its parent must have it (a *).
PVC = {"create": bool, "name": str, "storageClass": str, "size": str, "volumeAccessMode": str, "subPath": str}
PULLER = {"modelPuller*": str, "pullSecret": str, "authSecret*": str}
PROXY = {"certConfigMap": str}
CACHE: dict[str, Any] = {
    "source*": {
        "ngc": PULLER | {"model": {"profiles": list, "precision": str, "engine": str}},
        "hf": {"endpoint*": str, "namespace*": str, "modelName": str, "revision": str, "modelPuller*": str, "pullSecret*": str, "authSecret*": str},
    },
    "storage*": {"pvc": PVC},
    "env": list,
    "proxy": PROXY,
    "userID": int,
    "groupID": int,
}
SERVICE: dict[str, Any] = {
    "image*": {"repository*": str, "tag*": str, "pullPolicy": str, "pullSecrets": list},
    "authSecret": str,
    "storage": {"nimCache": {"name": str, "profile": str}, "pvc": PVC},
    "replicas": int,
    "resources": {"limits": dict},
    "expose": {"service": {"type": str, "port": int}},
    "env": list,
    "proxy": PROXY,
    "userID": int,
    "groupID": int,
}


def holds(value: Any, fields: Any, at: str = "spec") -> None:
    """Whether a resource has only fields that there are, of their types, and all that there must be."""
    if not isinstance(fields, dict):
        assert isinstance(value, fields), (at, value)
        return
    known = {name.rstrip("*"): inner for name, inner in fields.items()}
    assert isinstance(value, dict) and not value.keys() - known.keys(), (at, value)
    assert all(name[:-1] in value for name in fields if name.endswith("*")), (at, value)
    for name, inner in value.items():
        holds(inner, known[name], f"{at}.{name}")


def resource(text: str, kind: str) -> dict[str, Any]:
    found = yaml.safe_load(text)
    assert (found["apiVersion"], found["kind"]) == ("apps.nvidia.com/v1alpha1", kind) and found.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", found["metadata"]["name"])
    spec: dict[str, Any] = found["spec"]
    assert all(e.keys() == {"name", "value"} and all(isinstance(v, str) for v in e.values()) for e in spec["env"])
    return spec


@pytest.mark.parametrize("way", WAYS)
def test_the_environment_of_each_way(way: str) -> None:
    found = environment(replace(START, way=way))
    tls = {"NIM_SDK_USE_NATIVE_TLS", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"}
    own = {
        "ngc": {"NGC_API_ENDPOINT": "ngc.site:8443/ngc", "NGC_AUTH_ENDPOINT": "ngc.site:8443/ngc", "NGC_API_SCHEME": "https"},
        "offline": {},
        "s3": {"NIM_REPOSITORY_OVERRIDE": "s3://nim/", "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": "https://s3.site:9000"},
        "hf": {"HF_ENDPOINT": "https://registry.site:5000"},
    }[way]
    assert found.items() >= own.items() and found["NIM_MODEL_PROFILE"] == "h" and found["NIM_TELEMETRY_MODE"] == "0"
    assert found.keys() - own.keys() - {"NIM_MODEL_PROFILE", "NIM_TELEMETRY_MODE"} == (set() if way == "offline" else tls)
    plain = environment(replace(START, way=way, ca=""))
    assert not plain.keys() & tls


@pytest.mark.parametrize("way", WAYS)
def test_the_docker_line_is_one_command(way: str) -> None:
    words = shlex.split(docker_line(replace(START, way=way, cache="/srv/nim cache")).replace("\\\n", " "))
    assert words[:3] == ["docker", "run", "--rm"] and words[-1] == "nvcr.io/nim/meta/llama-3.1-8b:1.8.4"
    given = [words[i + 1] for i, word in enumerate(words) if word == "-e"]
    assert given == [*SECRETS[way], *(f"{k}={v}" for k, v in environment(replace(START, way=way)).items())]
    assert "/srv/nim cache:/opt/nim/.cache" in words and ("/etc/pki/site.pem:/etc/ssl/certs/airlock-ca.pem:ro" in words) == (way != "offline")
    lines = env_file(replace(START, way=way)).splitlines()
    assert lines == given


@pytest.mark.parametrize("way", ["ngc", "s3", "hf"])
def test_a_nim_cache(way: str) -> None:
    spec = resource(nim_cache(replace(START, way=way, ca="site-ca")), "NIMCache")
    holds(spec, CACHE)
    assert len(spec["source"]) == 1 and spec["storage"]["pvc"]["size"] == "45Gi" and spec["proxy"] == {"certConfigMap": "site-ca"}
    if way == "hf":
        assert spec["source"]["hf"] | {"namespace": "acme", "modelName": "M", "revision": "main"} == spec["source"]["hf"]
        assert re.match(r"^https?://.*$", spec["source"]["hf"]["endpoint"])
    else:
        assert spec["source"]["ngc"]["model"] == {"profiles": ["h"]} and spec["source"]["ngc"]["authSecret"]


@pytest.mark.parametrize("way", WAYS)
def test_a_nim_service(way: str) -> None:
    start = replace(START, way=way, ca="site-ca", cache="filled" if way == "offline" else "")
    spec = resource(nim_service(start), "NIMService")
    holds(spec, SERVICE)
    assert spec["image"]["repository"] == "nvcr.io/nim/meta/llama-3.1-8b" and spec["image"]["tag"] == "1.8.4"
    assert spec["resources"]["limits"] == {"nvidia.com/gpu": 4}
    if way == "offline":
        assert spec["storage"] == {"pvc": {"name": "filled"}} and "authSecret" not in spec and "proxy" not in spec
    else:
        assert spec["storage"] == {"nimCache": {"name": resource_name(START.image), "profile": "h"}} and spec["authSecret"] == "ngc-api-secret"


def test_words_that_yaml_would_read_otherwise_stay_words() -> None:
    odd = replace(START, image=parse_reference("nvcr.io/nim/x:1.10"), namespace="on", pull_secret="null", auth_secret="1e3", ca="")
    found = yaml.safe_load(nim_service(odd))
    assert (found["spec"]["image"]["tag"], found["metadata"]["namespace"], found["spec"]["authSecret"]) == ("1.10", "on", "1e3")


@pytest.mark.parametrize("name", ["nvcr.io/0123/7b", "7b", "a/" + "b" * 80, "nim/x_y--z"])
def test_a_resource_is_named_as_a_service_may_be(name: str) -> None:
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", resource_name(parse_reference(f"{name}:1")))


def test_an_image_that_is_not_nvidias_is_below_the_registry() -> None:
    assert replace(START, image=parse_reference("acme/nim:1")).pulled == "registry.site:5000/acme/nim:1"


@pytest.mark.parametrize(
    ("change", "make", "words"),
    [
        ({"ngc": ""}, env_file, "--ngc"),
        ({"ngc": "ngc.site"}, env_file, "--ngc"),
        ({"ngc": "https://user:secret@ngc.site"}, env_file, "--ngc"),
        ({"way": "s3", "s3": ""}, docker_line, "--s3"),
        ({"way": "offline"}, nim_cache, "nothing to fetch from"),
        ({"image": parse_reference("nvcr.io/nim/x@sha256:" + "0" * 64)}, nim_service, "by a tag"),
        (
            {"way": "hf", "profile": parse(b"n: {workspace: {files: {x: {uri: 'ngc://a/b:1?file=x'}}}}\n").profiles[0]},
            nim_cache,
            "one model of the Hub",
        ),
        ({"profile": parse(b"n: {tags: {tp: many}}\n").profiles[0]}, nim_service, "number of GPUs"),
        ({"way": "s3", "region": "x\nEVIL=1"}, env_file, "--region"),
        ({"way": "hf", "registry": "https://registry.site/\nEVIL=1"}, env_file, "--registry"),
        ({"namespace": "x\nevil: 1", "ca": ""}, nim_cache, "--namespace"),
        ({"auth_secret": "x; reboot", "ca": ""}, nim_service, "--auth-secret"),
        ({"ca": "/etc/pki/site.pem"}, nim_cache, "--ca"),
        ({"way": "offline", "cache": "/srv/cache"}, nim_service, "--cache"),
    ],
)
def test_what_cannot_be_told(change: dict[str, Any], make: Any, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        make(replace(START, **change))


def test_every_format_is_one_of_these() -> None:
    assert FORMATS == ("env", "docker", "nimcache", "nimservice")
