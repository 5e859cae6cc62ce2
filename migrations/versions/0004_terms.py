"""A licence to accept and a block by the law at each repository: columns are added."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TEXTS = ("license", "license_by", "blocked")


def upgrade() -> None:
    """Adds them, empty."""
    for name in TEXTS:
        op.add_column("repository", sa.Column(name, sa.Text(), server_default="", nullable=False))
    op.add_column("repository", sa.Column("license_at", sa.Double(), server_default="0", nullable=False))


def downgrade() -> None:
    """Takes them away; what nobody may read now requires a tier that no key has, so that the earlier version gives it to nobody either."""
    op.execute("UPDATE repository SET requires_tier = 'withheld' WHERE blocked <> '' OR (license <> '' AND license_at = 0)")
    for name in (*TEXTS, "license_at"):
        op.drop_column("repository", name)
