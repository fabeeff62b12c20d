"""Alembic's entry: migrations run on the connection and in the transaction of `db.schema.migrate`."""

from alembic import context

from db.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
