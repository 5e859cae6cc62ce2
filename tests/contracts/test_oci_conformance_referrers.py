"""The facts of the public OCI conformance suite on referrers, with their paging and the fallback tags of registries without the API; auth on."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from tests.contracts.oci_client import ALGORITHMS, CONFIG, EMPTY, IMAGE, INDEX, LAYER, Client, Reply, descriptor, digest, image, index, join

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
SBOM, SIGNATURE = "application/vnd.example.sbom.v1", "application/vnd.example.signature+json"


def subject_of(client: Client, repo: str, algorithm: str) -> dict[str, Any]:
    client.blob(repo, b"{}", algorithm)
    client.blob(repo, b"layer", algorithm)
    raw = image(b"{}", [b"layer"], algorithm)
    client.put(repo, digest(raw, algorithm), raw)
    return descriptor(raw, IMAGE, algorithm)


def refer(client: Client, repo: str, subject: dict[str, Any], algorithm: str, **extra: Any) -> tuple[bytes, str]:
    """Pushes an artifact that refers to the subject."""
    raw = image(b"{}", [], algorithm, subject=subject, **{"config": descriptor(b"{}", EMPTY, algorithm), **extra})
    client.blob(repo, b"{}", algorithm)
    assert client.put(repo, digest(raw, algorithm), raw).get("oci-subject") == subject["digest"]
    return raw, digest(raw, algorithm)


def listed(client: Client, repo: str, name: str, query: str = "") -> list[dict[str, Any]]:
    """All pages of a subject's referrers."""
    found: list[dict[str, Any]] = []
    path = f"/v2/{repo}/referrers/{name}{query}"
    while path:
        reply = client.ask("GET", path)
        assert (reply.status, reply.get("content-type")) == (200, INDEX)
        doc = reply.json()
        assert (doc["schemaVersion"], doc["mediaType"]) == (2, INDEX)
        found += doc["manifests"]
        link = re.fullmatch(r'<([^>]+)>; ?rel="next"', reply.get("link"))
        path = join(link[1]) if link else ""
        assert not link or doc["manifests"], "a page with a next one must bring something"
    return found


# ---- 4.6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_descriptors_are_pulled_up(client: Client, repo: str, algorithm: str) -> None:
    subject = subject_of(client, repo, algorithm)
    notes = {"k": "v", "org.opencontainers.image.created": "2024-01-01T00:00:00Z"}
    plain, plain_name = refer(client, repo, subject, algorithm, artifactType=SBOM, annotations=notes)
    client.blob(repo, b'{"c":1}', algorithm)
    by_config, config_name = refer(client, repo, subject, algorithm, config=descriptor(b'{"c":1}', CONFIG, algorithm))
    parent = index([subject], subject=subject, annotations={"list": "yes"})
    assert client.put(repo, digest(parent, algorithm), parent, INDEX).get("oci-subject") == subject["digest"]
    typed = index([subject], subject=subject, artifactType=SIGNATURE)
    client.put(repo, digest(typed, algorithm), typed, INDEX)
    found = {d["digest"]: d for d in listed(client, repo, subject["digest"])}
    assert found == {
        plain_name: {"mediaType": IMAGE, "digest": plain_name, "size": len(plain), "artifactType": SBOM, "annotations": notes},
        config_name: {"mediaType": IMAGE, "digest": config_name, "size": len(by_config), "artifactType": CONFIG},
        digest(parent, algorithm): {"mediaType": INDEX, "digest": digest(parent, algorithm), "size": len(parent), "annotations": {"list": "yes"}},
        digest(typed, algorithm): {"mediaType": INDEX, "digest": digest(typed, algorithm), "size": len(typed), "artifactType": SIGNATURE},
    }
    for name in found:
        assert client.manifest(repo, name).status == 200


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_filter(client: Client, repo: str, algorithm: str) -> None:
    """Row 12: a subset, and the header that says so; the full list without it."""
    subject = subject_of(client, repo, algorithm)
    names = [refer(client, repo, subject, algorithm, artifactType=t, annotations={"n": str(i)})[1] for i, t in enumerate([SBOM, SIGNATURE, SBOM])]
    whole = client.ask("GET", f"/v2/{repo}/referrers/{subject['digest']}")
    assert {d["digest"] for d in whole.json()["manifests"]} == set(names) and not whole.get("oci-filters-applied")

    def only(kind: str) -> Reply:
        return client.ask("GET", f"/v2/{repo}/referrers/{subject['digest']}?artifactType={kind}")

    some = only(SBOM.replace("/", "%2F"))
    assert some.get("oci-filters-applied") == "artifactType"
    assert {d["digest"] for d in some.json()["manifests"]} == {names[0], names[2]} and {d["artifactType"] for d in some.json()["manifests"]} == {SBOM}
    assert [d["digest"] for d in only(SIGNATURE.replace("+", "%2B")).json()["manifests"]] == [names[1]]
    none = only("application/vnd.example.none")
    assert (none.status, none.json()["manifests"], none.get("oci-filters-applied")) == (200, [], "artifactType")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_before_the_subject_and_after_it_is_gone(client: Client, repo: str, algorithm: str) -> None:
    """Row 11: referrers of what was not pushed yet, then of what is, then of what was deleted."""
    client.blob(repo, b"{}", algorithm)
    client.blob(repo, b"layer", algorithm)
    raw = image(b"{}", [b"layer"], algorithm, annotations={"late": repo})
    subject = descriptor(raw, IMAGE, algorithm)
    _, name = refer(client, repo, subject, algorithm, artifactType=SBOM, annotations={"a": "b"})
    client.put(repo, "subject", raw)
    client.put(repo, digest(raw, algorithm), raw)
    before = listed(client, repo, subject["digest"])
    assert [(d["digest"], d["artifactType"], d["annotations"]) for d in before] == [(name, SBOM, {"a": "b"})]
    assert client.ask("DELETE", f"/v2/{repo}/manifests/{subject['digest']}").status == 202
    assert client.ask("GET", f"/v2/{repo}/referrers/{subject['digest']}").status == 200


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_deleted_referrer_is_listed_no_more(client: Client, repo: str, algorithm: str) -> None:
    subject = subject_of(client, repo, algorithm)
    names = [refer(client, repo, subject, algorithm, annotations={"n": str(i)})[1] for i in range(2)]
    assert client.ask("DELETE", f"/v2/{repo}/manifests/{names[0]}").status == 202
    assert [d["digest"] for d in listed(client, repo, subject["digest"])] == names[1:]


