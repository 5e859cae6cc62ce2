"""What the sweep, retention, tag history, quotas and long jobs need: columns and tables are added, none is renamed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Adds them."""
    op.add_column("org", sa.Column("quota_bytes", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("manifest", sa.Column("gc_after", sa.Double(), nullable=True))
    op.create_index("ix_manifest_gc_after", "manifest", ["gc_after"])
    op.add_column("garbage", sa.Column("size", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("garbage", sa.Column("digest", NAME, server_default="", nullable=False))
    op.add_column("repo_manifest", sa.Column("at", sa.Double(), server_default="0", nullable=False))
    op.create_index("ix_edge_blob", "edge", ["blob"])
    op.create_table(
        "ref_history",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("repo_id", ID, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("old_digest", sa.Text(), server_default="", nullable=False),
        sa.Column("new_digest", sa.Text(), server_default="", nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("key_id", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(["repo_id"], ["repository.id"], name="fk_ref_history_repo_id"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_ref_history_repo_name", "ref_history", ["repo_id", "name"])
    op.create_table(
        "retention",
        sa.Column("pattern", NAME, nullable=False),
        sa.Column("keep_last", sa.Integer(), server_default="0", nullable=False),
        sa.Column("keep_days", sa.Integer(), server_default="0", nullable=False),
        sa.Column("untagged_days", sa.Integer(), server_default="0", nullable=False),
        sa.Column("keep_tags", sa.Text(), server_default="", nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("pattern"),
    )
    op.create_table(
        "job",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("cursor", sa.Text(), server_default="", nullable=False),
        sa.Column("started", sa.Double(), server_default="0", nullable=False),
        sa.Column("ended", sa.Double(), server_default="0", nullable=False),
        sa.Column("report", sa.Text(), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "site",
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("pepper_check", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("instance"),
    )


def downgrade() -> None:
    """Takes them away; the history, rules and job states in them go."""
    for table in ("site", "job", "retention", "ref_history"):
        op.drop_table(table)
    op.drop_index("ix_edge_blob", "edge")
    op.drop_index("ix_manifest_gc_after", "manifest")
    for table, column in (("repo_manifest", "at"), ("garbage", "digest"), ("garbage", "size"), ("manifest", "gc_after"), ("org", "quota_bytes")):
        op.drop_column(table, column)  # in place: SQLite would run into its own foreign keys while it makes the table anew
