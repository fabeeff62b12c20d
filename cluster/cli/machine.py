"""Commands about this machine and its database."""

import re
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import DatabaseUrl, JsonFlag
from cluster.cli.output import note, print_json, print_table, to_json
from cluster.cli.start import opened, start, writable
from engine.errors import BadInput

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


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


def check(
    rebuild: Annotated[
        bool, typer.Option("--rebuild-rollups", help="First write every rollup anew that differs from its recount.")
    ] = False,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Whether the record keeps what it promises; exit code 1 where it does not."""
    from cluster.contents import hashes
    from db.checks import check, rebuild_rollups

    with opened(start(database), create=False) as db:
        rebuilt = rebuild_rollups(db) if rebuild else 0
        violations = 0
        if as_json:
            found = list(check(db, hashes()))
            violations = len(found)
            print_json({"violations": found} | ({"rebuilt": rebuilt} if rebuild else {}))
        else:
            if rebuild:
                print(f"{rebuilt} rollups written anew")
            for sentence in check(db, hashes()):
                violations += 1
                print(sentence)
            if not violations:
                print("no violations")
    if violations:
        raise typer.Exit(1)


def prune(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Like 30d, 12h or 2w: since the job ended.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove jobs that ended long ago, and benchmarks and artifacts that no job refers to."""
    from db.pruning import planned, prune

    age = seconds("--older-than", older_than)
    with opened(start(database), create=False) as db:
        done = planned(db, age) if dry_run else prune(db, age, on_job=lambda job: note(f"job {job}: removed"))
    if as_json:
        print_json(done)
        return
    print(
        f"{'would remove' if dry_run else 'removed'}: {len(done.jobs)} jobs{_listed(done.jobs)}, "
        f"{done.outcomes} outcomes, {done.benchmarks} benchmarks, {done.samples} samples, {done.artifacts} artifacts"
    )


def backup(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file that is not there yet.")],
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy a SQLite database while workers write to it."""
    from db.backup import backup

    path = writable(file) or Path(file)
    with opened(start(database), create=False) as db:
        backup(db, path)
    print(to_json({"file": file}) if as_json else f"backup written to {file}")


def seconds(option: str, age: str) -> float:
    """An age that an option names, in seconds. Raises `BadInput`."""
    found = re.fullmatch(r"(\d{1,9})([smhdw])", age.strip())
    if found is None:
        raise BadInput(f"{option} {age!r} is no age; write a number and s, m, h, d or w, like 30d.")
    return int(found[1]) * _SECONDS[found[2]]


def _listed(jobs: list[int]) -> str:
    return f" ({', '.join(map(str, jobs))})" if jobs else ""