def test_referrers_stay_in_their_repository(client: Client, repo: str) -> None:
    subject = subject_of(client, repo, "sha256")
    subject_of(client, f"{repo}/other", "sha256")
    refer(client, repo, subject, "sha256")
    assert len(listed(client, repo, subject["digest"])) == 1 and listed(client, f"{repo}/other", subject["digest"]) == []


def test_referrers_of_referrers(client: Client, repo: str) -> None:
    subject = subject_of(client, repo, "sha256")
    raw, name = refer(client, repo, subject, "sha256", artifactType=SIGNATURE)
    _, second = refer(client, repo, descriptor(raw, IMAGE), "sha256", artifactType=SBOM)
    assert [d["digest"] for d in listed(client, repo, name)] == [second]
    assert [d["digest"] for d in listed(client, repo, subject["digest"])] == [name]


@pytest.mark.parametrize("name", ["sha256:bad", "sha256:" + "0" * 63, "sha512:" + "0" * 64, "tag", "md5:" + "0" * 32, "sha256:" + "G" * 64])
def test_digests_that_are_none(client: Client, repo: str, name: str) -> None:
    refused = client.ask("GET", f"/v2/{repo}/referrers/{name}")
    assert (refused.status, refused.codes) == (400, ["DIGEST_INVALID"])


def test_a_long_list_comes_whole_by_its_links(client: Client, repo: str) -> None:
    """More referrers than one page of any size that we know of registries, each with an annotation; filtered and not."""
    subject = subject_of(client, repo, "sha256")
    names = set()
    for i in range(120):
        raw = image(
            b"{}",
            [],
            subject=subject,
            config=descriptor(b"{}", EMPTY),
            artifactType=(SBOM, SIGNATURE)[i % 2],
            annotations={"n": f"{i:04}", "x": "y" * 40_000},
        )
        client.put(repo, digest(raw), raw)
        names.add(digest(raw))
    found = listed(client, repo, subject["digest"])
    assert [d["digest"] for d in found] and {d["digest"] for d in found} == names and len(found) == len(names)
    assert len(listed(client, repo, subject["digest"], f"?artifactType={SBOM}")) == 60
    first = client.ask("GET", f"/v2/{repo}/referrers/{subject['digest']}")
    assert len(first.body) < 4 * 1024 * 1024 + 100_000, "an index over 4 MiB is refused by clients, so it must be cut into pages"


# ---- fallback tags


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_a_fallback_tag_lists_is_listed_by_the_api(client: Client, repo: str, algorithm: str) -> None:
    """A client that finds no API writes an index under `<alg>-<hex>`; what it lists with a subject must appear (distribution-spec, "Enabling")."""
    subject = subject_of(client, repo, algorithm)
    raw, name = refer(client, repo, subject, algorithm, artifactType=SBOM, annotations={"by": "tag"})
    tag = subject["digest"].replace(":", "-")[: 7 + 64]
    fallback = index([descriptor(raw, IMAGE, algorithm, artifactType=SBOM, annotations={"by": "tag"})])
    client.put(repo, tag, fallback, INDEX)
    found = listed(client, repo, subject["digest"])
    assert [(d["digest"], d["artifactType"], d["annotations"]) for d in found] == [(name, SBOM, {"by": "tag"})]
    assert client.manifest(repo, tag).body == fallback  # the same client reads its tag back


def test_a_fallback_tag_cannot_invent_referrers(client: Client, repo: str) -> None:
    """What has no such subject is not listed, whatever an index under the tag says."""
    subject = subject_of(client, repo, "sha256")
    client.blob(repo, b"layer 2")
    raw = image(b"{}", [b"layer 2"])
    client.put(repo, digest(raw), raw)
    client.put(repo, subject["digest"].replace(":", "-"), index([descriptor(raw, IMAGE, artifactType=SBOM)]), INDEX)
    assert listed(client, repo, subject["digest"]) == []


def test_a_push_is_listed_at_once(client: Client, repo: str) -> None:
    """No cache stands between the 201 and the list."""
    subject = subject_of(client, repo, "sha256")
    for i in range(10):
        _, name = refer(client, repo, subject, "sha256", annotations={"n": str(i), "t": str(time.time_ns())})
        assert name in {d["digest"] for d in listed(client, repo, subject["digest"])}


def test_the_config_type_stands_in_for_a_missing_artifact_type(client: Client, repo: str) -> None:
    subject = subject_of(client, repo, "sha256")
    client.blob(repo, b"not empty")
    refer(client, repo, subject, "sha256", config=descriptor(b"not empty", LAYER))
    assert [d["artifactType"] for d in listed(client, repo, subject["digest"], f"?artifactType={LAYER}")] == [LAYER]
