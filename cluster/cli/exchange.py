"""`shortstop export` and `shortstop import`: a job on its way from one database to another."""

from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.options import DatabaseUrl, JobId, JsonFlag
from cluster.cli.output import note, print_json
from cluster.cli.start import opened, start


class Form(StrEnum):
    """What an export is written as."""

    PARQUET = "parquet"
    LM_EVAL = "lm-eval"
    EVERY_EVAL_EVER = "every-eval-ever"


def export_job(
    job: JobId,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that is not there yet.")],
    form: Annotated[
        Form, typer.Option("--format", help="parquet, which `import` reads; or what others read.")
    ] = Form.PARQUET,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a job that has ended: Parquet files with a manifest, or the files of a neighbour."""
    target = Path(folder).expanduser()
    answer: dict[str, Any] = {"job": job, "folder": folder}
    with opened(start(database), create=False) as db:
        if form is Form.PARQUET:
            from db.exporting import export_job

            answer["export"] = export_job(db, job, target, shortstop=version("shortstop"))
        else:
            from cluster import neighbours

            write = neighbours.export_lm_eval if form is Form.LM_EVAL else neighbours.export_every_eval_ever
            done = write(db, job, target)
            answer |= {"files": done.files, "completions": done.completions}
    if as_json:
        print_json(answer)
    else:
        print(f"job {job}: exported to {folder}")


def import_completions(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines; - reads standard input.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="The run's name in reports.")],
    job: Annotated[
        int | None,
        typer.Option(metavar="JOB", min=1, max=2**31 - 1, help="A job that is done, beside whose runs they stand."),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(metavar="BENCHMARK", help="Without a job: what they complete, as in a spec; they become a job."),
    ] = None,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Score completions that were made elsewhere as a run, without tokens and times."""
    import yaml

    from cluster.elsewhere import import_as_job, import_into, read_completions
    from engine.errors import BadInput

    if (job is None) == (benchmark is None):
        raise BadInput("give --job JOB, whose samples were completed, or --benchmark BENCHMARK, and not both.")
    found = read_completions(file)
    with opened(start(database), create=job is None) as db:
        if job is not None:
            done = import_into(db, job, found, name)
        else:
            try:
                asked = yaml.safe_load(benchmark or "")
            except yaml.YAMLError:
                raise BadInput(f"benchmark {benchmark!r} is not YAML; write a name, or '{{jsonl: FILE}}'.") from None
            done = import_as_job(db, asked, found, name)
    if as_json:
        print_json(done)
        return
    print(f"job {done.job}: {done.completions} completions imported as {done.run}")
    if done.lacking:
        note(f"{done.lacking} samples have no completion, and count as errors")
    if done.left_out:
        note(f"{done.left_out} completions are of other samples and were left out, first {done.first_left_out}")


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
