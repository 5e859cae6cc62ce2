"""The tables of who may do what and of what happened: organisations, keys, grants, documents, leases, the audit log.

Those of content are in registry/tables.py, which gives all of them by one name.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, ForeignKey, Index, Integer, LargeBinary, Table, Text, UniqueConstraint, false

from registry.columns import Id, Name, metadata, moment, serial, words

org = Table(
    "org",
    metadata,
    serial(),
    Column("name", Name, nullable=False, unique=True),
    Column("display", Text, nullable=False, server_default=""),
    Column("lease_serial", BigInteger, nullable=False, server_default="0"),
    Column("created", Double, nullable=False),
    Column("quota_bytes", BigInteger, nullable=False, server_default="0"),  # 0: none
    Column("entitlement_id", BigInteger, nullable=True),  # the document that counts now; no key onto it, since it names its organisation
    moment("closed_at"),
)
team = Table(
    "team",
    metadata,
    serial(),
    Column("org_id", Id, ForeignKey("org.id"), nullable=False),
    Column("name", Name, nullable=False),
    Column("created", Double, nullable=False),
    moment("closed_at"),
    UniqueConstraint("org_id", "name"),
)
member = Table(
    "member",
    metadata,
    serial(),
    Column("org_id", Id, ForeignKey("org.id"), nullable=False),
    Column("name", Name, nullable=False),
    words("kind", "person"),  # or robot
    words("role", "member"),  # member, auditor or admin of its organisation
    words("note"),
    Column("created", Double, nullable=False),
    moment("disabled_at"),
    UniqueConstraint("org_id", "name"),
)
team_member = Table(
    "team_member",
    metadata,
    Column("team_id", Id, ForeignKey("team.id"), primary_key=True),
    Column("member_id", Id, ForeignKey("member.id"), primary_key=True, index=True),
)
api_key = Table(
    "api_key",
    metadata,
    serial(),
    Column("key_id", Text, nullable=False, unique=True),
    Column("hmac", LargeBinary, nullable=False, unique=True),
    Column("org_id", Id, ForeignKey("org.id"), nullable=False, index=True),
    Column("tier", Text, nullable=False),
    Column("note", Text, nullable=False, server_default=""),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False, server_default="0"),
    Column("revoked_at", Double, nullable=False, server_default="0"),
    words("type", "service"),  # personal, service or runtime
    Column("member_id", Id, nullable=True, index=True),
    words("pepper_id"),  # which pepper the HMAC was made with; empty: the first one
    moment("last_used"),
    words("replaces"),  # the key that this one was rotated from
)
# A right of one key, of a member's keys, of a team's members, or, with none of the three, of every key of the organisation.
key_grant = Table(
    "key_grant",
    metadata,
    serial(),
    Column("api_key_id", Id, ForeignKey("api_key.id"), nullable=True, index=True),
    Column("models", Text, nullable=False),
    Column("actions", Text, nullable=False),
    Column("not_before", Double, nullable=False, server_default="0"),
    Column("expires", Double, nullable=False, server_default="0"),
    Column("grace_s", Integer, nullable=False, server_default="0"),
    Column("grant_id", Text, nullable=False, unique=True),
    Column("org_id", Id, ForeignKey("org.id"), nullable=False, index=True),
    Column("member_id", Id, ForeignKey("member.id"), nullable=True, index=True),
    Column("team_id", Id, ForeignKey("team.id"), nullable=True, index=True),
    words("environment"),  # dev or production; empty counts as production
    Column("gpus", Integer, nullable=False, server_default="0"),  # 0: no bound of its own
    words("profiles", "[]"),  # patterns over profile ids and names; none: every profile
    moment("created"),
    moment("revoked_at"),
    words("note"),
)
# The grants of a whole organisation are found without reading those of its keys, members and teams, nor of other organisations.
_WHOLE = key_grant.c.api_key_id.is_(None) & key_grant.c.member_id.is_(None) & key_grant.c.team_id.is_(None)
Index("ix_key_grant_whole", key_grant.c.org_id, sqlite_where=_WHOLE, postgresql_where=_WHOLE)
# Signed entitlements byte for byte; the columns are what the warm decision reads.
entitlement = Table(
    "entitlement",
    metadata,
    serial(),
    Column("org_id", Id, ForeignKey("org.id"), nullable=False),
    Column("jti", Text, nullable=False, unique=True),
    Column("issuer", Text, nullable=False),
    Column("kid", Text, nullable=False),
    Column("serial", BigInteger, nullable=False),
    Column("tier", Text, nullable=False),
    Column("models", Text, nullable=False),
    Column("actions", Text, nullable=False),
    words("products", "[]"),
    words("environments", "[]"),
    Column("gpus", Integer, nullable=False, server_default="0"),
    Column("max_keys", Integer, nullable=False, server_default="0"),
    Column("iat", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Column("grace_s", Integer, nullable=False, server_default="0"),
    Column("token", Text, nullable=False),
    words("source"),
    Column("at", Double, nullable=False),
    moment("revoked_at"),
    moment("replaced_at"),
    UniqueConstraint("org_id", "issuer", "serial", name="uq_entitlement_serial"),
)
revocation = Table(
    "revocation",
    metadata,
    Column("kind", Text, primary_key=True),  # jti, key_id or kid
    Column("value", Name, primary_key=True),
    Column("issuer", Text, nullable=False),
    Column("serial", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
)
revocation_list = Table(
    "revocation_list",
    metadata,
    Column("issuer", Name, primary_key=True),
    Column("serial", BigInteger, nullable=False),
    Column("iat", Double, nullable=False),
    Column("next_update", Double, nullable=False),
    Column("token", Text, nullable=False),
    Column("at", Double, nullable=False),
)
clock = Table("clock", metadata, Column("name", Text, primary_key=True), Column("at", Double, nullable=False))
# What the upstream's entitlement was when an artefact was fetched, as the bundle told it.
upstream_record = Table(
    "upstream_record",
    metadata,
    serial(),
    Column("name", Name, nullable=False),
    Column("ref", Name, nullable=False),
    Column("digest", Name, nullable=False),
    *(words(name) for name in ("source", "upstream_org", "key_id", "product", "tier", "license", "accepted_by", "evidence", "sender")),
    *(moment(name) for name in ("key_end", "subscription_end", "accepted_at", "fetched")),
    Column("gated", Boolean, nullable=False, server_default=false()),
    Column("sequence", BigInteger, nullable=False, server_default="0"),
    Column("at", Double, nullable=False),
    UniqueConstraint("name", "ref", "digest", "source", name="uq_upstream_record_name"),
)
# Which warning was given about what runs out, once for each threshold of days and each end.
notice = Table(
    "notice",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("item", Name, primary_key=True),
    Column("due", Double, primary_key=True),
    Column("days", Integer, primary_key=True),
    Column("at", Double, nullable=False),
    moment("sent_at"),
)
lease = Table(
    "lease",
    metadata,
    Column("jti", Text, primary_key=True),
    Column("org_id", Id, ForeignKey("org.id"), nullable=False),
    Column("serial", BigInteger, nullable=False),
    Column("key_id", Text, nullable=False, index=True),
    Column("model", Name, nullable=False),
    Column("model_digest", Text, nullable=False),
    Column("profile_digest", Text, nullable=False),
    Column("profile_id", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("gpus", Text, nullable=False),
    Column("iat", Double, nullable=False),
    Column("exp", Double, nullable=False, index=True),
    Column("replaced_by", Text, nullable=False, server_default=""),
    moment("revoked_at"),
    moment("returned_at"),
    *(words(name) for name in ("ent_jti", "grant_id", "environment")),
    UniqueConstraint("org_id", "serial"),
)
lease_gpu = Table(
    "lease_gpu",
    metadata,
    Column("host", Text, primary_key=True),
    Column("gpu_uuid", Text, primary_key=True),
    Column("jti", Text, ForeignKey("lease.jti"), primary_key=True, index=True),  # several models may share a GPU
)
audit_pending = Table(
    "audit_pending",
    metadata,
    serial(),
    Column("class", Text, nullable=False),
    Column("ts", Double, nullable=False, index=True),
    Column("body", Text, nullable=False),
)
audit_count = Table(
    "audit_count",
    metadata,
    serial(),
    Column("class", Text, nullable=False),
    Column("key", Name, nullable=False),
    Column("since", Double, nullable=False),
    Column("last", Double, nullable=False),
    Column("n", BigInteger, nullable=False),
    Column("body", Text, nullable=False),
    UniqueConstraint("class", "key", "since", name="uq_audit_count_window"),
)
# The signed log (RFC 6962): leaves in their order, the compact range of all of them, full tiles of 256 hashes above the leaves, checkpoints.
audit_leaf = Table(
    "audit_leaf",
    metadata,
    Column("idx", BigInteger, primary_key=True, autoincrement=False),
    Column("leaf_hash", LargeBinary, nullable=False),
    Column("body", Text, nullable=True),  # null once it was sealed into an export
    Column("class", Text, nullable=False),
    Column("ts", Double, nullable=False, index=True),
    words("event"),
    Column("org", Name, nullable=False, server_default=""),
    words("key_id"),
    Column("ref", Name, nullable=False, server_default=""),
    words("result"),
    words("reason"),
    Index("ix_audit_leaf_org", "org", "idx"),
)
audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("nodes", LargeBinary, nullable=False),
    Column("epoch", Integer, nullable=False, server_default="1"),
)
audit_checkpoint = Table(
    "audit_checkpoint",
    metadata,
    Column("epoch", Integer, primary_key=True, server_default="1"),
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("note", Text, nullable=False),
    Column("created", Double, nullable=False),
)
audit_tile = Table(
    "audit_tile",
    metadata,
    Column("level", Integer, primary_key=True),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("hashes", LargeBinary, nullable=False),
)
audit_seal = Table(
    "audit_seal",
    metadata,
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("at", Double, nullable=False),
)
