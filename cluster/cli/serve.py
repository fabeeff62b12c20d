"""`shortstop serve` and the API keys of its clients."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.machine import seconds
from cluster.cli.options import DatabaseUrl, JsonFlag, Workers
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import opened, start

if TYPE_CHECKING:
    from db.keys import KeyRow

Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", metavar="SCOPE", help="read, submit, query or admin; read and submit when absent."),
]


def serve(
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Beyond this machine only with a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: any that is free.")] = 8321,
    fleet: Annotated[bool, typer.Option("--fleet/--no-fleet", help="Work on the jobs as well, or only serve.")] = True,
    pages: Annotated[bool, typer.Option("--pages/--no-pages", help="Pages for browsers as well, or the API only.")] = (
        True
    ),
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="NAME", help="A folder, hub id or installed package that submitted specs may name."
        ),
    ] = None,
    workers: Workers = None,
    database: DatabaseUrl = None,
) -> None:
    """Serve the HTTP API and pages to look at in a browser, and work on the jobs that come."""
    from cluster.api.server import serve

    settings = start(database, workers, allow=allow)
    serve(
        settings,
        host=host,
        port=port,
        with_fleet=fleet,
        with_pages=pages,
        workers=workers,
        on_ready=lambda url: note(f"serving on {url}, end with Ctrl-C"),
    )


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is: the principal of what is done with it.")],
    scope: Scopes = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="AGE", help="Like 30d, 12h or 2w; never when absent.")
    ] = None,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Make an API key and print it: nobody can read it again."""
    from db.keys import create_key

    lifetime = None if expires is None else seconds("--expires", expires)
    with opened(start(database)) as db:
        key, row = create_key(db, name, scope or ["read", "submit"], lifetime_s=lifetime)
    if as_json:
        print_json({"key": key, "id": row.id, "name": row.name, "scopes": row.scopes, "expires_at": row.expires_at})
    else:
        print(key)
        note(f"key {row.id} of {row.name}, with {', '.join(row.scopes)}; it is shown this once")


def list_keys(database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """The API keys, oldest first; never the secrets."""
    from cluster.reports.formats import moment
    from db.keys import list_keys

    with opened(start(database), create=False) as db:
        rows = list_keys(db)
    if as_json:
        print_json(rows)
        return
    print_table(
        ("key", "name", "scopes", "state", "created", "expires", "last used"),
        [
            (
                row.id,
                row.name,
                ", ".join(row.scopes),
                _state(row),
                moment(row.created_at),
                moment(row.expires_at),
                moment(row.last_used_at),
            )
            for row in rows
        ],
    )


def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as `shortstop key list` prints it.")],
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Let an API key in no more, at once, nor the browsers that are logged in with it."""
    from db.keys import revoke_key

    with opened(start(database), create=False) as db:
        row = revoke_key(db, key)
    if as_json:
        print_json(row)
    else:
        print(f"key {row.id} of {row.name}: revoked")


def _state(row: "KeyRow") -> str:
    if row.revoked_at is not None:
        return "revoked"
    return "expired" if row.expires_at is not None and row.expires_at <= time.time() else "valid"
