"""`shortstop trace` and `shortstop replay`: record once, ask a thousand times."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.jobs import see_through, spec_folder
from cluster.cli.options import (
    DatabaseUrl,
    GpusPerWorker,
    Inline,
    JobId,
    JsonFlag,
    Overrides,
    RayAddress,
    ServerUrl,
    SpecFile,
    Workers,
)
from cluster.cli.output import note, print_json, print_table
from cluster.cli.start import opened, service, start, writable
from engine.errors import BadInput

if TYPE_CHECKING:
    from cluster.confirming import Confirmed
    from cluster.grids import ReplaySpec
    from cluster.replays import Estimate, ReplayReport

Target = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="reference|full", help="What is traced: the reference, or the model's own completion."
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="POLICY",
        help="As in a spec, with lists of values or {from: 0, to: 1, steps: 11} for options; or a YAML file of them.",
    ),
]
BenchmarkName = Annotated[
    str | None, typer.Option("--benchmark", metavar="NAME", help="Which; without it all that were traced.")
]
Confirm = Annotated[
    int | None,
    typer.Option(
        "--confirm", metavar="K", min=1, max=20, help="Run the K best live, and show measured beside replayed."
    ),
]
#: rows of a table on a terminal; files have all
_MOST_ROWS = 40


def trace(
    spec: SpecFile,
    target: Target = None,
    overrides: Overrides = None,
    workers: Workers = None,
    inline: Inline = False,
    ray_address: RayAddress = None,
    gpus_per_worker: GpusPerWorker = None,
    database: DatabaseUrl = None,
    server: ServerUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Record what every exit point predicts for every token; the spec's policies are left aside."""
    from cluster.spec import override, parse_job, read_yaml

    value = override(read_yaml(spec), overrides or [])
    # what was promised of a policy goes with it
    value = {name: field for name, field in value.items() if name not in ("policies", "promise")}
    value["trace"] = target or value.get("trace") or "reference"
    with service(database, workers, server, ray_address, gpus_per_worker, inline=inline) as shortstop:
        asked, folder = parse_job(value), spec_folder(spec)
        shortstop.validate(asked, folder)  # before there is a job, or a database
        job_id = shortstop.submit(asked, folder)
        note(f"job {job_id}: submitted")
        see_through(shortstop, job_id, inline, database, server, None, as_json)


def replay(
    job: JobId,
    policy: Policies = None,
    benchmark: BenchmarkName = None,
    confirm: Confirm = None,
    csv: Annotated[str | None, typer.Option("--csv", metavar="FILE", help="Write the table, with intervals.")] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page with sliders for the thresholds.")
    ] = None,
    workers: Workers = None,
    inline: Inline = False,
    database: DatabaseUrl = None,
    as_json: JsonFlag = False,
) -> None:
    """Apply policies to a trace, without the model: every kind with many thresholds where none is named."""
    from cluster.cli.progress import show_job, watch
    from cluster.grids import default_policies
    from cluster.replays import replay_trace, to_csv
    from cluster.traced import traces_of

    table, page = writable(csv), writable(html)
    settings = start(database, workers)
    with opened(settings, create=False) as db:
        traces = traces_of(db, job, benchmark)
        if len(traces) > 1 and (page or confirm):
            names = ", ".join(repr(one.run.benchmark) for one in traces)
            raise BadInput(
                f"--{'html' if page else 'confirm'} takes one benchmark; name one of {names} by --benchmark."
            )
        asked = asked_policies(policy or [], default_policies(traces[0].pinned))
        with watch() as shown:
            found = [
                replay_trace(one, asked, on_progress=lambda done, of: shown.show("replaying", done, of, "tokens"))
                for one in traces
            ]
        confirmed: list[Confirmed] = []
        if confirm is not None:
            from cluster.confirming import confirm_live

            note(f"running {confirm} of the best live, under every way of paying for skipped layers")
            with watch() as shown:
                confirmed = confirm_live(
                    db,
                    traces[0],
                    found[0],
                    confirm,
                    settings,
                    inline=inline,
                    on_live=lambda now: show_job(shown, now),
                )
        if page is not None:
            from cluster.reports.replay_page import write_replay_page

            write_replay_page(traces[0], found[0], page)
            note(f"page written to {page}")
    if table is not None:
        _write(table, to_csv(found))
        note(f"table written to {table}")
    if as_json:
        print_json({"replays": [one.as_json() for one in found], "confirmed": confirmed})
        return
    for report in found:
        _print(report)
    if confirmed:
        _print_confirmed(confirmed)


def asked_policies(texts: list[str], default: list[Any]) -> "ReplaySpec":
    """All that the options name, in order, or the default. Raises `BadInput`."""
    from cluster.grids import ReplaySpec, read_replay

    if not texts:
        return ReplaySpec(policies=default)
    first, *others = [read_replay(text) for text in texts]
    for more in others:
        if more != ReplaySpec(policies=more.policies):
            raise BadInput("--policy: only the first file may say what its policies are for; give it first.")
    return first.model_copy(update={"policies": [entry for one in (first, *others) for entry in one.policies]})


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"csv: {str(file)!r} cannot be written ({error.strerror}); name another file.") from None


def _print(found: "ReplayReport") -> None:
    from cluster.reports import formats as f

    is_short = len(found.policies) <= _MOST_ROWS
    shown = found.policies if is_short else found.best()[:_MOST_ROWS]
    of = f"{len(found.policies):,} policies" if is_short else f"the Pareto front of {len(found.policies):,} policies"
    print(
        f"job {found.job_id}, {found.benchmark}, target {found.target}: {of} over {found.tokens:,} tokens of "
        f"{found.samples:,} samples, {found.groups:,} source groups\n"
    )
    columns: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "ideal speed": ("speedup_ideal", f.times),
        "tokens right": ("tokens_right", f.percent),
        "agreement": ("agreement", f.percent),
        "exit layer": ("mean_exit_layer", f.layer),
        "stopped": ("stop_share", f.percent),
        "stop lift": ("stop_lift", f.times),
    }
    print_table(
        ["", "policy", *columns],
        [
            [
                "*" if row.front else "",
                row.policy,
                *(_cell(row.figures.get(name), form) for name, form in columns.values()),
            ]
            for row in shown
        ],
    )
    print("\n* on the Pareto front of ideal speed and tokens right; intervals at 95 % over source groups\n")


def _cell(estimate: "Estimate | None", form: "Callable[[float | None], str]") -> str:
    if estimate is None:
        return form(None)
    interval = "" if estimate.low is None else f" ({form(estimate.low)}–{form(estimate.high)})"
    return form(estimate.value) + interval


def _print_confirmed(confirmed: "list[Confirmed]") -> None:
    print("\nlive beside replayed:")
    rows = []
    for one in confirmed:
        for name, pair in one.figures.items():
            rows.append([one.policy, one.kv, name, _number(pair.replayed), _number(pair.measured), _number(pair.drift)])
        same = f"{one.decided_otherwise} of {one.compared} tokens behind the same text"
        rows.append([one.policy, one.kv, "decided otherwise", "", same, ""])
    print_table(["policy", "kv", "figure", "replayed", "measured", "drift"], rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
