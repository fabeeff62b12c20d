"""The tables of who may come in: keys, and browsers that are logged in. `db/tables.py` has the others."""

from sqlalchemy import JSON, Column, Double, ForeignKey, Table, Text

from db.tables import metadata

#: what lets a client in; the secret itself is known to its owner only
api_key = Table(
    "api_key",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_hash", Text, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("last_used_at", Double),
    Column("revoked_at", Double),
)

#: a browser that is logged in: it holds a secret of its own, and may what the key may
browser_session = Table(
    "browser_session",
    metadata,
    Column("token_hash", Text, primary_key=True),
    Column("key_id", Text, ForeignKey("api_key.id"), nullable=False),
    Column("expires_at", Double, nullable=False),
)
