"""The PostgreSQL role under which questions are asked: it may read the documented views, nothing else."""

from sqlalchemy import Connection, text

#: the views that docs/sql.md describes
VIEWS = ("token", "completion", "completion_score", "completion_label", "batch", "run_summary", "overlap")
READER = "shortstop_reader"

_CREATE = f"""
DO $$ BEGIN
  CREATE ROLE {READER} NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;  -- another database on this server has made it
END $$
"""


def grant_reader(connection: Connection) -> None:
    """Make the role and let it read the views, where the connected user may make roles."""
    may_create = "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
    if not connection.execute(text(may_create)).scalar_one():
        return
    connection.execute(text(_CREATE))
    if not connection.execute(text(f"SELECT pg_has_role(current_user, '{READER}', 'MEMBER')")).scalar_one():
        connection.execute(text(f"GRANT {READER} TO CURRENT_USER"))
    schema = connection.execute(text("SELECT quote_ident(current_schema())")).scalar_one()
    connection.execute(text(f"GRANT USAGE ON SCHEMA {schema} TO {READER}"))
    connection.execute(text(f"GRANT SELECT ON {', '.join(VIEWS)} TO {READER}"))
