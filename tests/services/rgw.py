"""A real S3 server from the system's packages for tests: Ceph's RADOS gateway over one monitor, manager and OSD, once a test run, http and https.

It imports no project code and ends only processes that it started, by pid after a look at their command line. Object stores of tests are told apart
by bucket: each test makes its own.
"""

from __future__ import annotations

import atexit
import datetime
import fcntl
import functools
import ipaddress
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.conftest import missing

WAIT_S = 180  # a loaded machine takes several times the 17 s of an idle one
TMP = Path("/tmp")  # an admin socket's path may take 107 bytes, so the folder must be a short one
ACCESS, SECRET = "airlocktest", "airlocktestsecret"
DAEMONS = ("client.rgw", "osd.0", "mgr.x", "mon.a")  # in the order in which they are ended

_CONF = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv4 = true
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {d}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 2
run dir = {d}/run
admin socket = {d}/run/$name.asok
pid file = {d}/run/$name.pid
log file = {d}/log/$name.log
heartbeat file = {d}/run/$name.hb
crash dir = {d}/crash
[mon.a]
mon data = {d}/mon
[mgr.x]
mgr data = {d}/mgr
[osd]
osd data = {d}/osd
osd objectstore = bluestore
bluestore block size = 30G
bluestore fsck on mount = false
bluestore cache size = 256M
memstore device bytes = 8G
osd memory target = 1G
osd class load list = *
osd class default list = *
osd max object name len = 2048
[client.rgw]
rgw data = {d}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw} ssl_endpoint=127.0.0.1:{rgw2} ssl_certificate={d}/server.pem
rgw enable usage log = false
rgw enable gc threads = true
rgw dns name =
"""


def _self_signed(folder: Path) -> None:
    """`server.pem` (certificate, then key) and `ca.pem` (the certificate) for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    (folder / "ca.pem").write_bytes(public)
    (folder / "server.pem").write_bytes(public + key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def _pair() -> int:
    """The first of two neighbouring free ports outside the range from which the kernel takes its own."""
    for _ in range(500):
        port = random.randrange(20000, 32000, 2)
        with suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two neighbouring free ports between 20000 and 32000")


@dataclass(frozen=True)
class Rgw:
    """One running gateway: its folder, its http port (https is the next one) and how to reach it."""

    folder: str
    port: int
    access: str = ACCESS
    secret: str = SECRET

    @property
    def http(self) -> str:
        """The endpoint without TLS."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def https(self) -> str:
        """The endpoint with TLS, under `ca`."""
        return f"https://127.0.0.1:{self.port + 1}"

    @property
    def ca(self) -> Path:
        """The certificate that signs the TLS endpoint's."""
        return Path(self.folder) / "ca.pem"

    def client(self, endpoint: str = "") -> Any:
        """A plain S3 client, to look at the server from outside of what is tested."""
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        keys = {"aws_access_key_id": self.access, "aws_secret_access_key": self.secret, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=endpoint or self.http, verify=str(self.ca), config=config, **keys)

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"t-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=name)
        return name

    def add_key(self, access: str, secret: str) -> None:
        """Gives the user a second key pair, as one does to rotate the first."""
        names = ("--uid=test", "--key-type=s3", f"--access-key={access}", f"--secret-key={secret}")
        self._run("radosgw-admin", "-c", f"{self.folder}/ceph.conf", "key", "create", *names)

    def quota(self, bucket: str, size: int) -> None:
        """Lets a bucket hold so many bytes, which is all the room that a store has for its user; 0 takes the bound away."""
        where = ("radosgw-admin", "-c", f"{self.folder}/ceph.conf", "quota")
        names = ("--quota-scope=bucket", f"--bucket={bucket}")
        if size:
            self._run(*where, "set", *names, f"--max-size={size}")
        self._run(*where, "enable" if size else "disable", *names)

    @classmethod
    def make(cls) -> Rgw:
        """A fresh running gateway; the caller ends it by remove()."""
        for program in ("ceph", "ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "radosgw-admin", "monmaptool", "ceph-authtool"):
            if not shutil.which(program):
                missing(f"{program} (Debian packages radosgw ceph-mon ceph-osd ceph-mgr)")
        for last in (False, True):
            made = cls(tempfile.mkdtemp(prefix="airlock-rgw-", dir=TMP), _pair())
            try:
                made._start()
                return made
            except BaseException:
                made.remove()
                if last:  # a port may have been taken in between: once more with new ones
                    raise
        raise AssertionError("unreachable")

    def _start(self) -> None:
        d, mon = Path(self.folder), _pair()
        for name in ("mon", "osd", "mgr", "rgw", "run", "log"):
            (d / name).mkdir()
        _self_signed(d)
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        (d / "ceph.conf").write_text(_CONF.format(fsid=fsid, d=d, mon=mon, mon2=mon + 1, rgw=self.port, rgw2=self.port + 1))
        conf = ("-c", f"{d}/ceph.conf")
        self._run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon + 1},v1:127.0.0.1:{mon}]", f"{d}/monmap")
        keys = (
            ("mon.", "mon", "allow *"),
            ("client.admin", "mon", "allow *", "osd", "allow *", "mgr", "allow *", "mds", "allow *"),
            ("mgr.x", "mon", "allow profile mgr", "osd", "allow *", "mds", "allow *"),
            ("osd.0", "mon", "allow profile osd", "mgr", "allow profile osd", "osd", "allow *"),
            ("client.rgw", "mon", "allow rw", "osd", "allow rwx", "mgr", "allow rw"),
        )
        for number, (name, *caps) in enumerate(keys):
            pairs = [part for kind, cap in zip(caps[::2], caps[1::2], strict=True) for part in ("--cap", kind, cap)]
            self._run("ceph-authtool", *(["--create-keyring"] if number == 0 else []), f"{d}/keyring", "--gen-key", "-n", name, *pairs)
        self._run("ceph-mon", *conf, "-i", "a", "--mkfs", "--monmap", f"{d}/monmap", "--keyring", f"{d}/keyring")
        self._run("ceph-mon", *conf, "-i", "a")
        self._run("ceph", *conf, "osd", "new", osd)
        self._run("ceph-mgr", *conf, "-i", "x")
        self._run("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._run("ceph", *conf, "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=h1", check=False)
        self._run("ceph-osd", *conf, "-i", "0")
        end = time.monotonic() + WAIT_S
        while "1 up" not in self._run("ceph", *conf, "osd", "stat", check=False) and time.monotonic() < end:
            time.sleep(0.5)
        self.begin()
        names = ("--uid=test", "--display-name=test", f"--access-key={self.access}", f"--secret-key={self.secret}", "--max-buckets=0")
        self._run("radosgw-admin", *conf, "user", "create", *names)
        client = self.client()
        client.create_bucket(Bucket="first")  # the pools are made by the first bucket and the first object
        client.put_object(Bucket="first", Key="first", Body=b"first")

    def _run(self, *argv: str, check: bool = True) -> str:
        """One step to its end; daemons fork inside of it."""
        env = {**os.environ, "CEPH_CONF": f"{self.folder}/ceph.conf"}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=WAIT_S, env=env, stdin=subprocess.DEVNULL, check=False)
        assert not check or done.returncode == 0, f"{' '.join(argv)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        return done.stdout

    def pid(self, daemon: str) -> int:
        """The process id of one of DAEMONS, 0 when it does not run; its command line must name our folder, as old pid files name strangers."""
        with suppress(OSError, ValueError):
            pid = int((Path(self.folder) / "run" / f"{daemon}.pid").read_text())
            if self.folder.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return 0

    def begin(self) -> None:
        """Starts the gateway over the running store and waits until it answers."""
        self._run("radosgw", "-c", f"{self.folder}/ceph.conf", "-n", "client.rgw")
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            with suppress(OSError):
                urllib.request.urlopen(self.http + "/", timeout=10).close()
                return
            time.sleep(0.3)

    def end(self, sign: signal.Signals) -> None:
        """Ends the gateway by a signal and waits until it is gone; the store below it, and what it confirmed, stay."""
        os.kill(self.pid("client.rgw"), sign)
        end = time.monotonic() + WAIT_S
        while self.pid("client.rgw"):
            assert time.monotonic() < end, f"the gateway did not end by {sign.name}"
            time.sleep(0.1)

    def remove(self) -> None:
        """Ends the four daemons by pid and removes the folder."""
        for sign, wait in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
            for daemon in DAEMONS:
                if pid := self.pid(daemon):
                    with suppress(ProcessLookupError):
                        os.kill(pid, sign)
            end = time.monotonic() + wait
            while any(map(self.pid, DAEMONS)) and time.monotonic() < end:
                time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    return False


