"""What an unmodified NIM container is started with on a closed site: its environment, a docker line, and resources of the NIM Operator; pure.

The names are those of NVIDIA's documentation and of NVIDIA/k8s-nim-operator (apps.nvidia.com/v1alpha1). A secret is named, never told: a variable
without a value is taken from the caller's own environment, a Kubernetes secret is referred to by name.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from artifact.errors import Invalid
from artifact.manifest import Reference, is_digest
from artifact.nim import NimProfile

WAYS = ("ngc", "offline", "s3", "hf")
FORMATS = ("env", "docker", "nimcache", "nimservice")
CA_PLACE = "/etc/ssl/certs/airlock-ca.pem"
CLUSTER_CA = "/etc/ssl/certs/ca-certificates.crt"  # what the operator's init container writes from spec.proxy.certConfigMap
CACHE_PLACE = "/opt/nim/.cache"
PORT = 8000
SECRETS = {"ngc": ("NGC_API_KEY",), "offline": (), "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "hf": ("HF_TOKEN",)}
GIB = 1 << 30
_WORD = re.compile(r"[!-~]*\Z")  # of one line, in an environment file and behind a # as well
_RESOURCE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")


@dataclass(frozen=True)
class Start:
    """One start of a NIM here: image, profile with the bytes of its files, by which way its files come, and this site's addresses (URLs)."""

    image: Reference
    profile: NimProfile
    size: int
    way: str = "ngc"
    registry: str = ""
    ngc: str = ""
    s3: str = ""
    bucket: str = "nim"
    region: str = "us-east-1"
    ca: str = ""  # the file of the authority on the host, or in Kubernetes the config map
    cache: str = ""  # the directory of the cache on the host, or in Kubernetes the claim
    namespace: str = "nim-service"
    pull_secret: str = "ngc-secret"  # noqa: S105 - names of secrets, as NVIDIA's samples have them
    auth_secret: str = "ngc-api-secret"  # noqa: S105

    def __post_init__(self) -> None:
        for name in ("registry", "ngc", "s3", "bucket", "region"):
            if not _WORD.match(getattr(self, name)):
                raise Invalid(f"--{name} is no single word", expected="printable ASCII without blanks", reason="word")

    @property
    def pulled(self) -> str:
        """The image as a client of this registry writes it: a name that says nvcr.io runs unchanged, others are below the registry's host."""
        text = str(self.image)
        return text if text.startswith("nvcr.io/") else f"{_host(self.registry, 'the registry')}/{text}"


def environment(start: Start, cluster: bool = False) -> dict[str, str]:
    """The variables with a value, in the order in which they are told; raises Invalid where an address is missing that the way needs."""
    out = {"NIM_MODEL_PROFILE": start.profile.id}
    if start.way == "ngc":
        host = _host(start.ngc, "the NGC listener (--ngc)")
        out |= {"NGC_API_ENDPOINT": host, "NGC_AUTH_ENDPOINT": host, "NGC_API_SCHEME": urlsplit(start.ngc).scheme}
    elif start.way == "s3":
        _host(start.s3, "the S3 listener (--s3)")
        out |= {"NIM_REPOSITORY_OVERRIDE": f"s3://{start.bucket}/", "AWS_REGION": start.region, "AWS_ENDPOINT_URL": start.s3.rstrip("/")}
    elif start.way == "hf":
        _host(start.registry, "the registry (--registry)")
        out |= {"HF_ENDPOINT": start.registry.rstrip("/")}
    if start.ca and start.way != "offline":
        place = CLUSTER_CA if cluster else CA_PLACE
        out |= {"NIM_SDK_USE_NATIVE_TLS": "1", "SSL_CERT_FILE": place, "REQUESTS_CA_BUNDLE": place, "AWS_CA_BUNDLE": place}
    return out | {"NIM_TELEMETRY_MODE": "0"}


def env_file(start: Start) -> str:
    """Lines for `docker run --env-file`; a name without = is taken from the environment of whoever runs docker."""
    return "\n".join([*SECRETS[start.way], *(f"{name}={value}" for name, value in environment(start).items())])


def docker_line(start: Start) -> str:
    """A `docker run` line; the secrets come from the environment of whoever runs it."""
    words = ["docker run --rm --gpus all --shm-size=16GB", f"-p {PORT}:{PORT}", "-u 1000:2000"]
    words.append("-v " + shlex.quote(f"{start.cache or '/var/lib/nim-cache'}:{CACHE_PLACE}"))
    if start.ca and start.way != "offline":
        words.append("-v " + shlex.quote(f"{start.ca}:{CA_PLACE}:ro"))
    words += [f"-e {name}" for name in SECRETS[start.way]]
    words += ["-e " + shlex.quote(f"{name}={value}") for name, value in environment(start).items()]
    return " \\\n  ".join([*words, shlex.quote(start.pulled)])


def nim_cache(start: Start) -> str:
    """A NIMCache that brings the one profile by the way; raises Invalid for offline, and for a Hub way whose profile is not one Hub model."""
    if start.way == "offline":
        what = "a NIMCache fetches, and this way has nothing to fetch from"
        raise Invalid(what, expected="--way ngc, s3 or hf", do="fill a claim by airlock nim export, and use --format nimservice", reason="way")
    puller = {"modelPuller": start.pulled, "pullSecret": start.pull_secret, "authSecret": start.auth_secret}
    if start.way == "hf":
        places = start.profile.places()
        if len(places) != 1 or places[0].scheme != "hf" or not places[0].org:
            what = f"profile {start.profile.id} is not one model of the Hub"
            raise Invalid(what, expected="files of one hf:// model", do="use --way ngc or s3", reason="way")
        at = places[0]
        hub = {"endpoint": start.registry.rstrip("/"), "namespace": at.org, "modelName": at.model, "revision": at.version or "main"}
        source: dict[str, object] = {"hf": hub | puller}
    else:
        source = {"ngc": puller | {"model": {"profiles": [start.profile.id]}}}
    claim = {"create": True, "storageClass": "", "size": f"{_gib(start.size)}Gi", "volumeAccessMode": "ReadWriteOnce"}
    spec: dict[str, object] = {"source": source, "storage": {"pvc": claim}, "userID": 1000, "groupID": 2000}
    return _resource("NIMCache", start, spec)


