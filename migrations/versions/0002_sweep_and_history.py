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


def downgrade() -> None:
    """Takes them away; the history, rules and job states in them go."""
    for table in ("job", "retention", "ref_history"):
        op.drop_table(table)
    op.drop_index("ix_manifest_gc_after", "manifest")
    for table, column in (("garbage", "size"), ("manifest", "gc_after"), ("org", "quota_bytes")):
        with op.batch_alter_table(table) as batch:
            batch.drop_column(column)
