"""What each client must be given to pull from a registry of ours under the names that its manifests already say; pure text, made of one site's facts.

Here once, so that `airlock client config`, `airlock doctor` and the documentation tell the same. It reads no file and asks nobody.
Sources: containerd docs/hosts.md; containers-registries.conf(5), containers-auth.json(5); docker's daemon reference; docs/operations.md, Hugging Face
clients and NGC clients.
"""

from __future__ import annotations

import base64
import json
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from artifact.errors import Invalid

USER = "$oauthtoken"
NAMES = ("nvcr.io", "docker.io")  # whose content is kept here under their own name (docs/format.md, names)
_DOCKER_HUB = "https://index.docker.io/v1/"  # the name under which docker and Kubernetes keep what is for docker.io


@dataclass(frozen=True)
class Trust:
    """How one client learns of the site's authority: what works, what it ignores, and its words where it was told nothing."""

    client: str
    works: tuple[str, ...]
    ignores: tuple[str, ...]
    says: str


# Every row is tried by tests/flows/test_authorities.py, and places below /etc by test_client_config_nodes.py; docs/operations.md shows the same rows.
TRUST = (
    Trust("huggingface_hub 2.4", ("SSL_CERT_FILE",), ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), "CERTIFICATE_VERIFY_FAILED"),
    Trust("huggingface_hub 1.33", ("SSL_CERT_FILE",), ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), "CERTIFICATE_VERIFY_FAILED"),
    Trust("huggingface_hub 0.36", ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), ("SSL_CERT_FILE",), "CERTIFICATE_VERIFY_FAILED"),
    Trust("transformers 5.19", ("SSL_CERT_FILE",), ("REQUESTS_CA_BUNDLE",), "We couldn't connect to"),
    Trust("vLLM 0.32, by repository id", ("SSL_CERT_FILE",), (), "Invalid repository ID or local directory specified"),
    Trust("ngcsdk 4.37", ("REQUESTS_CA_BUNDLE",), ("SSL_CERT_FILE",), "is not reachable"),
    Trust("boto3", ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"), ("SSL_CERT_FILE",), "SSL validation failed"),
    Trust("curl", ("CURL_CA_BUNDLE", "SSL_CERT_FILE"), ("REQUESTS_CA_BUNDLE",), "SSL certificate problem"),
    Trust("skopeo", ("SSL_CERT_FILE", "/etc/containers/certs.d"), ("REQUESTS_CA_BUNDLE",), "x509: certificate signed by unknown authority"),
    Trust("oras (PyPI)", ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), ("SSL_CERT_FILE",), "CERTIFICATE_VERIFY_FAILED"),
    Trust("podman", ("SSL_CERT_FILE", "/etc/containers/certs.d"), (), "x509: certificate signed by unknown authority"),
    Trust("docker", ("/etc/docker/certs.d",), (), "x509: certificate signed by unknown authority"),
    Trust("containerd", ("/etc/containerd/certs.d",), (), "x509: certificate signed by unknown authority"),
    Trust("airlock", ("AIRLOCK_CA_FILE", "SSL_CERT_FILE"), ("REQUESTS_CA_BUNDLE",), "is signed by an authority that is not trusted here"),
)


@dataclass(frozen=True)
class File:
    """One file: `etc/…` belongs below /, `home/…` into the home of whoever runs the client; `secret` ones hold the key and are 0600."""

    path: str
    text: str = field(repr=False)
    secret: bool = False


