"""The tables of the registry; no queries here, and the transactions over them are those of registry/database.py.

Columns may be added by later migrations, none renamed. Names and paths compare by bytes: SQLite does so by default, PostgreSQL gets COLLATE "C".
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
)

from registry.accounts import api_key as api_key
from registry.accounts import audit_checkpoint as audit_checkpoint
from registry.accounts import audit_count as audit_count
from registry.accounts import audit_head as audit_head
from registry.accounts import audit_leaf as audit_leaf
from registry.accounts import audit_pending as audit_pending
from registry.accounts import audit_seal as audit_seal
from registry.accounts import audit_tile as audit_tile
from registry.accounts import clock as clock
from registry.accounts import entitlement as entitlement
from registry.accounts import key_grant as key_grant
from registry.accounts import lease as lease
from registry.accounts import lease_gpu as lease_gpu
from registry.accounts import member as member
from registry.accounts import notice as notice
from registry.accounts import org as org
from registry.accounts import revocation as revocation
from registry.accounts import revocation_list as revocation_list
from registry.accounts import team as team
from registry.accounts import team_member as team_member
from registry.accounts import upstream_record as upstream_record
from registry.columns import Id as Id
from registry.columns import Name, serial, words
from registry.columns import metadata as metadata
from registry.database import open_engine as open_engine
from registry.database import reading as reading
from registry.database import retried as retried
from registry.database import writing as writing

repository = Table(
    "repository",
    metadata,
    serial(),
    Column("name", Name, nullable=False, unique=True),
    Column("display", Text, nullable=False, server_default=""),
    Column("kind", Text, nullable=False, server_default=""),
    Column("org_id", Id, ForeignKey("org.id"), nullable=True, index=True),
    Column("visibility", Text, nullable=False, server_default="org"),
    Column("gated", Boolean, nullable=False, server_default="0"),
    Column("immutable", Boolean, nullable=False, server_default="0"),
    Column("requires_tier", Text, nullable=False, server_default=""),
    words("requires_product"),
    words("requires_from"),  # who said so: an import or an admin; empty: nobody
    words("license"),  # that somebody must have accepted; empty: none
    words("license_by"),
    Column("license_at", Double, nullable=False, server_default="0"),  # when it was accepted; 0: not yet
    words("blocked"),  # why the law lets nobody read it here; empty: it does
    Column("created", Double, nullable=False, server_default="0"),
)
alias = Table(
    "alias", metadata, Column("name", Name, primary_key=True), Column("repo_id", Id, ForeignKey("repository.id"), nullable=False, index=True)
)
manifest = Table(
    "manifest",
    metadata,
    serial(),
    Column("digest", Name, nullable=False, unique=True),
    Column("media_type", Text, nullable=False),
    Column("artifact_type", Text, nullable=False, server_default=""),
    Column("subject", Name, nullable=True, index=True),
    Column("size", BigInteger, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("gc_after", Double, nullable=True, index=True),  # when the sweep may look at it; null while nothing let go of it
)
ref = Table(
    "ref",
    metadata,
    Column("repo_id", Id, ForeignKey("repository.id"), primary_key=True),
    Column("name", Name, primary_key=True),
    Column("kind", Text, nullable=False, server_default="tag"),
    Column("manifest_id", Id, ForeignKey("manifest.id"), nullable=False, index=True),
    Column("at", Double, nullable=False, server_default="0"),
)
# Where a tag pointed, one row a move or removal: digests, not keys, since the history keeps no content alive.
ref_history = Table(
    "ref_history",
    metadata,
    serial(),
    Column("repo_id", Id, ForeignKey("repository.id"), nullable=False),
    Column("name", Name, nullable=False),
    Column("old_digest", Text, nullable=False, server_default=""),
    Column("new_digest", Text, nullable=False, server_default=""),
    Column("at", Double, nullable=False),
    Column("key_id", Text, nullable=False, server_default=""),
)
Index("ix_ref_history_repo_name", ref_history.c.repo_id, ref_history.c.name)
# What may be let go of in repositories whose names match a pattern (grammar of grants); a zero limit keeps everything.
retention = Table(
    "retention",
    metadata,
    Column("pattern", Name, primary_key=True),
    Column("keep_last", Integer, nullable=False, server_default="0"),
    Column("keep_days", Integer, nullable=False, server_default="0"),
    Column("untagged_days", Integer, nullable=False, server_default="0"),
    Column("keep_tags", Text, nullable=False, server_default=""),
    Column("at", Double, nullable=False),
)
# Whose database this is: servers with another site's secrets are refused.
site = Table("site", metadata, Column("instance", Text, primary_key=True), Column("pepper_check", Text, nullable=False))
# Where a long job of this site stands, so that it goes on after a restart.
job = Table(
    "job",
    metadata,
    Column("name", Text, primary_key=True),
    Column("cursor", Text, nullable=False, server_default=""),
    Column("started", Double, nullable=False, server_default="0"),
    Column("ended", Double, nullable=False, server_default="0"),
    Column("report", Text, nullable=False, server_default=""),
)
revision = Table(
    "revision",
    metadata,
    Column("repo_id", Id, ForeignKey("repository.id"), primary_key=True),
    Column("commit", Name, primary_key=True),
    Column("manifest_id", Id, ForeignKey("manifest.id"), nullable=False, index=True),
    Column("parent", Text, nullable=False, server_default=""),
    Column("title", Text, nullable=False, server_default=""),
    Column("author", Text, nullable=False, server_default=""),
    Column("at", Double, nullable=False),
)
Index("ix_revision_repo_at", revision.c.repo_id, revision.c.at)
repo_manifest = Table(
    "repo_manifest",
    metadata,
    Column("repo_id", Id, ForeignKey("repository.id"), primary_key=True),
    Column("manifest_id", Id, ForeignKey("manifest.id"), primary_key=True, index=True),
    Column("verdict", Text, nullable=False, server_default=""),
    Column("policy_version", Integer, nullable=False, server_default="0"),
    Column("at", Double, nullable=False, server_default="0"),  # of the last push of it; 0 where nobody noted it
)
blob = Table(
    "blob",
    metadata,
    Column("digest", Name, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("location", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="ready"),
    Column("lease_until", Double, nullable=False, server_default="0"),
    Column("gc_after", Double, nullable=True, index=True),
)
# `blob` repeats child_digest where the child is a blob: the foreign key that a later sweep runs into instead of a dangling edge.
edge = Table(
    "edge",
    metadata,
    Column("parent_id", Id, ForeignKey("manifest.id"), primary_key=True),
    Column("child_digest", Name, primary_key=True, index=True),
    Column("kind", Text, primary_key=True),
    Column("blob", Name, ForeignKey("blob.digest"), nullable=True, index=True),
)
repo_blob = Table(
    "repo_blob",
    metadata,
    Column("repo_id", Id, ForeignKey("repository.id"), primary_key=True),
    Column("digest", Name, ForeignKey("blob.digest"), primary_key=True, index=True),
    Column("lease_until", Double, nullable=False, server_default="0"),
)
file = Table(
    "file",
    metadata,
    Column("manifest_id", Id, ForeignKey("manifest.id"), primary_key=True),
    Column("path", Name, primary_key=True),
    Column("digest", Name, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("lfs", Boolean, nullable=False, server_default="0"),
)
blob_alias = Table(
    "blob_alias",
    metadata,
    Column("algorithm", Text, primary_key=True),
    Column("digest", Name, primary_key=True),
    Column("blob", Name, ForeignKey("blob.digest"), nullable=False, index=True),
)
blob_fact = Table(
    "blob_fact",
    metadata,
    Column("digest", Name, primary_key=True),
    Column("git_oid", Text, nullable=False, server_default=""),
    Column("blake3", Text, nullable=False, server_default=""),
    Column("sha512", Text, nullable=False, server_default=""),
    Column("pieces", LargeBinary, nullable=True),
)
# A location stays here until its bytes are gone: who publishes the same digest meanwhile takes another generation.
garbage = Table(
    "garbage",
    metadata,
    Column("location", Text, primary_key=True),
    Column("delete_after", Double, nullable=False, index=True),
    Column("size", BigInteger, nullable=False, server_default="0"),
    Column("digest", Name, nullable=False, server_default=""),
)
upload = Table(
    "upload",
    metadata,
    Column("id", Text, primary_key=True),
    Column("repo", Name, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("algorithm", Text, nullable=False, server_default="sha256"),
    Column("digest", Text, nullable=False, server_default=""),
    Column("size", BigInteger, nullable=True),
    Column("offset", BigInteger, nullable=False, server_default="0"),
    Column("state", LargeBinary, nullable=False),
    Column("generation", BigInteger, nullable=False, server_default="0"),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False, index=True),
)
