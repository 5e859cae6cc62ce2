"""What every table is made of: the names of its keys, texts that compare by bytes, ids, times; no table and no query here."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Double, Integer, MetaData, Text

NAMING = {"ix": "ix_%(table_name)s_%(column_0_name)s", "uq": "uq_%(table_name)s_%(column_0_name)s", "fk": "fk_%(table_name)s_%(column_0_name)s"}

metadata = MetaData(naming_convention=NAMING)
Name = Text().with_variant(Text(collation="C"), "postgresql")
Id = BigInteger().with_variant(Integer, "sqlite")


def serial() -> Column[Any]:
    """The row's own number."""
    return Column("id", Id, primary_key=True, autoincrement=True)


def words(name: str, default: str = "") -> Column[Any]:
    """A text that is never null."""
    return Column(name, Text, nullable=False, server_default=default)


def moment(name: str) -> Column[Any]:
    """Seconds since 1970; 0 is never."""
    return Column(name, Double, nullable=False, server_default="0")