@dataclass(frozen=True)
class Setup:
    """What a client is given: files, and what a person does besides."""

    files: tuple[File, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """One registry as a client's place sees it; key and `ca` (PEM text) may be empty, `ca_file` is where that file lies on the client's machine."""

    registry: str
    ngc: str = ""
    ca: str = ""
    ca_file: str = ""
    key: str = ""
    names: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        for url in (self.registry, *([self.ngc] if self.ngc else [])):
            _check_url(url)
        for name in self.names:
            if (
                not name
                or name.strip(".") != name
                or urlsplit(f"//{name}").netloc != name
                or not name.isascii()
                or not all(c.isalnum() or c in ".-:" for c in name)
            ):
                raise Invalid(f"{name[:60]!r} is no registry's name", expected="a host as image names begin with it, such as nvcr.io", reason="name")
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise Invalid(
                "the API key holds characters that no key has", expected="one printable word", do="set AIRLOCK_KEY again", reason="key_invalid"
            )

    def __repr__(self) -> str:
        return f"Site({self.registry!r})"

    @property
    def url(self) -> str:
        """The registry's URL without a slash at its end."""
        return self.registry.rstrip("/")

    @property
    def place(self) -> str:
        """host[:port], as image names and container clients say it."""
        return urlsplit(self.registry).netloc

    @property
    def secure(self) -> bool:
        """Whether it speaks TLS."""
        return urlsplit(self.registry).scheme == "https"


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment or parts.port == 0
    except ValueError:
        wrong = True
    if wrong or not url.isascii() or not url.isprintable() or set(url) & set(" \"'\\$`"):
        raise Invalid(f"{url[:100]!r} is no URL of a registry", expected="http[s]://HOST[:PORT]", reason="url")
    if parts.path.strip("/"):
        raise Invalid(f"{url[:100]!r} has a path", expected="http[s]://HOST[:PORT]: images live at the root", reason="url")


def setup(tool: str, site: Site) -> Setup:
    """Everything that one client needs; raises Invalid for a tool that is not known, or that needs what the site lacks."""
    if tool not in TOOLS:
        raise Invalid(f"{tool[:40]!r} is no client that is known here", expected=", ".join(TOOLS), reason="tool")
    return TOOLS[tool](site)


def _auths(site: Site, *places: str) -> str:
    given = base64.b64encode(f"{USER}:{site.key}".encode()).decode()
    return json.dumps({"auths": {place: {"auth": given} for place in places}}, indent=2) + "\n"


def _login(site: Site, tool: str) -> tuple[str, ...]:
    return () if site.key else (f"AIRLOCK_KEY is not set: log in with  {tool} login --username '{USER}' --password-stdin {site.place}",)


def _containerd(site: Site) -> Setup:
    """A folder of /etc/containerd/certs.d for each name. containerd asks with `ns=NAME`, and is given what is kept as NAME/…."""
    folder = "etc/containerd/certs.d"
    ca = f'ca = "/{folder}/{site.place}/ca.crt"' if site.ca else ""
    files = [File(f"{folder}/{site.place}/ca.crt", site.ca)] if site.ca else []
    for name in dict.fromkeys((*site.names, site.place)):
        able = '["pull", "resolve", "push"]' if name == site.place else '["pull", "resolve"]'
        lines = [f'server = "{site.url}"', ca, "", f'[host."{site.url}"]', f"  capabilities = {able}", f"  {ca}" if ca else ""]
        files.append(File(f"{folder}/{name}/hosts.toml", "\n".join(line for n, line in enumerate(lines) if line or n == 2) + "\n"))
    config = f'version = 2\n\n[plugins."io.containerd.grpc.v1.cri".registry]\n  config_path = "/{folder}"\n'
    notes = (
        "containerd's own configuration must name the folder, once: import /etc/containerd/airlock.toml in its config.toml",
        "the key: an imagePullSecret (airlock client config kubernetes), or ctr images pull --hosts-dir /etc/containerd/certs.d -u $oauthtoken:KEY",
    )
    return Setup((*files, File("etc/containerd/airlock.toml", config)), notes)


def _containers(site: Site) -> Setup:
    """What containers/image reads, the library of podman, CRI-O, skopeo and buildah: names are rewritten, so nothing falls back to the internet."""
    blocks = [f'[[registry]]\nprefix = "{name}"\nlocation = "{site.place}/{name}"\n' for name in site.names]
    blocks.append(f'[[registry]]\nprefix = "{site.place}"\nlocation = "{site.place}"\n')
    text = "\n".join(blocks if site.secure else [f"{block}insecure = true\n" for block in blocks])
    files = [File("etc/containers/registries.conf.d/airlock.conf", text)]
    files += [File(f"etc/containers/certs.d/{site.place}/ca.crt", site.ca)] if site.ca else []
    files += [File("home/.config/containers/auth.json", _auths(site, site.place), secret=True)] if site.key else []
    return Setup(tuple(files), _login(site, "podman"))


_DOCKER_PULL = """\
#!/bin/sh
# airlock-docker-pull nvcr.io/nim/NAME:TAG...: pulls from this site, then gives the image the name that run lines and compose files say.
set -eu
for image; do
  docker pull "{place}/$image"
  docker tag "{place}/$image" "$image"
done
"""


def _docker(site: Site) -> Setup:
    """What docker can be told: trust and the key. It sends only docker.io to a mirror, and there without the name, so images are pulled by ours."""
    files = [File(f"etc/docker/certs.d/{site.place}/ca.crt", site.ca)] if site.ca else []
    files += [] if site.secure else [File("etc/docker/daemon.json", json.dumps({"insecure-registries": [site.place]}, indent=2) + "\n")]
    files += [File("home/.docker/config.json", _auths(site, site.place), secret=True)] if site.key else []
    script = _DOCKER_PULL.format(place=site.place)
    notes = (
        "docker has no setting that sends nvcr.io elsewhere: pull with the script; run and compose then find the image by its name",
        "docker.io/… is pulled in the same way, by its whole name: docker.io/library/busybox:1",
    )
    return Setup((*files, File("home/bin/airlock-docker-pull", script)), (*notes, *_login(site, "docker")))


def _oras(site: Site) -> Setup:
    files = [File("home/.docker/config.json", _auths(site, site.place), secret=True)] if site.key else []
    files += [File("home/oras.env", _env(site, {}, "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"))] if site.ca_file else []
    return Setup(tuple(files), _login(site, "oras"))


def _env(site: Site, given: dict[str, str], *trust: str) -> str:
    """Lines for `set -a; . FILE`, docker's --env-file and systemd's EnvironmentFile alike: bare words, no quotes."""
    lines = given | (dict.fromkeys(trust, site.ca_file) if site.ca_file else {})
    for name, value in lines.items():
        if shlex.quote(value) != value:  # a shell would make another thing of it, or run it
            what = "the path of the authority's file" if name in trust else name
            raise Invalid(f"{what} is no bare word", expected="letters, digits and @%+=:,./_-", do="name the file otherwise", reason="word")
    return "".join(f"{name}={value}\n" for name, value in lines.items())


_NO_KEY = "PUT-THE-KEY-HERE"
_SOURCED = "set -a; . ~/{}; set +a    before the program starts: these are read when it is imported"


def _hf(site: Site) -> Setup:
    given = {"HF_ENDPOINT": site.url, "HF_TOKEN": site.key or _NO_KEY}
    ones = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "DISABLE_SAFETENSORS_CONVERSION")
    given |= dict.fromkeys(ones, "1") | {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    text = _env(site, given, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    return Setup((File("home/hf.env", text, secret=True),), (_SOURCED.format("hf.env"),))


def _ngc(site: Site) -> Setup:
    """For ngcsdk and the NGC command line, which want a port and speak nothing but https."""
    if not site.ngc:
        raise Invalid("the NGC clients need the NGC listener", expected="--ngc https://HOST:PORT (the registry's AIRLOCK_NGC)", reason="ngc")
    parts = urlsplit(site.ngc)
    if parts.scheme != "https":
        raise Invalid("NGC clients speak https only", expected="https://HOST:PORT", do="give the registry a certificate (AIRLOCK_TLS)", reason="ngc")
    url = f"https://{parts.netloc if parts.port else f'{parts.netloc}:443'}"
    given = {"NGC_CLI_API_URL": url, "NGC_CLI_AUTH_URL": url, "NGC_CLI_API_KEY": site.key or _NO_KEY}
    notes = (_SOURCED.format("ngc.env"), "set NGC_CLI_ORG (and NGC_CLI_TEAM) to yours; inside a NIM other variables count: airlock nim env")
    return Setup((File("home/ngc.env", _env(site, given, "REQUESTS_CA_BUNDLE"), secret=True),), notes)


def _kubernetes(site: Site) -> Setup:
    """A pull secret for our own name and for those that nodes are sent here for: the kubelet picks it by the name that the manifest says."""
    places = [site.place, *(_DOCKER_HUB if name == "docker.io" else name for name in site.names)]
    shown = Site(site.registry, key=site.key or _NO_KEY, names=site.names)
    data = base64.b64encode(_auths(shown, *places).encode()).decode()
    text = f"""\
        apiVersion: v1
        kind: Secret
        metadata:
          name: airlock-pull
        type: kubernetes.io/dockerconfigjson
        data:
          .dockerconfigjson: {data}
        """
    notes = [
        "kubectl apply -n NAMESPACE -f airlock-pull.yaml, then in the pod or its service account: imagePullSecrets: [{name: airlock-pull}]",
        "only where the nodes have the files of `airlock client config containerd` or `cri-o`: others would send the key to the names above",
    ]
    notes += [] if site.key else ["AIRLOCK_KEY is not set: the secret holds a placeholder; set it and run this again"]
    return Setup((File("home/airlock-pull.yaml", textwrap.dedent(text), secret=True),), tuple(notes))


TOOLS: dict[str, Callable[[Site], Setup]] = {
    "containerd": _containerd,
    "podman": _containers,
    "cri-o": _containers,
    "skopeo": _containers,
    "buildah": _containers,
    "docker": _docker,
    "oras": _oras,
    "hf": _hf,
    "ngc": _ngc,
    "kubernetes": _kubernetes,
}
