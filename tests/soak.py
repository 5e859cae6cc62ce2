"""Random pushes, pulls, deletes and mounts beside the garbage collection, checked against an oracle in memory; it imports nothing of the product.

Every client owns one repository, so that what must be there is known exactly; bytes come from one small pool, so that all of them share blobs. An
operation of unknown outcome (a server that was killed) is done again until it is known.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"

# What must never be, as counts that must be 0.
DANGLING = {
    "edges to blobs that are gone": "SELECT count(*) FROM edge WHERE blob IS NOT NULL AND blob NOT IN (SELECT digest FROM blob)",
    "layers that the manifest's repository does not link": """SELECT count(*) FROM repo_manifest rm JOIN edge e ON e.parent_id = rm.manifest_id
        WHERE e.blob IS NOT NULL AND NOT EXISTS (SELECT 1 FROM repo_blob rb WHERE rb.repo_id = rm.repo_id AND rb.digest = e.blob)""",
    "refs to manifests that their repository does not link": """SELECT count(*) FROM ref WHERE NOT EXISTS
        (SELECT 1 FROM repo_manifest rm WHERE rm.repo_id = ref.repo_id AND rm.manifest_id = ref.manifest_id)""",
    "locations that are both blob and garbage": "SELECT count(*) FROM blob JOIN garbage ON garbage.location = blob.location",
}


class Again(Exception):
    """The outcome is not known, or the server says to try again."""


class Missing(Exception):
    """The server says that a blob, manifest or tag is not there."""


class Client(Protocol):
    """What the soak does to a registry; each may raise Again, and Missing where that is an answer."""

    def has(self, repo: str, digest: str) -> bool: ...

    def put(self, repo: str, data: bytes) -> None: ...

    def mount(self, repo: str, digest: str, source: str) -> bool: ...

    def push(self, repo: str, ref: str, raw: bytes, media_type: str) -> None: ...

    def manifest(self, repo: str, ref: str) -> bytes: ...

    def blob(self, repo: str, digest: str) -> bytes: ...

    def delete(self, repo: str, ref: str) -> None: ...


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class Held:
    """What a tag must give: its manifest, the child manifests, and the blobs of all of them."""

    digest: str
    raw: bytes
    children: dict[str, bytes] = field(default_factory=dict)
    blobs: set[str] = field(default_factory=set)


@dataclass
class Soak:
    """One run: clients on threads until the time is over, then a last look at everything."""

    clients: list[Client]
    seed: int
    lease_s: float  # a push must not take longer than this
    sizes: tuple[int, int] = (1, 4000)
    large: tuple[int, int] = (0, 0)  # how many blobs of which size, larger than one part of an S3 upload; seldom used, so that the rest goes on
    pool: dict[str, bytes] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    oracle: dict[str, dict[str, Held]] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    giants: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        for _ in range(24):
            self._make(draw, draw.randint(*self.sizes))
        self.shared = sorted(self.pool)
        self.giants = sorted(self._make(draw, self.large[1] + n) for n in range(self.large[0]))
        self.pool[sha(b"{}")] = b"{}"
        self.oracle = {self.repo(n): {} for n in range(len(self.clients))}

    def _make(self, draw: random.Random, size: int) -> str:
        data = draw.randbytes(size)
        self.pool[sha(data)] = data
        return sha(data)

    def repo(self, n: int) -> str:
        return f"acme/soak-{n}"

    def run(self, seconds: float) -> None:
        """All clients until `seconds` are over; the errors are in `wrong`."""
        threads = [threading.Thread(target=self._work, args=(n,)) for n in range(len(self.clients))]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.wrong:
            time.sleep(0.1)
        self.stop.set()
        for thread in threads:
            thread.join()

    def _work(self, n: int) -> None:
        draw = random.Random(self.seed * 1000 + n)
        verbs = [self._push] * 4 + [self._pull] * 3 + [self._delete] * 2 + [self._index]
        try:
            while not self.stop.is_set():
                draw.choice(verbs)(self.clients[n], self.repo(n), draw)
        except Exception as error:  # the top of a thread: the run fails with it
            self.wrong.append(f"client {n}: {type(error).__name__} {error}")

    def _sure(self, verb: Callable[[], object]) -> object:
        """The answer of a verb, asked again while it is unknown."""
        end = time.monotonic() + 180
        while True:
            try:
                return verb()
            except Again as error:
                self.done["again"] += 1
                if time.monotonic() > end:
                    raise AssertionError(f"no answer in 180 s: {error}") from error
                time.sleep(0.2)

    def _bring(self, client: Client, repo: str, digest: str, draw: random.Random) -> None:
        """Makes sure that a blob is in the repository in one of the ways that clients know."""
        if self._sure(lambda: client.has(repo, digest)):
            self.done["skipped"] += 1
            return
        if draw.random() < 0.5:
            source = self.repo(draw.randrange(len(self.clients)))
            if source != repo and self._sure(lambda: client.mount(repo, digest, source)):
                self.done["mounted"] += 1
                return
        self._sure(lambda: client.put(repo, self.pool[digest]))
        self.done["large uploaded" if digest in self.giants else "uploaded"] += 1

    def _image(self, client: Client, repo: str, ref: str, draw: random.Random) -> tuple[bytes, set[str]]:
        empty = sha(b"{}")
        layers = draw.sample(self.shared, draw.randint(0, 3))
        if not layers or draw.random() < 0.5:
            layers.append(self._make(draw, draw.randint(*self.sizes)))
        if self.giants and draw.random() < 0.04:
            layers.append(draw.choice(self.giants))
            self.done["large"] += 1
        doc = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x-soak", "annotations": {"n": str(draw.randrange(6))}}
        doc["config"] = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": empty, "size": 2}
        doc["layers"] = [{"mediaType": "application/x-layer", "digest": d, "size": len(self.pool[d])} for d in layers]
        raw = json.dumps(doc).encode()
        while True:
            begun = time.monotonic()
            for digest in (empty, *layers):
                self._bring(client, repo, digest, draw)
            try:
                self._sure(lambda: client.push(repo, ref or sha(raw), raw, MANIFEST))
                return raw, {empty, *layers}
            except Missing as error:
                took = time.monotonic() - begun
                if took < self.lease_s / 2:
                    raise AssertionError(f"a blob was lost within its lease: {error} after {took:.1f} of {self.lease_s} s") from error
                self.done["lease over"] += 1

    def _push(self, client: Client, repo: str, draw: random.Random) -> None:
        tag = f"t{draw.randrange(5)}"
        raw, blobs = self._image(client, repo, tag, draw)
        self.oracle[repo][tag] = Held(sha(raw), raw, {}, blobs)
        self.done["pushed"] += 1

    def _index(self, client: Client, repo: str, draw: random.Random) -> None:
        """An index over one or two new images that have no tag of their own."""
        children = [self._image(client, repo, "", draw) for _ in range(draw.randint(1, 2))]
        named = {sha(raw): raw for raw, _ in children}
        doc = {"schemaVersion": 2, "mediaType": INDEX, "annotations": {"n": str(draw.randrange(1000))}}
        raw = json.dumps(doc | {"manifests": [{"mediaType": MANIFEST, "digest": d, "size": len(r)} for d, r in named.items()]}).encode()
        tag = f"i{draw.randrange(2)}"
        self._sure(lambda: client.push(repo, tag, raw, INDEX))
        self.oracle[repo][tag] = Held(sha(raw), raw, named, set().union(*(blobs for _, blobs in children)))
        self.done["indexes"] += 1

    def _pull(self, client: Client, repo: str, draw: random.Random) -> None:
        if self.oracle[repo]:
            tag = draw.choice(sorted(self.oracle[repo]))
            self._check(client, repo, tag, self.oracle[repo][tag])
            self.done["pulled"] += 1

    def _check(self, client: Client, repo: str, tag: str, held: Held) -> None:
        """Everything that a tag must give, read and compared."""
        wanted = {tag: held.raw, held.digest: held.raw, **held.children}
        for ref, raw in wanted.items():
            assert self._sure(lambda ref=ref: client.manifest(repo, ref)) == raw, f"{repo}:{ref} is another manifest"
        for digest in sorted(held.blobs):
            assert self._sure(lambda digest=digest: client.blob(repo, digest)) == self.pool[digest], f"{repo}@{digest} has other bytes"

    def _delete(self, client: Client, repo: str, draw: random.Random) -> None:
        """Deletes a tag, or a manifest with all of its tags; children that something else names stay."""
        if not self.oracle[repo]:
            return
        tag = draw.choice(sorted(self.oracle[repo]))
        held = self.oracle[repo].pop(tag)
        others = [other for other in self.oracle[repo].values() if held.digest == other.digest or held.digest in other.children]
        ref = tag if draw.random() < 0.3 or others else held.digest
        try:
            self._sure(lambda: client.delete(repo, ref))
        except Missing:
            self.done["deleted before"] += 1  # an answer that a killed server did not send
        if ref == held.digest:
            for child in held.children:
                if not any(child == o.digest or child in o.children for o in self.oracle[repo].values()):
                    try:
                        self._sure(lambda child=child: client.delete(repo, child))
                    except Missing:
                        self.done["deleted before"] += 1
        self.done["deleted"] += 1

    def check_all(self) -> int:
        """Reads everything that the oracle holds once more, and returns how many tags that were."""
        tags = 0
        for n, client in enumerate(self.clients):
            for tag, held in self.oracle[self.repo(n)].items():
                self._check(client, self.repo(n), tag, held)
                tags += 1
        return tags

    def delete_all(self) -> None:
        """Deletes every tag that the oracle holds; what has no tag stays to be found by whoever looks."""
        for n, client in enumerate(self.clients):
            for held in list(self.oracle[self.repo(n)].values()):
                for digest in (held.digest, *held.children):
                    try:
                        self._sure(lambda digest=digest, n=n, client=client: client.delete(self.repo(n), digest))
                    except Missing:
                        continue
            self.oracle[self.repo(n)].clear()


@contextmanager
def every(seconds: float, work: Callable[[], object], wrong: list[str]) -> Iterator[None]:
    """Does `work` on a thread again and again; what it raises goes into `wrong`."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            try:
                work()
            except Exception as error:  # the top of a thread: the run fails with it
                wrong.append(f"beside: {type(error).__name__} {error}")
                return

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
