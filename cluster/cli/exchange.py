"""`shortstop export` and `shortstop import`: a job on its way from one database to another."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import DatabaseUrl, JobId, JsonFlag
from cluster.cli.output import print_json
from cluster.cli.start import opened, start


def export_job(
    job: JobId,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that is not there yet.")],
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a job that has ended as Parquet files with a manifest."""
    from db.exporting import export_job

    with opened(start(database), create=False) as db:
        id = export_job(db, job, Path(folder).expanduser(), shortstop=version("shortstop"))
    if as_json:
        print_json({"job": job, "folder": folder, "export": id})
    else:
        print(f"job {job}: exported to {folder}")


def import_job(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="What `shortstop export` wrote.")],
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Read an exported job into the database; a second time nothing is written."""
    from cluster.contents import hashes
    from db.exchange import read_manifest
    from db.importing import import_job

    source = Path(folder).expanduser()
    read_manifest(source)  # before there is a database
    with opened(start(database)) as db:
        found = import_job(db, source, hashes())
    if as_json:
        print_json({"job": found.job_id, "new": found.new})
    else:
        print(f"job {found.job_id}: {'imported' if found.new else 'was imported before'}")