def _run_id() -> str:
    return os.environ.get("PYTEST_XDIST_TESTRUNUID", f"pid{os.getpid()}")[:32]


@contextmanager
def _ledger() -> Iterator[dict[str, dict[str, Any]]]:
    """The gateways of this user's running tests, under a lock: run id to gateway and the workers that use it."""
    fd = os.open(TMP / f"airlock-rgw-{os.geteuid()}.json", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        known: dict[str, dict[str, Any]] = json.loads(text) if text else {}
        try:
            yield known
        finally:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(known))


def _sweep(known: dict[str, dict[str, Any]]) -> None:
    """Ends gateways of runs of which no worker lives any more: a killed run cleans up nothing itself."""
    for run in list(known):
        known[run]["workers"] = [pid for pid in known[run]["workers"] if _alive(pid)]
        if not known[run]["workers"]:
            Rgw(**known.pop(run)["rgw"]).remove()


@contextmanager
def own() -> Iterator[Rgw]:
    """A gateway that only the caller uses, so that it may be ended and begun again."""
    made = Rgw.make()
    name = f"own-{os.getpid()}-{made.port}"
    with _ledger() as known:
        known[name] = {"rgw": asdict(made), "workers": [os.getpid()]}  # a killed run's is ended by the next run
    try:
        yield made
    finally:
        made.remove()
        with _ledger() as known:
            known.pop(name, None)


@functools.cache
def shared() -> Rgw:
    """The gateway of this test run, started by the worker that comes first and ended by the one that leaves last."""
    with _ledger() as known:
        _sweep(known)
        if _run_id() not in known:
            known[_run_id()] = {"rgw": asdict(Rgw.make()), "workers": []}
        entry = known[_run_id()]
        entry["workers"].append(os.getpid())
        atexit.register(_leave, os.getpid())
        return Rgw(**entry["rgw"])


def _leave(pid: int) -> None:
    if os.getpid() != pid:  # a forked child ends without the say of its parent
        return
    with _ledger() as known:
        if _run_id() in known:
            known[_run_id()]["workers"] = [w for w in known[_run_id()]["workers"] if w != pid]
        _sweep(known)
