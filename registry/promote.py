"""Promotion: the site's release key signs a profile manifest, in both cosign forms, so that runtimes of this site may start from it.

It is the only caller of the release key besides receipts. It must not sign what the store does not hold whole.
"""

from __future__ import annotations

from artifact import trust
from artifact.errors import Invalid, NotFound
from artifact.grant import PROFILES, Principal
from artifact.manifest import MAX_MANIFEST_BYTES, PROFILES_TYPE, Reference, parse_manifest
from artifact.profile import Pin, parse, references
from artifact.store import Call, Descriptor
from registry import catalog
from registry.importer import Site, add_small, judged, ref_of


def promote(site: Site, wanted: Reference, now: float) -> dict[str, object]:
    """Signs `<name>/profiles:<ref>`, reports digest and key; again changes nothing; raises NotFound where what it names is absent, Invalid."""
    name = wanted.name if wanted.name.endswith(PROFILES) else wanted.name + PROFILES
    model = name.removesuffix(PROFILES)
    found = site.catalog.locate(name, wanted.ref)
    if found is None or not found.digest:
        raise NotFound(
            f"{model} has no profile manifest at {wanted.ref}",
            expected=f"{name}:{wanted.ref}",
            do=f"airlock model push DIR {model}:{wanted.ref} --profiles FILE, or import a bundle that brings it",
            reason="profiles",
        )
    key = site.home.release_key()
    with site.catalog.writing() as conn:
        manifest = ref_of(conn, found.repo.id, wanted.ref)
        if manifest is None:
            raise NotFound(f"{name} has no {wanted.ref}", expected=f"{name}:{wanted.ref}", reason="profiles")
        documents = [_document(site, name, layer) for layer in manifest.layers if layer.media_type == PROFILES_TYPE]
        pins = [pin for raw in documents for pin in references(raw, PROFILES_TYPE)]
        _check_own(site, model, wanted.ref, documents)
        _check_models(site, name, wanted.ref, pins)
        old = ref_of(conn, found.repo.id, trust.sig_tag(manifest.digest))
        subject = Descriptor(manifest.media_type, manifest.digest, len(manifest.raw))
        made = trust.release_artifacts(key, f"{name}:{wanted.ref}", subject, old.raw if old else None)
        changed = judged(conn, found.repo.id, manifest.digest, "promoted") or old is None or made.sig_manifest != old.raw
        if changed:
            rule = catalog.Rule(over=old.digest if old else "")  # a signature that is pushed in between is not lost: the command is run again
            add_small(site, conn, found.repo.id, made.blobs)
            catalog.add_manifest(conn, found.repo.id, parse_manifest(made.sig_manifest), refs=(made.sig_tag,), at=now, name=name, rule=rule)
            catalog.add_manifest(conn, found.repo.id, parse_manifest(made.referrer_manifest), at=now, name=name)
            call = Call(Principal(key_id="site"), None, "promote", now)
            kid = trust.kid(trust.public_pem(key))
            site.audit.change(conn, call, "promote", f"{name}@{manifest.digest}", version=wanted.ref, release_key=kid)
    return {
        "name": model,
        "ref": wanted.ref,
        "profiles": name,
        "digest": manifest.digest,
        "models": [f"{p.name}@{p.digest}" for p in pins],
        "key": trust.kid(trust.public_pem(key)),
        "changed": changed,
    }


def _document(site: Site, name: str, layer: Descriptor) -> bytes:
    found = site.catalog.find(name, layer.digest)
    if found is None or not found.location or found.size > MAX_MANIFEST_BYTES:
        raise NotFound(f"{name} has no document {layer.digest}", do="push the profiles again", reason="profiles")
    return site.library.small(found)


def _check_own(site: Site, model: str, ref: str, documents: list[bytes]) -> None:
    """Refuses a document that speaks of another model: signed, it would let runtimes start that one under this name."""
    for found in map(parse, documents):
        if found.model != model:
            raise Invalid(
                f"the profiles of {model}:{ref} are those of {found.model}",
                expected=model,
                do="push the profiles under their own name",
                reason="profiles",
            )
        for profile in found.profiles:
            pin = profile.model
            if pin.name != model and site.catalog.find(pin.name, pin.digest) is None:
                raise Invalid(
                    f"profile {profile.id} of {model}:{ref} is of {pin.name}@{pin.digest}, which this store does not hold",
                    expected=f"{model}, or another model of this store",
                    do="import the bundle that brings it, or push the profiles again",
                    reason="profiles",
                )


def _check_models(site: Site, name: str, ref: str, pins: list[Pin]) -> None:
    if not pins:
        raise NotFound(f"{name}:{ref} names no model", expected="a profile manifest (docs/format.md section 4)", reason="profiles")
    for pin in pins:
        held = site.catalog.find(pin.name, pin.digest)
        if held is None or not held.digest:
            raise NotFound(
                f"{name}:{ref} names {pin.name}@{pin.digest}, which this store does not hold",
                expected="every model and image that the profiles name",
                do="import the bundle that brings it",
                reason="model",
            )
