"""Teams, members and documents of entitlement, records of the upstream, the signed audit log: columns and tables are added, none is renamed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = (
    "audit_seal",
    "audit_tile",
    "audit_checkpoint",
    "audit_head",
    "audit_leaf",
    "notice",
    "upstream_record",
    "clock",
    "revocation_list",
    "revocation",
    "entitlement",
    "team_member",
    "member",
    "team",
)
ADDED = (
    ("org", "entitlement_id"),
    ("org", "closed_at"),
    ("repository", "requires_product"),
    ("repository", "requires_from"),
    ("api_key", "replaces"),
    ("api_key", "last_used"),
    ("api_key", "pepper_id"),
    ("api_key", "member_id"),
    ("api_key", "type"),
    ("lease", "environment"),
    ("lease", "grant_id"),
    ("lease", "ent_jti"),
    ("lease", "returned_at"),
    ("lease", "revoked_at"),
)


def _text(name: str, default: str = "") -> sa.Column[str]:
    return sa.Column(name, sa.Text(), server_default=default, nullable=False)


def _time(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), server_default="0", nullable=False)


def upgrade() -> None:
    """Adds them; grants that were a key's stay its own."""
    _people()
    _documents()
    _leased("host", "gpu_uuid", "jti")
    _log()


def _people() -> None:
    op.add_column("org", sa.Column("entitlement_id", sa.BigInteger(), nullable=True))
    op.add_column("org", _time("closed_at"))
    op.add_column("repository", _text("requires_product"))
    op.add_column("repository", _text("requires_from"))
    op.create_table(
        "team",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        _time("closed_at"),
        sa.ForeignKeyConstraint(["org_id"], ["org.id"], name="fk_team_org_id"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("org_id", "name", name="uq_team_org_id"),
    )
    op.create_table(
        "member",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("name", NAME, nullable=False),
        _text("kind", "person"),
        _text("role", "member"),
        _text("note"),
        sa.Column("created", sa.Double(), nullable=False),
        _time("disabled_at"),
        sa.ForeignKeyConstraint(["org_id"], ["org.id"], name="fk_member_org_id"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("org_id", "name", name="uq_member_org_id"),
    )
    op.create_table(
        "team_member",
        sa.Column("team_id", ID, nullable=False),
        sa.Column("member_id", ID, nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["team.id"], name="fk_team_member_team_id"),
        sa.ForeignKeyConstraint(["member_id"], ["member.id"], name="fk_team_member_member_id"),
        sa.PrimaryKeyConstraint("team_id", "member_id"),
    )
    op.create_index("ix_team_member_member_id", "team_member", ["member_id"])
    op.add_column("api_key", _text("type", "service"))
    op.add_column("api_key", sa.Column("member_id", ID, nullable=True))
    op.add_column("api_key", _text("pepper_id"))
    op.add_column("api_key", _time("last_used"))
    op.add_column("api_key", _text("replaces"))
    op.create_index("ix_api_key_member_id", "api_key", ["member_id"])
    op.drop_index("ix_key_grant_api_key_id", "key_grant")
    op.rename_table("key_grant", "key_grant_before")
    _grants(sa.Column("api_key_id", ID, nullable=True))
    op.execute(
        "INSERT INTO key_grant (id, api_key_id, models, actions, not_before, expires, grace_s, grant_id, org_id) "
        "SELECT g.id, g.api_key_id, g.models, g.actions, g.not_before, g.expires, g.grace_s, 'grant-' || g.id, k.org_id "
        "FROM key_grant_before g JOIN api_key k ON k.id = g.api_key_id"
    )
    op.drop_table("key_grant_before")
    _next_id("key_grant")


def _leased(*key: str) -> None:
    """Makes the table of leased GPUs anew with this key; of several leases of one GPU a narrower key keeps one."""
    rows = op.get_bind().execute(sa.text("SELECT host, gpu_uuid, MAX(jti) AS jti FROM lease_gpu GROUP BY host, gpu_uuid")).all()
    op.drop_table("lease_gpu")
    made = op.create_table(
        "lease_gpu",
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("gpu_uuid", sa.Text(), nullable=False),
        sa.Column("jti", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["jti"], ["lease.jti"], name="fk_lease_gpu_jti"),
        sa.PrimaryKeyConstraint(*key),
    )
    op.create_index("ix_lease_gpu_jti", "lease_gpu", ["jti"])
    op.bulk_insert(made, [{"host": row.host, "gpu_uuid": row.gpu_uuid, "jti": row.jti} for row in rows])


def _next_id(table: str) -> None:
    """PostgreSQL counts on behind the rows that were copied with their ids; SQLite does so by itself."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), (SELECT COALESCE(MAX(id), 0) + 1 FROM {table}), false)")  # noqa: S608


def _grants(holder: sa.Column[int]) -> None:
    op.create_table(
        "key_grant",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        holder,
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("actions", sa.Text(), nullable=False),
        _time("not_before"),
        _time("expires"),
        sa.Column("grace_s", sa.Integer(), server_default="0", nullable=False),
        sa.Column("grant_id", sa.Text(), nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("member_id", ID, nullable=True),
        sa.Column("team_id", ID, nullable=True),
        _text("environment"),
        sa.Column("gpus", sa.Integer(), server_default="0", nullable=False),
        _text("profiles", "[]"),
        _time("created"),
        _time("revoked_at"),
        _text("note"),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_key.id"], name="fk_key_grant_api_key_id"),
        sa.ForeignKeyConstraint(["org_id"], ["org.id"], name="fk_key_grant_org_id"),
        sa.ForeignKeyConstraint(["member_id"], ["member.id"], name="fk_key_grant_member_id"),
        sa.ForeignKeyConstraint(["team_id"], ["team.id"], name="fk_key_grant_team_id"),
        sa.PrimaryKeyConstraint("id", name="pk_key_grant_2"),
        sa.UniqueConstraint("grant_id", name="uq_key_grant_grant_id"),
    )
    for column in ("api_key_id", "org_id", "member_id", "team_id"):
        op.create_index(f"ix_key_grant_{column}", "key_grant", [column])
    whole = sa.text("api_key_id IS NULL AND member_id IS NULL AND team_id IS NULL")
    op.create_index("ix_key_grant_whole", "key_grant", ["org_id"], sqlite_where=whole, postgresql_where=whole)


def _documents() -> None:
    op.create_table(
        "entitlement",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("jti", sa.Text(), nullable=False),
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("kid", sa.Text(), nullable=False),
        sa.Column("serial", sa.BigInteger(), nullable=False),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("actions", sa.Text(), nullable=False),
        _text("products", "[]"),
        _text("environments", "[]"),
        sa.Column("gpus", sa.Integer(), server_default="0", nullable=False),
        sa.Column("max_keys", sa.Integer(), server_default="0", nullable=False),
        sa.Column("iat", sa.Double(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.Column("grace_s", sa.Integer(), server_default="0", nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        _text("source"),
        sa.Column("at", sa.Double(), nullable=False),
        _time("revoked_at"),
        _time("replaced_at"),
        sa.ForeignKeyConstraint(["org_id"], ["org.id"], name="fk_entitlement_org_id"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("jti", name="uq_entitlement_jti"),
        sa.UniqueConstraint("org_id", "issuer", "serial", name="uq_entitlement_serial"),
    )
    op.create_table(
        "revocation",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("value", NAME, nullable=False),
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("serial", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "value"),
    )
    op.create_table(
        "revocation_list",
        sa.Column("issuer", NAME, nullable=False),
        sa.Column("serial", sa.BigInteger(), nullable=False),
        sa.Column("iat", sa.Double(), nullable=False),
        sa.Column("next_update", sa.Double(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("issuer"),
    )
    op.add_column("lease", _time("revoked_at"))
    op.add_column("lease", _time("returned_at"))
    for name in ("ent_jti", "grant_id", "environment"):
        op.add_column("lease", _text(name))
    op.create_table(
        "clock", sa.Column("name", sa.Text(), nullable=False), sa.Column("at", sa.Double(), nullable=False), sa.PrimaryKeyConstraint("name")
    )
    op.create_table(
        "upstream_record",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("ref", NAME, nullable=False),
        sa.Column("digest", NAME, nullable=False),
        *(_text(name) for name in ("source", "upstream_org", "key_id", "product", "tier", "license", "accepted_by", "evidence", "sender")),
        *(_time(name) for name in ("key_end", "subscription_end", "accepted_at", "fetched")),
        sa.Column("gated", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", "ref", "digest", "source", name="uq_upstream_record_name"),
    )
    op.create_table(
        "notice",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("item", NAME, nullable=False),
        sa.Column("due", sa.Double(), nullable=False),
        sa.Column("days", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        _time("sent_at"),
        sa.PrimaryKeyConstraint("kind", "item", "due", "days"),
    )


def _log() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE audit_pending ADD COLUMN xid xid8 NOT NULL DEFAULT pg_current_xact_id()")
    op.create_table(
        "audit_leaf",
        sa.Column("idx", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("leaf_hash", sa.LargeBinary(), nullable=False),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("class", sa.Text(), nullable=False),
        sa.Column("ts", sa.Double(), nullable=False),
        _text("event"),
        sa.Column("org", NAME, server_default="", nullable=False),
        _text("key_id"),
        sa.Column("ref", NAME, server_default="", nullable=False),
        _text("result"),
        _text("reason"),
        sa.PrimaryKeyConstraint("idx"),
    )
    op.create_index("ix_audit_leaf_ts", "audit_leaf", ["ts"])
    op.create_index("ix_audit_leaf_org", "audit_leaf", ["org", "idx"])
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("nodes", sa.LargeBinary(), nullable=False),
        sa.Column("epoch", sa.Integer(), server_default="1", nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "audit_checkpoint",
        sa.Column("epoch", sa.Integer(), server_default="1", nullable=False),
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("epoch", "size"),
    )
    op.create_table(
        "audit_tile",
        sa.Column("level", sa.Integer(), nullable=False),
        sa.Column("n", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hashes", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("level", "n"),
    )
    op.create_table(
        "audit_seal",
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("size"),
    )


def _end_keys() -> None:
    """Revokes the keys that only this version refuses: the earlier one would let them in again."""
    for owner, key, at in (("member", "member_id", "disabled_at"), ("org", "org_id", "closed_at")):
        ended = f"SELECT o.{at} FROM {owner} o WHERE o.id = api_key.{key} AND o.{at} > 0"  # noqa: S608
        op.execute(f"UPDATE api_key SET revoked_at = ({ended}) WHERE revoked_at = 0 AND EXISTS ({ended})")  # noqa: S608
    listed = "SELECT r.at FROM revocation r WHERE r.kind = 'key_id' AND r.value = api_key.key_id"
    op.execute(f"UPDATE api_key SET revoked_at = ({listed}) WHERE revoked_at = 0 AND EXISTS ({listed})")  # noqa: S608


def downgrade() -> None:
    """Takes them away: documents, people, grants that are no single key's or have bounds that the earlier version does not know, records of the
    upstream and the sequenced log go; keys that the earlier version would let in again are revoked first."""
    _end_keys()
    # What was sequenced goes back to where it waited, so that no recorded event is lost with the log's tables.
    op.execute('INSERT INTO audit_pending ("class", ts, body) SELECT "class", ts, body FROM audit_leaf WHERE body IS NOT NULL ORDER BY idx')
    if op.get_bind().dialect.name == "postgresql":
        op.drop_column("audit_pending", "xid")
    for column in ("api_key_id", "org_id", "member_id", "team_id", "whole"):
        op.drop_index(f"ix_key_grant_{column}", "key_grant")
    op.rename_table("key_grant", "key_grant_after")
    op.create_table(
        "key_grant",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("api_key_id", ID, nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("actions", sa.Text(), nullable=False),
        _time("not_before"),
        _time("expires"),
        sa.Column("grace_s", sa.Integer(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_key.id"], name="fk_key_grant_api_key_id_1"),
        sa.PrimaryKeyConstraint("id", name="pk_key_grant_1"),
    )
    op.execute(
        "INSERT INTO key_grant (id, api_key_id, models, actions, not_before, expires, grace_s) "
        "SELECT id, api_key_id, models, actions, not_before, expires, grace_s FROM key_grant_after "
        "WHERE api_key_id IS NOT NULL AND revoked_at = 0 AND gpus = 0 AND profiles = '[]'"
    )
    op.drop_table("key_grant_after")
    _next_id("key_grant")
    op.create_index("ix_key_grant_api_key_id", "key_grant", ["api_key_id"])
    op.drop_index("ix_api_key_member_id", "api_key")
    _leased("host", "gpu_uuid")
    for table in TABLES:
        op.drop_table(table)
    for table, column in ADDED:
        op.drop_column(table, column)
