"""The command line `shortstop`. Nothing heavy is imported before a command needs it.

Exit codes: 0 done, 1 failed, 2 bad input (one sentence on standard error, nothing changed), 130 interrupted;
of a gate 0 pass, 1 fail, 3 inconclusive.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import cluster.errors
import db.errors
import engine.errors
from cluster.cli import (
    calibrate,
    catalogue,
    comparing,
    exchange,
    exits,
    finished,
    fleet,
    jobs,
    labels,
    machine,
    neighbours,
    query,
    schedules,
    serve,
    status,
    study,
    traces,
    training,
)
from cluster.cli.output import note


class FrontDoor(TyperGroup):
    """Says what went wrong in one sentence, and ends with the exit code that belongs to it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (engine.errors.BadInput, db.errors.BadInput) as error:
            note(f"shortstop: {error}")
            raise typer.Exit(2) from None
        except (engine.errors.EngineError, db.errors.RecordError, cluster.errors.ClusterError) as error:
            note(f"shortstop: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            note(str(error) or "interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=FrontDoor,
    name="shortstop",
    help="Measures dynamic inference for code-completion models: how much faster, at what loss of quality.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"shortstop {version('shortstop')}")
        raise typer.Exit


@app.callback()
def _front(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


for command in (
    jobs.run,
    jobs.validate,
    jobs.submit,
    jobs.pause,
    jobs.resume,
    jobs.retry,
    jobs.cancel,
    jobs.list_jobs,
    jobs.show,
    status.status,
    status.logs,
    jobs.report,
    fleet.fleet,
    fleet.work,
    finished.add_policy,
    finished.rescore,
    comparing.compare,
    comparing.gate,
    query.query,
    exchange.export_job,
    exchange.import_job,
    exchange.import_completions,
    catalogue.models,
    catalogue.policies,
    training.train,
    traces.trace,
    traces.replay,
    study.study,
    calibrate.calibrate,
    serve.serve,
    machine.doctor,
):
    app.command(name=command.__name__.removesuffix("_jobs").removesuffix("_job").replace("_", "-"))(command)

app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(neighbours.lm_eval)

database = typer.Typer(help="Look after the database.", no_args_is_help=True)
database.command()(machine.upgrade)
database.command()(machine.check)
database.command()(machine.prune)
database.command()(machine.backup)
app.add_typer(database, name="db")
benchmarks = typer.Typer(
    help="The benchmarks known by name; source code and JSONL do as well.", invoke_without_command=True
)
benchmarks.callback()(catalogue.benchmarks)
benchmarks.command()(catalogue.show)
benchmarks.command()(catalogue.overlap)
app.add_typer(benchmarks, name="benchmarks")

recurring = typer.Typer(help="Look after jobs that recur.", no_args_is_help=True)
recurring.command()(schedules.add)
recurring.command("list")(schedules.list_schedules)
recurring.command()(schedules.show)
recurring.command()(schedules.pause)
recurring.command()(schedules.resume)
recurring.command()(schedules.remove)
recurring.command()(schedules.trigger)
recurring.command()(schedules.resend)
recurring.command()(schedules.tick)
recurring.command()(schedules.run)
app.add_typer(recurring, name="schedule")

bundles = typer.Typer(
    help="Exit bundles: look at them, check them, take those of other projects.", no_args_is_help=True
)
bundles.command("list")(exits.list_exits)
bundles.command()(exits.show)
bundles.command()(exits.verify)
bundles.command("import")(exits.import_exits)
app.add_typer(bundles, name="exits")

label = typer.Typer(help="Let people judge completions.", no_args_is_help=True)
label.command()(labels.export)
label.command("import")(labels.import_)
app.add_typer(label, name="label")

keys = typer.Typer(help="Look after the API keys of a server's clients.", no_args_is_help=True)
keys.command()(serve.create)
keys.command("list")(serve.list_keys)
keys.command()(serve.revoke)
app.add_typer(keys, name="key")


def main() -> None:
    """The console script."""
    app()
