"""The first schema: content, uploads, keys, leases and audit (decisions of the content model; columns may be added later, none renamed)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _part_1() -> None:
    op.create_table(
        "audit_count",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("class", sa.Text(), nullable=False),
        sa.Column("key", NAME, nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("last", sa.Double(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("class", "key", "since", name="uq_audit_count_window"),
    )
    op.create_table(
        "audit_pending",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("class", sa.Text(), nullable=False),
        sa.Column("ts", sa.Double(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_audit_pending_ts"), "audit_pending", ["ts"], unique=False)
    op.create_table(
        "blob",
        sa.Column("digest", NAME, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="ready", nullable=False),
        sa.Column("lease_until", sa.Double(), server_default="0", nullable=False),
        sa.Column("gc_after", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index(op.f("ix_blob_gc_after"), "blob", ["gc_after"], unique=False)
    op.create_table(
        "blob_fact",
        sa.Column("digest", NAME, nullable=False),
        sa.Column("git_oid", sa.Text(), server_default="", nullable=False),
        sa.Column("blake3", sa.Text(), server_default="", nullable=False),
        sa.Column("sha512", sa.Text(), server_default="", nullable=False),
        sa.Column("pieces", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "garbage",
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("delete_after", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("location"),
    )
    op.create_index(op.f("ix_garbage_delete_after"), "garbage", ["delete_after"], unique=False)
    op.create_table(
        "manifest",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("digest", NAME, nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("artifact_type", sa.Text(), server_default="", nullable=False),
        sa.Column("subject", NAME, nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest", name=op.f("uq_manifest_digest")),
    )
    op.create_index(op.f("ix_manifest_subject"), "manifest", ["subject"], unique=False)
    op.create_table(
        "org",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("display", sa.Text(), server_default="", nullable=False),
        sa.Column("lease_serial", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", name=op.f("uq_org_name")),
    )


def _part_2() -> None:
    op.create_table(
        "upload",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("repo", NAME, nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("algorithm", sa.Text(), server_default="sha256", nullable=False),
        sa.Column("digest", sa.Text(), server_default="", nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("offset", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.Column("generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_upload_expires"), "upload", ["expires"], unique=False)
    op.create_table(
        "api_key",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("hmac", sa.LargeBinary(), nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("expires", sa.Double(), server_default="0", nullable=False),
        sa.Column("revoked_at", sa.Double(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["org.id"], name=op.f("fk_api_key_org_id")),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("hmac", name=op.f("uq_api_key_hmac")),
        sa.UniqueConstraint("key_id", name=op.f("uq_api_key_key_id")),
    )
    op.create_index(op.f("ix_api_key_org_id"), "api_key", ["org_id"], unique=False)
    op.create_table(
        "blob_alias",
        sa.Column("algorithm", sa.Text(), nullable=False),
        sa.Column("digest", NAME, nullable=False),
        sa.Column("blob", NAME, nullable=False),
        sa.ForeignKeyConstraint(["blob"], ["blob.digest"], name=op.f("fk_blob_alias_blob")),
        sa.PrimaryKeyConstraint("algorithm", "digest"),
    )
    op.create_index(op.f("ix_blob_alias_blob"), "blob_alias", ["blob"], unique=False)
    op.create_table(
        "edge",
        sa.Column("parent_id", ID, nullable=False),
        sa.Column("child_digest", NAME, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("blob", NAME, nullable=True),
        sa.ForeignKeyConstraint(["blob"], ["blob.digest"], name=op.f("fk_edge_blob")),
        sa.ForeignKeyConstraint(["parent_id"], ["manifest.id"], name=op.f("fk_edge_parent_id")),
        sa.PrimaryKeyConstraint("parent_id", "child_digest", "kind"),
    )
    op.create_index(op.f("ix_edge_child_digest"), "edge", ["child_digest"], unique=False)
    op.create_table(
        "file",
        sa.Column("manifest_id", ID, nullable=False),
        sa.Column("path", NAME, nullable=False),
        sa.Column("digest", NAME, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("lfs", sa.Boolean(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["manifest_id"], ["manifest.id"], name=op.f("fk_file_manifest_id")),
        sa.PrimaryKeyConstraint("manifest_id", "path"),
    )


def _part_3() -> None:
    op.create_table(
        "lease",
        sa.Column("jti", sa.Text(), nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("serial", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("model", NAME, nullable=False),
        sa.Column("model_digest", sa.Text(), nullable=False),
        sa.Column("profile_digest", sa.Text(), nullable=False),
        sa.Column("profile_id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("gpus", sa.Text(), nullable=False),
        sa.Column("iat", sa.Double(), nullable=False),
        sa.Column("exp", sa.Double(), nullable=False),
        sa.Column("replaced_by", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["org.id"], name=op.f("fk_lease_org_id")),
        sa.PrimaryKeyConstraint("jti"),
        sa.UniqueConstraint("org_id", "serial", name=op.f("uq_lease_org_id")),
    )
    op.create_index(op.f("ix_lease_exp"), "lease", ["exp"], unique=False)
    op.create_index(op.f("ix_lease_key_id"), "lease", ["key_id"], unique=False)
    op.create_table(
        "repository",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("display", sa.Text(), server_default="", nullable=False),
        sa.Column("kind", sa.Text(), server_default="", nullable=False),
        sa.Column("org_id", ID, nullable=True),
        sa.Column("visibility", sa.Text(), server_default="org", nullable=False),
        sa.Column("gated", sa.Boolean(), server_default="0", nullable=False),
        sa.Column("immutable", sa.Boolean(), server_default="0", nullable=False),
        sa.Column("requires_tier", sa.Text(), server_default="", nullable=False),
        sa.Column("created", sa.Double(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["org.id"], name=op.f("fk_repository_org_id")),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", name=op.f("uq_repository_name")),
    )
    op.create_index(op.f("ix_repository_org_id"), "repository", ["org_id"], unique=False)
    op.create_table(
        "alias",
        sa.Column("name", NAME, nullable=False),
        sa.Column("repo_id", ID, nullable=False),
        sa.ForeignKeyConstraint(["repo_id"], ["repository.id"], name=op.f("fk_alias_repo_id")),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_index(op.f("ix_alias_repo_id"), "alias", ["repo_id"], unique=False)
    op.create_table(
        "key_grant",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("api_key_id", ID, nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("actions", sa.Text(), nullable=False),
        sa.Column("not_before", sa.Double(), server_default="0", nullable=False),
        sa.Column("expires", sa.Double(), server_default="0", nullable=False),
        sa.Column("grace_s", sa.Integer(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_key.id"], name=op.f("fk_key_grant_api_key_id")),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_key_grant_api_key_id"), "key_grant", ["api_key_id"], unique=False)
    op.create_table(
        "lease_gpu",
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("gpu_uuid", sa.Text(), nullable=False),
        sa.Column("jti", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["jti"], ["lease.jti"], name=op.f("fk_lease_gpu_jti")),
        sa.PrimaryKeyConstraint("host", "gpu_uuid"),
    )
    op.create_index(op.f("ix_lease_gpu_jti"), "lease_gpu", ["jti"], unique=False)


def _part_4() -> None:
    op.create_table(
        "ref",
        sa.Column("repo_id", ID, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("kind", sa.Text(), server_default="tag", nullable=False),
        sa.Column("manifest_id", ID, nullable=False),
        sa.Column("at", sa.Double(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["manifest_id"], ["manifest.id"], name=op.f("fk_ref_manifest_id")),
        sa.ForeignKeyConstraint(["repo_id"], ["repository.id"], name=op.f("fk_ref_repo_id")),
        sa.PrimaryKeyConstraint("repo_id", "name"),
    )
    op.create_index(op.f("ix_ref_manifest_id"), "ref", ["manifest_id"], unique=False)
    op.create_table(
        "repo_blob",
        sa.Column("repo_id", ID, nullable=False),
        sa.Column("digest", NAME, nullable=False),
        sa.Column("lease_until", sa.Double(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["blob.digest"], name=op.f("fk_repo_blob_digest")),
        sa.ForeignKeyConstraint(["repo_id"], ["repository.id"], name=op.f("fk_repo_blob_repo_id")),
        sa.PrimaryKeyConstraint("repo_id", "digest"),
    )
    op.create_index(op.f("ix_repo_blob_digest"), "repo_blob", ["digest"], unique=False)
    op.create_table(
        "repo_manifest",
        sa.Column("repo_id", ID, nullable=False),
        sa.Column("manifest_id", ID, nullable=False),
        sa.Column("verdict", sa.Text(), server_default="", nullable=False),
        sa.Column("policy_version", sa.Integer(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["manifest_id"], ["manifest.id"], name=op.f("fk_repo_manifest_manifest_id")),
        sa.ForeignKeyConstraint(["repo_id"], ["repository.id"], name=op.f("fk_repo_manifest_repo_id")),
        sa.PrimaryKeyConstraint("repo_id", "manifest_id"),
    )
    op.create_index(op.f("ix_repo_manifest_manifest_id"), "repo_manifest", ["manifest_id"], unique=False)
    op.create_table(
        "revision",
        sa.Column("repo_id", ID, nullable=False),
        sa.Column("commit", NAME, nullable=False),
        sa.Column("manifest_id", ID, nullable=False),
        sa.Column("parent", sa.Text(), server_default="", nullable=False),
        sa.Column("title", sa.Text(), server_default="", nullable=False),
        sa.Column("author", sa.Text(), server_default="", nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["manifest_id"], ["manifest.id"], name=op.f("fk_revision_manifest_id")),
        sa.ForeignKeyConstraint(["repo_id"], ["repository.id"], name=op.f("fk_revision_repo_id")),
        sa.PrimaryKeyConstraint("repo_id", "commit"),
    )
    op.create_index(op.f("ix_revision_manifest_id"), "revision", ["manifest_id"], unique=False)
    op.create_index("ix_revision_repo_at", "revision", ["repo_id", "at"], unique=False)


def upgrade() -> None:
    """Makes every table of the first release."""
    _part_1()
    _part_2()
    _part_3()
    _part_4()
