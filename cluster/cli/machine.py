"""Commands about this machine and its database."""

import typer

from cluster.cli.options import DatabaseUrl, JsonFlag
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import start


def doctor(database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """What this machine has, what is missing, and how to get it."""
    from cluster.doctor import Finding, examine

    checks = list(examine(start(database)))
    if as_json:
        print_json(checks)
    else:
        print_table(("check", "finding", ""), [(check.name, check.finding, check.detail) for check in checks])
    missing = [check for check in checks if check.finding is Finding.MISSING]
    for check in checks:
        if check.remedy:
            note(f"{check.name}: run `{check.remedy}`")
    if missing:
        raise typer.Exit(1)


def upgrade(database: DatabaseUrl = None, as_json: JsonFlag = False) -> None:
    """Bring the database up to date with this version."""
    from db.session import upgrade

    before, after = upgrade(start(database).database_url)
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        print(f"schema {after}: up to date")
    else:
        print(f"schema {before or 'none'} -> {after}")