def nim_service(start: Start) -> str:
    """A NIMService on the NIMCache of the same name, or for the offline way on a claim that was filled by an export; raises Invalid."""
    if is_digest(start.image.ref):
        raise Invalid("a NIMService names its image by a tag", expected="NAME:TAG", do="name the image by its tag", reason="image")
    repository = start.pulled[: -len(start.image.ref) - 1]
    image = {"repository": repository, "tag": start.image.ref, "pullPolicy": "IfNotPresent", "pullSecrets": [start.pull_secret]}
    storage: dict[str, object] = {"nimCache": {"name": resource_name(start.image), "profile": start.profile.id}}
    if start.way == "offline":
        storage = {"pvc": {"name": start.cache or f"{resource_name(start.image)}-cache"}}
    spec: dict[str, object] = {"image": image, **({} if start.way == "offline" else {"authSecret": start.auth_secret}), "storage": storage}
    spec |= {"replicas": 1, "resources": {"limits": {"nvidia.com/gpu": _gpus(start.profile.tags)}}, "userID": 1000, "groupID": 2000}
    return _resource("NIMService", start, spec | {"expose": {"service": {"type": "ClusterIP", "port": PORT}}})


def resource_name(image: Reference) -> str:
    """A name that Kubernetes accepts (RFC 1035, as a service has it), from the last two parts of the image's."""
    found = re.sub(r"[^a-z0-9]+", "-", "-".join(image.name.split("/")[-2:])).strip("-")
    return (found if found[:1].isalpha() else f"nim-{found}")[:50].rstrip("-")


def _resource(kind: str, start: Start, spec: Mapping[str, object]) -> str:
    """One resource as YAML, below the commands that make what it refers to; raises Invalid for a name that Kubernetes has none of."""
    names = {"--namespace": start.namespace, "--pull-secret": start.pull_secret, "--auth-secret": start.auth_secret, "--ca": start.ca or "x"}
    if start.way == "offline":
        names = names | {"--ca": "x", "--cache": start.cache or "x"}
    for option, name in names.items():
        if not _RESOURCE.match(name):
            raise Invalid(f"{option} {name[:60]!r} is no name in Kubernetes", expected="a-z, 0-9, . and - (RFC 1123)", reason="resource")
    env = [{"name": name, "value": value} for name, value in environment(start, cluster=True).items()]
    whole = {**spec, "env": env}
    told = [
        f"kubectl -n {start.namespace} create secret docker-registry {start.pull_secret} --docker-server="
        + start.pulled.split("/", 1)[0]
        + " --docker-username='$oauthtoken' --docker-password=\"$AIRLOCK_KEY\""
    ]
    if SECRETS[start.way]:
        pairs = " ".join(f'--from-literal={name}="${name}"' for name in SECRETS[start.way])
        told.append(f"kubectl -n {start.namespace} create secret generic {start.auth_secret} {pairs}")
    if start.ca and start.way != "offline":
        whole["proxy"] = {"certConfigMap": start.ca}
        told.append(f"kubectl -n {start.namespace} create configmap {start.ca} --from-file=ca.crt=CA_FILE")
    body = {
        "apiVersion": "apps.nvidia.com/v1alpha1",
        "kind": kind,
        "metadata": {"name": resource_name(start.image), "namespace": start.namespace},
        "spec": whole,
    }
    return "\n".join([*(f"# {line}" for line in told), *_yaml(body)])


def _yaml(value: Mapping[str, object], depth: int = 0) -> list[str]:
    """Block YAML whose words are JSON strings, which YAML 1.2 reads as they are."""
    out, pad = [], "  " * depth
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            out += [f"{pad}{key}:", *_yaml(inner, depth + 1)]
        elif isinstance(inner, list):
            out += [f"{pad}{key}:", *(f"{pad}  - {json.dumps(item)}" for item in inner)]
        else:
            out.append(f"{pad}{key}: {json.dumps(inner)}")
    return out


def _gpus(tags: Mapping[str, str]) -> int:
    """GPUs that a profile runs on, by its own count or its parallelism; raises Invalid for tags that are no numbers."""
    words = [tags["number_of_gpus"]] if tags.get("number_of_gpus") else [tags.get("tp") or "1", tags.get("pp") or "1"]
    if not all(re.fullmatch("[0-9]{1,4}", word) for word in words):
        raise Invalid(
            f"the profile's number of GPUs is {' x '.join(words)[:60]}", expected="whole numbers in tp, pp and number_of_gpus", reason="profile"
        )
    count = 1
    for word in words:
        count *= int(word)
    return max(count, 1)


def _gib(size: int) -> int:
    """A claim for files and what a NIM makes beside them: half as much again, at least 10 GiB."""
    return max(10, -(-size * 3 // (2 * GIB)))


def _host(url: str, what: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise Invalid(f"the address of {what} is {url[:200]!r}", expected="http[s]://HOST[:PORT]", reason="url")
    return parts.netloc + parts.path.rstrip("/")
